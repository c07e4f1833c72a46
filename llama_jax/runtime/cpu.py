"""The CPU of this machine: cores and instructions."""

import functools
import os
import subprocess
from pathlib import Path


def cpu_cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_has_bfloat16() -> bool:
    """Returns whether the CPU multiplies bfloat16: AVX512-BF16, AMX or ARM's BF16."""
    try:
        words = _cpu_flags()
    except OSError:  # macOS has no such file
        command = ["sysctl", "-n", "hw.optional.arm.FEAT_BF16"]
        try:
            output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        except OSError:
            return False
        return output.strip() == "1"
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)


def cpu_multiplies_uint8() -> bool:
    """Returns whether the CPU multiplies uint8 with int8: AVX512-VNNI or AMX.

    AVX-VNNI does so too, but XLA has had kernels for it only since JAX 0.12.
    """
    try:
        return not {"avx512_vnni", "amx_int8"}.isdisjoint(_cpu_flags())
    except OSError:  # macOS
        return False


@functools.cache  # a machine with hundreds of cores takes milliseconds to write the file
def _cpu_flags() -> frozenset[str]:
    return frozenset(Path("/proc/cpuinfo").read_text().split())
