"""Compiles decoding or prefill for an H100 that is not here; prints what a layer reads and writes.

    pip install -e '.[gpu]'    # its compiler needs no GPU
    python benchmarks/gpu_program.py llama3.1-8b --batch 8 --slots 2048

XLA compiles the program, the Triton kernels too, down to machine code. A line for each attention
has the memory for temporaries, and the bytes that the operations of a layer read and write, as a
multiple of its weights and cache; the next lines name the largest operations. XLA chooses the
kernels of matrix products without measuring any.
"""

import argparse
import math
import re
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax

from llama_jax.checkpoint.tree import eval_shape_on_mesh
from llama_jax.config.family import FAMILY
from llama_jax.config.model import ModelConfig
from llama_jax.inference.generate import extend_cache
from llama_jax.plan import serving_program, topology
from llama_jax.plan.compiler import bytes_per_device
from llama_jax.plan.program_time import DEPTHS

_INSTRUCTION = re.compile(r"  (?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)")
_MOVES_NOTHING = ("parameter", "constant", "bitcast", "get-tuple-element", "tuple")


class Traffic(NamedTuple):
    """Bytes that each kind of operation of a program reads and writes, and of temporaries."""

    moved: dict[str, int]
    temporaries: int


def main() -> None:
    """Compiles the programs and prints their traffic."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=FAMILY)
    parser.add_argument("--quantize", choices=("none", "int8"), default="none")
    parser.add_argument("--cache", choices=("same", "int8"), default="same")
    parser.add_argument("--batch", type=int, default=8, help="rows (8)")
    parser.add_argument("--slots", type=int, default=2048, help="of each row, all in use (2048)")
    parser.add_argument("--tokens", type=int, default=1, help="new ones of each row (1: decoding)")
    args = parser.parse_args()
    mesh = serving_program.slice_mesh(FAMILY[args.model], topology.parse("h100:1"))
    for attention in ("auto", "xla"):
        config = replace(
            FAMILY[args.model], dtype="bfloat16", param_dtype="bfloat16", quantized=args.quantize,
            cache_dtype=args.cache, attention=attention,
        )  # fmt: skip
        fewer, more = (
            compile_for(replace(config, n_layers=depth), mesh, args.batch, args.slots, args.tokens)
            for depth in DEPTHS
        )
        layer = {name: size - fewer.moved.get(name, 0) for name, size in more.moved.items()}
        one = replace(config, n_layers=1)
        cache = serving_program.abstract_row_cache(one, mesh, args.slots).layers
        weights = serving_program.abstract_weights(one, mesh).layers
        least = bytes_per_device(weights) + args.batch * bytes_per_device(cache)
        moved = sum(layer.values())
        print(
            f"attention {attention}: {more.temporaries / 2**20:.1f} MiB of temporaries; a layer"
            f" reads and writes {moved / 1e6:.1f} MB, {moved / least:.2f} times its weights and"
            f" cache ({least / 1e6:.1f} MB)",
            flush=True,
        )
        for name in sorted(layer, key=lambda name: -layer[name])[:6]:
            print(f"    {layer[name] / 1e6:9.2f} MB  {name}")


def compile_for(
    config: ModelConfig, mesh: jax.sharding.Mesh, batch: int, slots: int, tokens: int
) -> Traffic:
    """Returns the traffic of a forward pass over the cache that an engine has."""
    model = serving_program.abstract_weights(config, mesh)
    with jax.set_mesh(mesh):
        cache = eval_shape_on_mesh(partial(serving_program.init_engine_cache, config, batch, slots))
        integers = partial(serving_program.abstract_integers, mesh)
        step = jax.jit(extend_cache, static_argnums=0, donate_argnums=2)
        lowered = step.lower(
            config, model, cache, integers("BT", batch, tokens), integers("B", batch)
        )
        program = lowered.compile(compiler_options={"xla_gpu_autotune_level": "0"})
    memory: Any = program.memory_analysis()
    return Traffic(_operation_bytes(program.as_text() or ""), memory.temp_size_in_bytes)


def _operation_bytes(hlo_text: str) -> dict[str, int]:
    """Returns the bytes of each kind of operation, of its operands and results.

    An operation that updates an array in place is counted without the array, and a lookup of
    embeddings without their table.
    """
    sizes: dict[str, list[int]] = {}
    found: dict[str, int] = {}
    for line in hlo_text[hlo_text.index("\nENTRY") :].splitlines():
        if (match := _INSTRUCTION.match(line)) is None:
            continue
        name, shapes, op, rest = match.groups()
        results = sizes[name] = _array_bytes(shapes)
        if op in _MOVES_NOTHING:
            continue
        operands = [sizes[operand] for operand in re.findall(r"%([\w.-]+)", rest.split("), ")[0])]
        kind = re.sub(r"[.\d]+$", "", name)
        moved = [size for arrays in (results, *operands) for size in arrays]
        if "scatter" in kind or "update_slice" in kind:
            moved = [size for size in moved if size < max(moved)]
        elif "gather" in kind:
            moved = [2 * size for size in results]
        found[kind] = found.get(kind, 0) + sum(moved)
    return found


def _array_bytes(text: str) -> list[int]:
    """Returns the bytes of each array in an HLO type."""
    arrays = re.findall(r"(pred|[a-z]+)(\d*)\[([\d,]*)\]", text)
    return [
        math.prod(int(n) for n in dims.split(",") if n) * int(bits or 8) // 8
        for _, bits, dims in arrays
    ]


if __name__ == "__main__":
    main()
