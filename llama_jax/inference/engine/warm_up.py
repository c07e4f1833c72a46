"""Compiles all programs of an engine before its first request."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.inference.engine import prompt_scores, row_programs
from llama_jax.inference.engine.requests import Request
from llama_jax.inference.engine.row_programs import CHUNK_SIZES, cache_sizes
from llama_jax.inference.generate import DecodeState, decode
from llama_jax.inference.logit_limits import full_mask
from llama_jax.model.cache import copy_row, resize_cache
from llama_jax.model.weights import Llama, UnstackedLlama
from llama_jax.parallel.mesh import batch_shards, platform, shard_array
from llama_jax.parallel.rows import number_rows
from llama_jax.runtime.program_store import is_storing, prepare_in_background


def n_programs(context: int, paged: bool) -> int:
    """Returns how many programs `warm_up` waits for, with a context of `context` tokens."""
    sizes, prefills = len(cache_sizes(context)), len(CHUNK_SIZES)
    smallest = prefills + (1 if paged else 2)
    if is_storing():
        return smallest
    others = prefills if paged else smallest
    return len(prompt_scores.tree_lengths(context)) + smallest + (sizes - 1) * others


def warm_up(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    rows: int,
    context: int,
    progress: Callable[[float, str], None],
    pages: int | None = None,
) -> DecodeState:
    """Compiles every program of the engine; returns an empty state of the smallest size.

    Runs each program once. In a block of `stored_programs` it only reads or compiles the programs
    of the smallest size, and a thread does so for the other sizes while the engine serves. On a GPU
    or TPU it also runs the programs of the smallest size, so that too little memory ends the start.
    A cache in pages has one size; prefill has a program for each number of slots to which it may
    attend.

    Args:
        config: the model's config.
        model: weights of that config, on the current mesh.
        rows: rows of the state.
        context: longest prompt with its continuation [tokens].
        progress: called before each compilation with the share of the programs that are compiled
            [0 … 1) and the next program ('5 of 12: decode, 2,048 slots').
        pages: of the pool of each copy of the model; None: rows own their slots.
    """
    first, paged = number_rows([0], rows), pages is not None
    sizes, total, done = cache_sizes(context), n_programs(context, paged), 0

    def report(program: str) -> None:
        nonlocal done
        progress(done / total, f"{done + 1} of {total}: {program}")
        done += 1

    def init(slots: int) -> DecodeState:
        return row_programs.init_state(config, rows, sizes[-1] if paged else slots, pages)

    def run_prefill(state: DecodeState, slots: int) -> DecodeState:
        for size in CHUNK_SIZES:
            report(f"prefill of {size} tokens, {slots:,} slots")
            args = _chunk_arguments(rows, size, slots if paged else None)
            state, _ = row_programs.prefill_chunk(config, model, state, *args)
        return state

    def run_size(slots: int) -> DecodeState:
        state = run_prefill(init(slots), slots)
        report(_decode_name(slots, pages))
        row = row_programs.init_row(config, Request((0,), 1))
        state = row_programs.start_row(state, first, row)
        mask_BW = full_mask(rows, config.vocab_size)
        _, mask_BW = row_programs.choose_tokens(state.rows, state.logits_BV, mask_BW)
        generated, state = row_programs.decode_rows(config, model, state, 1, False, mask_BW)
        jax.block_until_ready(generated)
        if not paged:
            report(f"cache resize and copy, {slots:,} slots")
            for other in sizes:
                if other != slots:
                    resize_cache(state.cache, slots=other)
            state = state._replace(cache=copy_row(state.cache, first, first, 0))
        return row_programs.stop_row(state, 0)

    def prepare_others() -> None:
        for length in lengths:
            prompt_scores.prepare_trees(config, model, length)
        for slots in sizes[1:]:
            if paged:
                _prepare_prefill(config, model, like, slots, slots, lambda program: None)
            else:
                _prepare_size(config, model, like, slots, sizes, lambda program: None)

    lengths = prompt_scores.tree_lengths(context)
    if is_storing():
        if platform() != "cpu":
            # A cache that doesn't fit the memory must end the start, not a later request.
            jax.block_until_ready(init(sizes[-1]))
            state = run_size(sizes[0])
        else:  # running the programs would take longer than reading them
            state = init(sizes[0])
            if paged:
                _prepare_prefill(config, model, state, sizes[0], sizes[0], report)
                report(_decode_name(sizes[0], pages))
                _prepare_decode(config, model, state)
            else:
                _prepare_size(config, model, state, sizes[0], sizes, report)
        like = jax.tree.map(_abstract, state)
        prepare_in_background(prepare_others)
        return state
    for length in lengths:
        report(f"scores of {length:,} prompt tokens")
        prompt_scores.warm_up_trees(config, model, length)
    if paged:
        state = init(sizes[-1])
        for slots in sizes[:0:-1]:
            state = run_prefill(state, slots)
        del state
        return run_size(sizes[0])
    for slots in sizes[:0:-1]:
        run_size(slots)
    return run_size(sizes[0])


def _prepare_size(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    smallest: DecodeState,
    slots: int,
    sizes: list[int],
    report: Callable[[str], None],
) -> None:
    """Reads or compiles the programs of one size without running them: no cache is allocated.

    Args:
        config: the model's config.
        model: weights of that config, on the current mesh.
        smallest: state of the smallest size, which may be abstract.
        slots: of each row.
        sizes: all numbers of slots.
        report: called with the name of each program before it.
    """

    def resize(leaf: Any) -> jax.ShapeDtypeStruct:
        return _abstract(leaf).update(shape=(*leaf.shape[:2], slots, *leaf.shape[3:]))

    cache = smallest.cache._replace(layers=jax.tree.map(resize, smallest.cache.layers))
    state: Any = smallest._replace(cache=cache)
    _prepare_prefill(config, model, state, slots, None, report)
    report(_decode_name(slots, None))
    _prepare_decode(config, model, state)
    first = number_rows([0], len(state.logits_BV))
    report(f"cache resize and copy, {slots:,} slots")
    copy_row.prepare(cache, first, first, 0)
    for other in sizes:
        if other != slots:
            resize_cache.prepare(cache, slots=other)


def _prepare_prefill(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    state: DecodeState,
    slots: int,
    attended: int | None,
    report: Callable[[str], None],
) -> None:
    """Reads or compiles the programs that prefill; `attended` is the `slots` of `prefill_chunk`."""
    for size in CHUNK_SIZES:
        report(f"prefill of {size} tokens, {slots:,} slots")
        args = _chunk_arguments(len(state.logits_BV), size, attended)
        row_programs.prefill_chunk.prepare(config, model, state, *args)


def _prepare_decode(config: ModelConfig, model: Llama | UnstackedLlama, state: DecodeState) -> None:
    """Reads or compiles the programs that start, decode and stop rows."""
    rows = len(state.logits_BV)
    first, row = number_rows([0], rows), row_programs.init_row(config, Request((0,), 1))
    row_programs.start_row.prepare(state, first, row)
    row_programs.stop_row.prepare(state, 0)
    mask_BW = full_mask(rows, config.vocab_size)
    row_programs.choose_tokens.prepare(state.rows, state.logits_BV, mask_BW)
    keywords = row_programs.decode_rows.keywords
    decode.prepare(config, model, state, 1, False, mask_BW, **keywords)


def _decode_name(slots: int, pages: int | None) -> str:
    return f"decode, {slots:,} slots" if pages is None else f"decode, {pages:,} pages"


def _chunk_arguments(rows: int, size: int, attended: int | None) -> tuple[Any, ...]:
    """Returns the arguments of `prefill_chunk` after the state, for `size` tokens of row 0."""
    C = batch_shards()
    tokens_CT = shard_array(np.zeros((C, size), np.int32), "BT")
    zeros_C = shard_array(np.zeros(C, np.int32), "B")
    return number_rows([0], rows), tokens_CT, zeros_C, zeros_C, tokens_CT, False, attended


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    return jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=leaf.sharding, weak_type=leaf.aval.weak_type
    )
