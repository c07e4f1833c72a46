"""Pods that are not there: their devices, as the TPU compiler knows them."""

import math
import os
import re
from typing import Any, NamedTuple

import jax

from llama_jax.errors import InputError, missing_extra
from llama_jax.runtime.chips import PLANNABLE_CHIPS, PlannableChip


class Pod(NamedTuple):
    """One slice of TPU chips, or several of them."""

    name: str  # of the kind of chip
    shape: tuple[int, ...]  # chips of a slice, along each dimension of the network
    slices: int

    @property
    def chip(self) -> PlannableChip:
        """The kind of its chips."""
        return PLANNABLE_CHIPS[self.name]

    @property
    def size(self) -> int:
        """Number of chips in all."""
        return math.prod(self.shape) * self.slices

    @property
    def rings(self) -> tuple[bool, ...]:
        """Tells which dimensions of a slice are rings, not lines.

        3D networks are made of cubes of 4; on 2D ones all 16 chips must be there.
        """
        whole = 4 if len(self.shape) == 3 else 16
        return tuple(size % whole == 0 for size in self.shape)

    @property
    def hops(self) -> int:
        """Links between the two chips of a slice that lie farthest apart."""
        sizes = zip(self.shape, self.rings, strict=True)
        return sum(size // 2 if ring else size - 1 for size, ring in sizes)

    def __str__(self) -> str:
        slices = f"{self.slices}*" if self.slices > 1 else ""
        return f"{slices}{self.name}:{'x'.join(map(str, self.shape))}"


def parse(topology: str) -> Pod:
    """Returns the pod that 'v5p:4x4x4' names, or '2*v5p:4x4x4' with two slices.

    Raises:
        InputError: there is no such kind of chip, or its network has other dimensions.
    """
    fitting = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", topology)
    if fitting is None or fitting[2] not in PLANNABLE_CHIPS:
        raise InputError(
            f"--topology {topology}: write KIND:SHAPE as in v5p:4x4x4 or v6e:16x16, after 2* for"
            f" two slices; kinds: {', '.join(PLANNABLE_CHIPS)}"
        )
    pod = Pod(fitting[2], tuple(map(int, fitting[3].split("x"))), int(fitting[1] or 1))
    dimensions = pod.chip.ici_dimensions
    if len(pod.shape) != dimensions or 0 in pod.shape or pod.slices == 0:
        example = {2: "16x16", 3: "4x4x8"}[dimensions]
        raise InputError(
            f"--topology {topology}: {pod.name} has a network of {dimensions} dimensions,"
            f" as in {pod.name}:{example}"
        )
    return pod


def devices(pod: Pod) -> list[Any]:
    """Returns the devices of a pod, to compile for.

    Raises:
        InputError: the compiler is not installed, or knows no such pod.
    """
    # Read by libtpu when it is loaded; without them it asks the metadata server of a cloud.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-128")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # two plans at a time
    # No accelerator of this machine is wanted, least of all one that another process holds.
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{pod.name}:{'x'.join(map(str, pod.shape))}",
            chip_config_name=pod.chip.chip_config_name,
            chips_per_host_bounds=(2, 2, 1),
            num_slices=pod.slices,
            wrap=(*pod.rings, *(False,) * (3 - len(pod.shape))),
        ).devices
    except Exception as error:  # of a plugin: its types are not documented
        if "not installed" in str(error):
            raise missing_extra("there is no TPU compiler here", "plan") from error
        reason = str(error).strip().splitlines()[0][:200]
        raise InputError(
            f"--topology {pod}: the TPU compiler does not know it ({reason})"
        ) from error
