"""Peaks, memory and network of each kind of accelerator, and its compiler options.

Training and `llama-jax plan` read the same table, so that a plan describes the program that runs.
"""

from dataclasses import dataclass, field, replace

from llama_jax.runtime.compiler_options import LARGE_TILES, OVERLAP, SPARSE_CORE_OFFLOAD


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A kind of accelerator. Numbers are from the maker's data sheet.

    Attributes:
        device_kind: prefix of `jax.Device.device_kind`.
        bf16_tflops: peak of dense bfloat16 matmuls on one device [TFLOP/s].
        compiler_options: XLA options of the training step; `compiler_options.py` gives the reasons.
    """

    device_kind: str
    bf16_tflops: float
    compiler_options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GpuTarget:
    """Properties of a GPU for XLA's compiler, which has a real one's from its driver.

    Attributes:
        name: device kind.
        capability: major and minor compute capability.
        cores: multiprocessors.
        shared_kib: shared memory of a core; a block of threads can have all but 1 KiB.
        l2_mib: cache.
        float32_lanes: of a core.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    shared_kib: int
    l2_mib: int
    float32_lanes: int


@dataclass(frozen=True, kw_only=True)
class PlannableChip(Chip):
    """A kind of chip that `llama-jax plan` compiles for; of TPUs it also estimates times.

    Attributes:
        devices_per_chip: JAX devices of a chip. Peak, memory and its bandwidth are of one device.
        hbm_gib: memory [GiB].
        usable_hbm_gib: the part of the memory that a program can have [GiB]. The error of the TPU
            compiler for a program that is too large states it. On GPUs it is 92 %: the rest is for
            the driver and for libraries.
        hbm_gb_per_s: bandwidth of the memory [GB/s].
        ici_dimensions: dimensions of the network between chips; 1 between the GPUs of a node.
        ici_link_gb_per_s: bandwidth of one link of that network, in one direction [GB/s].
        clock_ghz: cycles in a nanosecond: peak FLOP/s, divided by the FLOP of the matrix units in
            one cycle.
        chip_config_name: of the topology that the TPU compiler compiles for; 'megacore' presents
            the two cores of a chip as one device.
        gpu: of a GPU.
    """

    devices_per_chip: int = 1
    hbm_gib: float
    usable_hbm_gib: float
    hbm_gb_per_s: float
    ici_dimensions: int
    ici_link_gb_per_s: float
    clock_ghz: float
    chip_config_name: str = "default"
    gpu: GpuTarget | None = None


TPUS = {
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
        compiler_options=OVERLAP,
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
        compiler_options=OVERLAP,
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
        compiler_options=SPARSE_CORE_OFFLOAD | LARGE_TILES,
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
        compiler_options=SPARSE_CORE_OFFLOAD,
    ),
    # Ironwood, half a chip. The clock is arithmetic: the matrix units of v6e, at this peak.
    "tpu7x": PlannableChip(
        device_kind="TPU7x",
        bf16_tflops=1153.5,
        devices_per_chip=2,
        hbm_gib=96,
        usable_hbm_gib=94.75,
        hbm_gb_per_s=3690,
        ici_dimensions=3,
        ici_link_gb_per_s=90.0,
        clock_ghz=2.2,
        compiler_options=SPARSE_CORE_OFFLOAD,
    ),
}

_HOPPER = GpuTarget(
    name="NVIDIA H100 80GB HBM3", capability=(9, 0), cores=132, shared_kib=228, l2_mib=50,
    float32_lanes=128,
)  # fmt: skip
GPUS = {
    "a100": PlannableChip(
        device_kind="NVIDIA A100",
        bf16_tflops=312.0,
        hbm_gib=79,
        usable_hbm_gib=73,
        hbm_gb_per_s=2039,
        ici_dimensions=1,
        ici_link_gb_per_s=300,
        clock_ghz=1.41,
        gpu=GpuTarget(
            name="NVIDIA A100-SXM4-80GB",
            capability=(8, 0),
            cores=108,
            shared_kib=164,
            l2_mib=40,
            float32_lanes=64,
        ),
    ),
    "h100": PlannableChip(
        device_kind="NVIDIA H100",
        bf16_tflops=989.0,
        hbm_gib=79,
        usable_hbm_gib=73,
        hbm_gb_per_s=3350,
        ici_dimensions=1,
        ici_link_gb_per_s=450,
        clock_ghz=1.98,
        gpu=_HOPPER,
    ),
    "h200": PlannableChip(
        device_kind="NVIDIA H200",
        bf16_tflops=989.0,
        hbm_gib=140,
        usable_hbm_gib=129,
        hbm_gb_per_s=4800,
        ici_dimensions=1,
        ici_link_gb_per_s=450,
        clock_ghz=1.98,
        gpu=replace(_HOPPER, name="NVIDIA H200"),
    ),
    "b200": PlannableChip(
        device_kind="NVIDIA B200",
        bf16_tflops=2250.0,
        hbm_gib=178,
        usable_hbm_gib=164,
        hbm_gb_per_s=8000,
        ici_dimensions=1,
        ici_link_gb_per_s=900,
        clock_ghz=1.97,
        gpu=GpuTarget(
            name="NVIDIA B200",
            capability=(10, 0),
            cores=148,
            shared_kib=228,
            l2_mib=126,
            float32_lanes=128,
        ),
    ),
}

PLANNABLE_CHIPS = TPUS | GPUS

CHIPS: dict[str, Chip] = {
    **PLANNABLE_CHIPS,
    # One core; JAX lists the two cores of a chip as two devices.
    "v3": Chip(device_kind="TPU v3", bf16_tflops=61.5),
    "h100-pcie": Chip(device_kind="NVIDIA H100 PCIe", bf16_tflops=756.0),
}


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip with the longest prefix of `device_kind`, or None.

    Args:
        device_kind: as in `jax.Device.device_kind`.
    """
    matches = [chip for chip in CHIPS.values() if device_kind.startswith(chip.device_kind)]
    return max(matches, key=lambda chip: len(chip.device_kind), default=None)
