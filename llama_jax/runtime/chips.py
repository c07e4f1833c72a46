"""What is known of each kind of accelerator, and how programs are compiled for it.

The one table that training and plans both read, so that what is planned is what runs.
"""

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Chip:
    """A kind of accelerator. Numbers are from its maker's data sheet.

    Attributes:
        kind: how `jax.Device.device_kind` begins.
        tflops: dense bfloat16 matrix products of one device [TFLOP/s].
        hbm: memory of one device [GiB]; this and what follows only where plans are made.
        dimensions: of its network.
        link: bandwidth of one link of the network, in one direction [GB/s].
        usable: of its memory, what the TPU compiler gives a program [GiB]; it says so when it
            refuses one.
        bandwidth: of its memory [GB/s].
        clock: cycles of it in a nanosecond: its peak, over what its matrix units do in a cycle.
        settings: what the TPU compiler wants to know of it.
        options: of XLA, for training; the reasons stand beside them.
    """

    kind: str
    tflops: float
    hbm: float = 0.0
    dimensions: int = 0
    link: float = 0.0
    usable: float = 0.0
    bandwidth: float = 0.0
    clock: float = 0.0
    settings: str = "default"
    options: dict[str, str] = field(default_factory=dict)


# Where a SparseCore can drive the network while the TensorCore computes, it gathers and scatters.
# Tried and left on v5p: sums as well, at large ones of which the compiler of libtpu 0.0.42.1
# overflows its stack.
_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload_"
_SPARSE_CORE = {
    _OFFLOAD + "all_gather": "true",
    # The same over two dimensions of the network at once.
    _OFFLOAD + "2d_all_gather": "true",
    _OFFLOAD + "reduce_scatter": "true",
    # What it moves keeps the TensorCore's layout, and one program moves it for both cores.
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_disable_megacore_partitioning": "true",
    # The offload of gathers asks for both: to be visible, and not to be taken into products.
    "xla_tpu_enable_all_gather_offload_tracing": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
}

# Twice the fast memory for the tiles of products: a layer of 7B from 28.2 to 27.7 ms, by the
# compiler's cycle count from 54.6 to 46.1 million. Four times makes it 27.5 ms, but compiling takes
# three times as long again.
_TILES = {"xla_tpu_scoped_vmem_limit_kib": "32768"}

# Where there is none, or an old one: the core that computes drives the network as well.
_OVERLAP = {
    # Weights are gathered in steps inside of the products that run meanwhile.
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    # One gather may go on through several products.
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}

CHIPS = {
    "v4": Chip("TPU v4", 275.0, 32, 3, 45.0, 30.75, 1228, 1.05, "megacore", _OVERLAP),
    "v5e": Chip("TPU v5 lite", 197.0, 16, 2, 45.0, 15.75, 819, 1.5, options=_OVERLAP),
    "v5p": Chip("TPU v5", 459.0, 95, 3, 90.0, 95.74, 2765, 1.75, "megacore", _SPARSE_CORE | _TILES),
    "v6e": Chip("TPU v6 lite", 918.0, 32, 2, 90.0, 31.25, 1640, 1.75, options=_SPARSE_CORE),
    "v3": Chip("TPU v3", 61.5),  # a core; JAX shows two a chip
    "a100": Chip("NVIDIA A100", 312.0),
    "h100-pcie": Chip("NVIDIA H100 PCIe", 756.0),
    "h100": Chip("NVIDIA H100", 989.0),
    "h200": Chip("NVIDIA H200", 989.0),
    "b200": Chip("NVIDIA B200", 2250.0),
}


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip whose kind is the longest start of `device_kind`, or None."""
    fitting = [chip for chip in CHIPS.values() if device_kind.startswith(chip.kind)]
    return max(fitting, key=lambda chip: len(chip.kind), default=None)


def cpu_cores() -> int:
    """Returns how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_has_bfloat16() -> bool:
    """Tells whether this machine's CPU multiplies bfloat16 itself: AVX512-BF16, AMX, ARM's BF16."""
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:  # macOS has no such file
        asked = ["sysctl", "-n", "hw.optional.arm.FEAT_BF16"]
        try:
            told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
        except OSError:
            return False
        return told.strip() == "1"
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)
