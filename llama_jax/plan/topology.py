"""TPU pods and GPU nodes by name: chips, network, and the devices that XLA can compile for."""

import math
import os
import re
from typing import Any, NamedTuple

import jax

from llama_jax.errors import InputError, missing_extra
from llama_jax.runtime.chips import PLANNABLE_CHIPS, GpuTarget, PlannableChip

BETWEEN_SLICES = 6.25  # GB/s for each chip: a host's 200 Gbit/s, divided among its 4 chips


class Pod(NamedTuple):
    """One or several slices of TPU chips, or nodes of GPUs.

    Attributes:
        chip_name: key of `PLANNABLE_CHIPS`.
        shape: chips of a slice along each dimension of its network; GPUs of a node.
        n_slices: number of slices or nodes.
    """

    chip_name: str
    shape: tuple[int, ...]
    n_slices: int

    @property
    def chip(self) -> PlannableChip:
        """The kind of all its chips."""
        return PLANNABLE_CHIPS[self.chip_name]

    @property
    def chips_per_slice(self) -> int:
        """Number of chips in a slice."""
        return math.prod(self.shape)

    @property
    def n_chips(self) -> int:
        """Number of chips in all slices."""
        return self.chips_per_slice * self.n_slices

    @property
    def devices_per_slice(self) -> int:
        """Number of JAX devices in a slice."""
        return self.chips_per_slice * self.chip.devices_per_chip

    @property
    def n_devices(self) -> int:
        """Number of JAX devices in all slices."""
        return self.devices_per_slice * self.n_slices

    @property
    def device_name(self) -> str:
        """A device in the words of a report."""
        if self.chip.gpu:
            return "GPU"
        per_chip = self.chip.devices_per_chip
        return "chip" if per_chip == 1 else f"device, {per_chip} in a chip"

    @property
    def rings(self) -> tuple[bool, ...]:
        """For each dimension of a slice: True if it is a ring, False if it is a line.

        A 3D network consists of cubes of 4 × 4 × 4 chips, so a multiple of 4 closes a ring. In a 2D
        network only a dimension with all its 16 chips is a ring.
        """
        unit = 4 if len(self.shape) == 3 else 16
        return tuple(size % unit == 0 for size in self.shape)

    @property
    def hops(self) -> int:
        """Links between the two chips of a slice that are farthest apart."""
        sizes = zip(self.shape, self.rings, strict=True)
        return sum(size // 2 if ring else size - 1 for size, ring in sizes)

    def __str__(self) -> str:
        slices = f"{self.n_slices}*" if self.n_slices > 1 else ""
        return f"{slices}{self.chip_name}:{'x'.join(map(str, self.shape))}"


def parse(topology: str) -> Pod:
    """Returns the pod that 'v5p:4x4x4' names, '2*v5p:4x4x4' for two slices, 'h100:8' for a node.

    Raises:
        InputError: the kind of chip is unknown, or its network has other dimensions.
    """
    match = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", topology)
    if match is None or match[2] not in PLANNABLE_CHIPS:
        raise InputError(
            f"--topology {topology}: write KIND:SHAPE as in v5p:4x4x4, v6e:16x16 or h100:8, after"
            f" 2* for two slices or nodes; kinds: {', '.join(PLANNABLE_CHIPS)}"
        )
    pod = Pod(match[2], tuple(map(int, match[3].split("x"))), int(match[1] or 1))
    if len(pod.shape) != pod.chip.ici_dimensions or 0 in pod.shape or pod.n_slices == 0:
        example = {1: "8", 2: "16x16", 3: "4x4x8"}[pod.chip.ici_dimensions]
        plural = "" if pod.chip.ici_dimensions == 1 else "s"
        raise InputError(
            f"--topology {topology}: {pod.chip_name} has a network of {pod.chip.ici_dimensions}"
            f" dimension{plural}, as in {pod.chip_name}:{example}"
        )
    return pod


def network_bandwidth(pod: Pod, n_devices: int) -> float:
    """Returns the rate at which a device sends within a group of `n_devices` devices [GB/s].

    The devices of a chip share its links. A group spans the fewest dimensions of the network that
    can contain it. It uses both links of a dimension that is a ring and that it fills, and one link
    of any other, where it forms a line. A group larger than a slice is limited by the network
    between slices.
    """
    n_chips = math.ceil(n_devices / pod.chip.devices_per_chip)
    if n_chips > pod.chips_per_slice:
        return BETWEEN_SLICES / pod.chip.devices_per_chip
    spanned, links = 1, 0
    for size, ring in sorted(zip(pod.shape, pod.rings, strict=True)):
        if spanned < n_chips and size > 1:
            links += 2 if ring and n_chips >= spanned * size else 1
            spanned *= size
    return pod.chip.ici_link_gb_per_s * max(1, links) / pod.chip.devices_per_chip


def devices(pod: Pod) -> list[Any]:
    """Returns the devices of a pod as compilation targets; no such hardware is needed.

    Raises:
        InputError: the compiler is not installed, or does not know this pod.
    """
    # Use none of this machine's accelerators: another process may have them locked.
    jax.config.update("jax_platforms", "cpu")
    if pod.chip.gpu:
        return _gpus(pod, pod.chip.gpu)
    # libtpu reads these when it is loaded; without them it queries a cloud's metadata server.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-128")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # run two plans at once
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{pod.chip_name}:{'x'.join(map(str, pod.shape))}",
            chip_config_name=pod.chip.chip_config_name,
            chips_per_host_bounds=(2, 2, 1),
            num_slices=pod.n_slices,
            wrap=(*pod.rings, *(False,) * (3 - len(pod.shape))),
        ).devices
    except Exception as error:  # the plugin does not document its exception types
        if "not installed" in str(error):
            raise missing_extra("there is no TPU compiler here", "plan") from error
        reason = str(error).strip().splitlines()[0][:200]
        raise InputError(
            f"--topology {pod}: the TPU compiler does not know it ({reason})"
        ) from error


def _gpus(pod: Pod, gpu: GpuTarget) -> list[Any]:
    from jax.experimental import topologies

    if jax.__version_info__ < (0, 11):
        raise InputError(
            f"--topology {pod}: plans for GPUs need JAX 0.11 or later (here {jax.__version__}),"
            " which needs Python 3.12 or later"
        )
    # The compiler logs errors where a program takes more than 80 % of the memory; it compiles it.
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    chip, shared = pod.chip, gpu.shared_kib << 10
    major, minor = gpu.capability
    target = f"""
        gpu_device_info {{
            cuda_compute_capability {{ major: {major} minor: {minor} }}
            core_count: {gpu.cores} fpus_per_core: {gpu.float32_lanes}
            clock_rate_ghz: {chip.clock_ghz} l2_cache_size: {gpu.l2_mib << 20}
            memory_bandwidth: {chip.hbm_gb_per_s * 10**9:.0f}
            device_memory_size: {chip.hbm_gib * 2**30:.0f}
            shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared - 1024}
            shared_memory_per_block: 49152
            registers_per_core_limit: 65536 registers_per_block_limit: 65536
            threads_per_core_limit: 2048 threads_per_block_limit: 1024 threads_per_warp: 32
            block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        }}
        platform_name: "CUDA" device_description_str: "{gpu.name}"
        dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 8 }}
    """
    try:
        return topologies.get_topology_desc(
            platform="cuda", target_config=target, topology=f"{pod.n_slices}x1x{pod.shape[0]}"
        ).devices
    except NotImplementedError as error:  # JAX has no plugin for CUDA
        raise missing_extra("there is no compiler for GPUs here", "gpu") from error
