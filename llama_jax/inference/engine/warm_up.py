"""Compiles all programs of an engine before its first request."""

from collections.abc import Callable

import jax
import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.inference.engine import prompt_scores, row_programs
from llama_jax.inference.engine.requests import Request
from llama_jax.inference.engine.slots import cache_sizes
from llama_jax.inference.generate import DecodeState
from llama_jax.inference.logit_limits import full_mask
from llama_jax.model.cache import copy_row, resize_cache
from llama_jax.model.weights import Llama, UnstackedLlama
from llama_jax.parallel.mesh import batch_shards, shard_array
from llama_jax.parallel.rows import number_rows


def n_programs(context: int) -> int:
    """Returns how many programs `warm_up` compiles for a context of `context` tokens."""
    per_size = len(row_programs.CHUNK_SIZES) + 2
    return len(prompt_scores.tree_lengths(context)) + len(cache_sizes(context)) * per_size


def warm_up(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    rows: int,
    context: int,
    progress: Callable[[float, str], None],
) -> DecodeState:
    """Runs every program of the engine once; returns an empty state of the smallest size.

    Args:
        config: the model's config.
        model: weights of that config, on the current mesh.
        rows: rows of the state.
        context: longest prompt with its continuation [tokens].
        progress: called before each compilation with the share of the programs that are compiled
            [0 … 1) and the next program ('5 of 12: decode, 2,048 slots').
    """
    first = number_rows([0], rows)
    sizes, total, done = cache_sizes(context), n_programs(context), 0

    def report(program: str) -> None:
        nonlocal done
        progress(done / total, f"{done + 1} of {total}: {program}")
        done += 1

    def warm_up_size(slots: int) -> DecodeState:
        state = row_programs.init_state(config, rows, slots)
        for size in row_programs.CHUNK_SIZES:
            report(f"prefill of {size} tokens, {slots:,} slots")
            tokens_CT = shard_array(np.zeros((batch_shards(), size), np.int32), "BT")
            zeros_C = shard_array(np.zeros(batch_shards(), np.int32), "B")
            args = first, tokens_CT, zeros_C, zeros_C, tokens_CT, False
            state, _ = row_programs.prefill_chunk(config, model, state, *args)
        report(f"decode, {slots:,} slots")
        state = row_programs.start_row(
            state, first, row_programs.init_row(config, Request((0,), 1))
        )
        mask_BW = full_mask(rows, config.vocab_size)
        _, mask_BW = row_programs.choose_tokens(state.rows, state.logits_BV, mask_BW)
        generated, state = row_programs.decode_rows(config, model, state, 1, False, mask_BW)
        jax.block_until_ready(generated)
        report(f"cache resize and copy, {slots:,} slots")
        for other in sizes:
            if other != slots:
                resize_cache(state.cache, slots=other)
        cache = copy_row(state.cache, first, first, 0)
        return row_programs.stop_row(state._replace(cache=cache), 0)

    for length in prompt_scores.tree_lengths(context):
        report(f"scores of {length:,} prompt tokens")
        prompt_scores.warm_up_trees(config, model, length)
    for slots in sizes[:0:-1]:
        warm_up_size(slots)
    return warm_up_size(sizes[0])
