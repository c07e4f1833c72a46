"""Facts about each kind of accelerator, and the compiler options for it.

Training and `llama-jax plan` read the same table, so that a plan describes the program that runs.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A kind of accelerator. Numbers are from the maker's data sheet.

    Attributes:
        device_kind: prefix of `jax.Device.device_kind`.
        bf16_tflops: peak of dense bfloat16 matmuls on one device [TFLOP/s].
        compiler_options: XLA options of the training step; comments give the reasons.
    """

    device_kind: str
    bf16_tflops: float
    compiler_options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PlannableChip(Chip):
    """A kind of TPU chip that `llama-jax plan` compiles for and estimates.

    Attributes:
        hbm_gib: memory [GiB].
        usable_hbm_gib: the part of the memory that the TPU compiler gives a program [GiB]; the
            compiler's error for a program that is too large states it.
        hbm_gb_per_s: bandwidth of the memory [GB/s].
        ici_dimensions: dimensions of the network between chips.
        ici_link_gb_per_s: bandwidth of one link of that network, in one direction [GB/s].
        clock_ghz: cycles in a nanosecond: peak FLOP/s, divided by the FLOP of the matrix units in
            one cycle.
        chip_config_name: of the topology that the TPU compiler compiles for; 'megacore' presents
            the two cores of a chip as one device.
    """

    hbm_gib: float
    usable_hbm_gib: float
    hbm_gb_per_s: float
    ici_dimensions: int
    ici_link_gb_per_s: float
    clock_ghz: float
    chip_config_name: str = "default"


# Chips whose SparseCore can drive the network while the TensorCore computes: it runs all-gathers
# and reduce-scatters. All-reduces stay with the TensorCore: tried on v5p, the compiler of libtpu
# 0.0.42.1 overflows its stack at large ones.
_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload_"
_SPARSE_CORE = {
    _OFFLOAD + "all_gather": "true",
    # The same over two dimensions of the network at once.
    _OFFLOAD + "2d_all_gather": "true",
    _OFFLOAD + "reduce_scatter": "true",
    # The SparseCore uses the TensorCore's layout, and one program serves both cores of a chip.
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_disable_megacore_partitioning": "true",
    # The offload of all-gathers requires both: they are traced, and not fused into matmuls.
    "xla_tpu_enable_all_gather_offload_tracing": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
}

# Twice the default VMEM for the tiles of a matmul: a layer of 7B takes 27.7 ms instead of 28.2, by
# the compiler's cycle count 46.1 million instead of 54.6. Four times gives 27.5 ms, but compiling
# takes three times as long again.
_TILES = {"xla_tpu_scoped_vmem_limit_kib": "32768"}

# Chips without a SparseCore, or with an old one: the TensorCore drives the network as well.
_OVERLAP = {
    # All-gathers of weights run in steps inside the matmuls that they overlap.
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    # One all-gather may span several matmuls.
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}

PLANNABLE_CHIPS = {
    "v4": PlannableChip(
        device_kind="TPU v4",
        bf16_tflops=275.0,
        hbm_gib=32,
        usable_hbm_gib=30.75,
        hbm_gb_per_s=1228,
        ici_dimensions=3,
        ici_link_gb_per_s=45.0,
        clock_ghz=1.05,
        chip_config_name="megacore",
        compiler_options=_OVERLAP,
    ),
    "v5e": PlannableChip(
        device_kind="TPU v5 lite",
        bf16_tflops=197.0,
        hbm_gib=16,
        usable_hbm_gib=15.75,
        hbm_gb_per_s=819,
        ici_dimensions=2,
        ici_link_gb_per_s=45.0,
        clock_ghz=1.5,
        compiler_options=_OVERLAP,
    ),
    "v5p": PlannableChip(
        device_kind="TPU v5",
        bf16_tflops=459.0,
        hbm_gib=95,
        usable_hbm_gib=95.74,
        hbm_gb_per_s=2765,
        ici_dimensions=3,
        ici_link_gb_per_s=90.0,
        clock_ghz=1.75,
        chip_config_name="megacore",
        compiler_options=_SPARSE_CORE | _TILES,
    ),
    "v6e": PlannableChip(
        device_kind="TPU v6 lite",
        bf16_tflops=918.0,
        hbm_gib=32,
        usable_hbm_gib=31.25,
        hbm_gb_per_s=1640,
        ici_dimensions=2,
        ici_link_gb_per_s=90.0,
        clock_ghz=1.75,
        compiler_options=_SPARSE_CORE,
    ),
}

CHIPS: dict[str, Chip] = {
    **PLANNABLE_CHIPS,
    # One core; JAX lists the two cores of a chip as two devices.
    "v3": Chip(device_kind="TPU v3", bf16_tflops=61.5),
    "a100": Chip(device_kind="NVIDIA A100", bf16_tflops=312.0),
    "h100-pcie": Chip(device_kind="NVIDIA H100 PCIe", bf16_tflops=756.0),
    "h100": Chip(device_kind="NVIDIA H100", bf16_tflops=989.0),
    "h200": Chip(device_kind="NVIDIA H200", bf16_tflops=989.0),
    "b200": Chip(device_kind="NVIDIA B200", bf16_tflops=2250.0),
}


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip with the longest prefix of `device_kind`, or None.

    Args:
        device_kind: as in `jax.Device.device_kind`.
    """
    matches = [chip for chip in CHIPS.values() if device_kind.startswith(chip.device_kind)]
    return max(matches, key=lambda chip: len(chip.device_kind), default=None)
