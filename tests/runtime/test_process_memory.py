import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, statistics, sys
import jax, jax.numpy as jnp
from llama_jax.runtime.process_memory import retain_freed_memory

jax.config.update("jax_platforms", sys.argv[1])
retain_freed_memory()
jax.config.update("jax_platforms", "cpu")

@jax.jit
def step(x):  # allocates a temporary of 64 MB
    return jnp.outer(x, x) @ x

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

each = []  # the first steps map memory for each thread that may run them
for _ in range(40):
    before = faults()
    step(jnp.arange(4096.0)).block_until_ready()
    each.append(faults() - before)
print(round(statistics.median(each)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_a_step_on_the_cpu_reuses_its_memory():
    def faults(platform: str) -> int:
        command = [sys.executable, "-c", FAULTS, platform]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("cpu") < 1000
    assert faults("cuda") > 10_000
