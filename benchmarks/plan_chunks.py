"""Estimates the prefill of a chunk of a prompt, as `serve` computes it, on a pod that is not there.

    python benchmarks/plan_chunks.py llama3.1-70b v5e:4x4 --quantize int8 --cache int8

Prints a line for each number of slots to which the chunk attends: the time by the method of
`llama-jax plan`, its parts, and the temporary memory of three layers. It needs the extra `plan`.
"""

import argparse
from dataclasses import replace

from llama_jax.config.family import FAMILY
from llama_jax.inference.engine.row_programs import CHUNK_SIZES
from llama_jax.plan import serving, serving_program, topology
from llama_jax.plan.program_time import DEPTHS, estimate_time


def main() -> None:
    """Compiles the programs and prints their estimates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=FAMILY)
    parser.add_argument("topology")
    parser.add_argument("--quantize", choices=("none", "int8"), default="none")
    parser.add_argument("--cache", choices=("same", "int8"), default="same")
    parser.add_argument("--slots", type=int, nargs="+", default=[2048, 16_384, 131_072])
    args = parser.parse_args()
    pod, T = topology.parse(args.topology), CHUNK_SIZES[-1]
    config = replace(
        FAMILY[args.model], dtype="bfloat16", param_dtype="bfloat16", quantized=args.quantize,
        cache_dtype=args.cache,
    )  # fmt: skip
    mesh = serving_program.slice_mesh(config, pod)
    for slots in args.slots:
        programs = [
            serving_program.compile_step(replace(config, n_layers=depth), pod, mesh, 1, slots, T)
            for depth in DEPTHS
        ]
        weights, row_bytes = serving.weight_and_cache_bytes(config, mesh, slots)
        time = estimate_time(programs, config.n_layers, weights.layers + row_bytes, pod)
        temporary_gib = (programs[-1].peak_bytes - programs[-1].argument_bytes) / 2**30
        print(
            f"{T} tokens, {slots:,} slots: {time.estimate * 1e3:.1f} ms (network"
            f" {time.network * 1e3:.1f}, cycles {time.cycles * 1e3:.1f}), {temporary_gib:.2f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
