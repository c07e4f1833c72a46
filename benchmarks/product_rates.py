"""The rates of matrix products by the two cost models of XLA's TPU compiler, for each chip.

    python benchmarks/product_rates.py

No TPU is needed. `llama-jax plan` sums `optimal_seconds` for training, and the cycles of the
schedule for decoding. Where a model counts products at the peak, its sum is too optimistic.
"""

import argparse

import jax
import jax.numpy as jnp

from llama_jax.plan import topology
from llama_jax.plan.compiler import compile_program

# Products of a layer of Llama 3.1 8B over 4 rows of 8,192 tokens, and a square one.
SHAPES = (32_768, 4096, 14_336), (32_768, 14_336, 4096), (32_768, 4096, 4096), (8192, 8192, 8192)
PODS = "v5p:2x2x1", "v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"


def rates(pod: topology.Pod, M: int, K: int, N: int) -> tuple[float, float]:
    """Returns the TFLOP/s of a bfloat16 product by `optimal_seconds`, and by cycles."""
    mesh = jax.sharding.Mesh(topology.devices(pod)[:1], ("x",))
    sharding = jax.NamedSharding(mesh, jax.P())
    left, right = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in ((M, K), (K, N))
    )
    program = compile_program(jax.jit(jnp.matmul).lower(left, right), pod.chip, {}, "the shape")
    cycles = sum(event.cycles for event in program.events)
    tflop = 2 * M * K * N / 1e12
    return tflop / program.seconds, tflop / (cycles / (pod.chip.clock_ghz * 1e9))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    print("chip    peak  product             optimal_seconds   cycles  [TFLOP/s]")
    for name in PODS:
        pod = topology.parse(name)
        for shape in SHAPES:
            by_seconds, by_cycles = rates(pod, *shape)
            peak = pod.chip.bf16_tflops
            print(
                f"{pod.chip_name:6} {peak:5.0f}  {'×'.join(map(str, shape)):18}"
                f" {by_seconds:6.0f} ({by_seconds / peak:4.0%}) {by_cycles:6.0f}"
                f" ({by_cycles / peak:4.0%})",
                flush=True,
            )


if __name__ == "__main__":
    main()
