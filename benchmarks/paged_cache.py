"""Compares decode steps over a KV cache in pages with steps over slots, in alternating pairs.

    python benchmarks/paged_cache.py models/smollm2-135m --slots 512
    python benchmarks/paged_cache.py models/smollm2-135m --slots 512 --check

Prints the median time of a step in each layout, and the median ratios of the pairs: of the time,
and of the process's CPU time, which depends less on other programs. On a TPU a kernel reads the
pages, on most GPUs too, on a CPU a loop. --check compares the logits of this kernel with those of
XLA's attention instead: of a prompt in chunks and of decode steps after it.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.inference.generate import extend_cache
from llama_jax.inference.load import load
from llama_jax.model.cache import KVCache, init_cache, init_paged_cache, page_slots
from llama_jax.model.weights import UnstackedLlama
from llama_jax.parallel.mesh import shard_array

CHUNK = 128  # tokens of a prompt that are prefilled at once


def main() -> None:
    """Measures the batches and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="model folder or run folder")
    parser.add_argument("--slots", type=int, default=512, help="of each row (512)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="rows (1 8)")
    parser.add_argument("--pairs", type=int, default=10, help="of steps, alternating (10)")
    parser.add_argument("--check", action="store_true", help="compare the kernel with XLA")
    args = parser.parse_args()
    config, model = load(args.folder)
    if args.check:
        check(config, model, args.batch[-1], args.slots)
        return
    for batch in args.batch:
        caches = [make(config, batch, args.slots) for make in (init_slots, init_pages)]
        step = jax.jit(partial(extend_cache, config), donate_argnums=1)
        tokens_B1 = shard_array(np.ones((batch, 1), np.int32), "BT")
        lengths_B = shard_array(np.ones(batch, np.int32), "B")
        seconds: list[list[float]] = [[], []]
        cpu_seconds: list[list[float]] = [[], []]
        for _ in range(args.pairs + 1):
            for layout, cache in enumerate(caches):
                start, cpu_start = time.perf_counter(), time.process_time()
                caches[layout], logits_BV = step(model, cache, tokens_B1, lengths_B)
                jax.block_until_ready(logits_BV)
                seconds[layout].append(time.perf_counter() - start)
                cpu_seconds[layout].append(time.process_time() - cpu_start)
        slots, pages = (times[1:] for times in seconds)  # the first step compiles
        print(
            f"batch {batch}, {args.slots} slots, {config.dtype}: slots"
            f" {statistics.median(slots) * 1e3:.2f} ms, pages {statistics.median(pages) * 1e3:.2f}"
            f" ms, pages/slots {median_ratio(slots, pages):.2f}, of CPU time"
            f" {median_ratio(*(times[1:] for times in cpu_seconds)):.2f}",
            flush=True,
        )


def check(config: ModelConfig, model: UnstackedLlama, batch: int, slots: int) -> None:
    """Prints the largest difference of the logits; exits with 1 if it is not one of rounding."""
    rng, half = np.random.default_rng(0), slots // 2 // CHUNK * CHUNK
    pieces = [rng.integers(3, config.vocab_size, (batch, CHUNK)) for _ in range(half // CHUNK)]
    pieces += [rng.integers(3, config.vocab_size, (batch, 1)) for _ in range(16)]

    def logits(attention: str, dtype: str) -> np.ndarray:
        chosen, found = replace(config, attention=attention, dtype=dtype), []
        cache = init_pages(chosen, batch, slots)._replace(
            used_B=shard_array(np.zeros(batch, "i4"), "B")
        )
        step = jax.jit(partial(extend_cache, chosen), donate_argnums=1)
        for tokens_BT in pieces:
            lengths_B = shard_array(np.full(batch, tokens_BT.shape[1], np.int32), "B")
            cache, logits_BV = step(
                model, cache, shard_array(tokens_BT.astype(np.int32), "BT"), lengths_B
            )
            found.append(np.asarray(logits_BV))
        return np.stack(found)

    with jax.default_matmul_precision("highest"):
        exact = logits("xla", "float32")
    kernel, xla = logits("auto", config.dtype), logits("xla", config.dtype)
    # In bfloat16 the unit is XLA's own error. In float32 both are sums of up to 10⁴ terms.
    unit = max(np.abs(xla - exact).max() * 3, np.abs(exact).max() * 1e-5)
    error = np.abs(kernel - xla).max()
    print(
        f"batch {batch}, {half} + 16 tokens, {config.dtype}: logits of the kernel and of XLA's"
        f" attention differ by at most {error:.2e} of {np.abs(exact).max():.1f}; allowed are"
        f" {unit:.2e}"
    )
    sys.exit(int(not error <= unit))


def median_ratio(slots: list[float], pages: list[float]) -> float:
    """Returns the median of the ratios of the pairs, pages to slots."""
    return statistics.median(p / s for s, p in zip(slots, pages, strict=True))


def init_slots(config: ModelConfig, batch: int, slots: int) -> KVCache:
    """Returns a cache whose rows own their slots, half of them in use."""
    cache = jax.jit(init_cache, static_argnums=(0, 1, 2))(config, batch, slots)
    return cache._replace(used_B=jnp.full_like(cache.used_B, slots // 2))


def init_pages(config: ModelConfig, batch: int, slots: int) -> KVCache:
    """Returns a cache in pages, half of whose slots are in use."""
    row_pages = slots // page_slots(config)
    sizes = batch, 1 + batch * row_pages, row_pages
    cache = jax.jit(init_paged_cache, static_argnums=(0, 1, 2, 3))(config, *sizes)
    pages_BP = np.arange(1, 1 + batch * row_pages, dtype=np.int32).reshape(batch, row_pages)
    used_B = jnp.full_like(cache.used_B, slots // 2)
    return cache._replace(used_B=used_B, pages_BP=shard_array(pages_BP, "BS"))


if __name__ == "__main__":
    main()
