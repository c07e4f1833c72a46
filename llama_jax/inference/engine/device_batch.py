"""The engine's batch on the devices: every program that an engine runs, called with host values.

On several hosts each has a part of the weights and of the KV cache, and all must run the same
programs in the same order. Host 0 has the requests and decides: it sends each call to the other
hosts, which repeat it in `follow`. The control channel carries the calls. So while there are no
requests, the other hosts wait for a message and not in a collective, which would time out.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError
from llama_jax.inference.bandwidth import step_bytes
from llama_jax.inference.engine import prompt_scores, row_programs
from llama_jax.inference.engine.page_pool import pool_pages
from llama_jax.inference.engine.requests import request_from_json
from llama_jax.inference.engine.rows import Chunk
from llama_jax.inference.engine.warm_up import warm_up
from llama_jax.inference.generate import GeneratedTokens
from llama_jax.inference.logit_limits import full_mask, masks_from_text
from llama_jax.model import cache
from llama_jax.model.weights import Llama, UnstackedLlama
from llama_jax.parallel.mesh import batch_shards, shard_array
from llama_jax.parallel.rows import number_rows
from llama_jax.runtime import hosts

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def _on_all_hosts(
    program: Callable[Concatenate["DeviceBatch", Parameters], Result],
) -> Callable[Concatenate["DeviceBatch", Parameters], Result]:
    """Makes a method that host 0 calls run on the other hosts too; its arguments are plain JSON."""

    @wraps(program)
    def run(batch: "DeviceBatch", *args: Parameters.args, **named: Parameters.kwargs) -> Result:
        if hosts.is_multi_host():
            hosts.broadcast_decision(lambda: [program.__name__, args, named])
        return program(batch, *args, **named)

    return run


class DeviceBatch:
    """The rows of an engine on the devices, and the programs that change them.

    Only host 0 calls the methods.

    Args:
        config: the model's config.
        model: weights of that config, on the current mesh.
        rows: of the batch.
        context: longest prompt with its continuation [tokens].
        progress: called before each compilation, see `warm_up`.
        cache_tokens: of the KV cache, see `pool_pages`.

    Attributes:
        copies: of the model; they have equally many, consecutive rows.
        pages: of the pool of each copy of the model; None: rows own their slots.
        page_slots: slots of a page.

    Raises:
        InputError: the rows can't be shared by the copies of the model, or the cache is too small.
    """

    def __init__(
        self,
        config: ModelConfig,
        model: Llama | UnstackedLlama,
        rows: int,
        context: int,
        progress: Callable[[float, str], None],
        cache_tokens: int | None = None,
    ):
        check_rows(rows)
        self.copies = batch_shards()
        self.pages = pool_pages(config, rows, context, cache_tokens)
        self.page_slots = cache.page_slots(config)
        self._config, self._model, self._rows = config, model, rows
        self._full_mask_BW = full_mask(rows, config.vocab_size)
        self._state = warm_up(config, model, rows, context, progress, self.pages)
        self._pages_of_rows = [[] for _ in range(rows)]

    @property
    def slots(self) -> int:
        """Number of slots in each row [tokens]."""
        return self._state.cache.slots

    def step_bytes(self, slots: int) -> int:
        """Returns the bytes that a decode step reads, with `slots` slots of each row."""
        paged = self.pages is not None
        return step_bytes(self._config, self._model, self._rows, slots, paged=paged)

    @_on_all_hosts
    def score(
        self, trees: Sequence[Sequence[Sequence[int]]], length: int
    ) -> list[tuple[np.ndarray, ...]]:
        """Returns the results of `prompt_scores.score_trees`."""
        return prompt_scores.score_trees(self._config, self._model, trees, length)

    @_on_all_hosts
    def copy_row(self, source: int, target: int, used: int) -> None:
        """Copies the slots of a row to another row, which then has `used` tokens."""
        rows = (number_rows([row], self._rows) for row in (source, target))
        copied = cache.copy_row(self._state.cache, *rows, used)
        self._state = self._state._replace(cache=copied)

    @_on_all_hosts
    def resize(self, slots: int) -> None:
        """Changes the number of slots in each row."""
        resized = cache.resize_cache(self._state.cache, slots=slots)
        used_B = jnp.minimum(resized.used_B, slots - 1)
        self._state = self._state._replace(cache=resized._replace(used_B=used_B))

    @_on_all_hosts
    def set_pages(self, row: int, pages: Sequence[int]) -> None:
        """Sets the pages of a row that is not active, in the pool of its copy of the model."""
        kv_cache = self._state.cache
        assert kv_cache.pages_BP is not None
        self._pages_of_rows[row] = [*pages]
        pages_BP = np.zeros(kv_cache.pages_BP.shape, np.int32)
        for row_pages, numbers in zip(pages_BP, self._pages_of_rows, strict=True):
            row_pages[: len(numbers)] = numbers
        kv_cache = kv_cache._replace(pages_BP=shard_array(pages_BP, "BS"))
        self._state = self._state._replace(cache=kv_cache)

    @_on_all_hosts
    def prefill(
        self, chunks: Sequence[Chunk], size: int, slots: int | None, with_logprobs: bool
    ) -> list[list[np.ndarray]]:
        """Prefills the chunks, and waits until they are computed.

        Args:
            chunks: at most one in each copy of the model.
            size: tokens of the program; the chunks are padded to this length.
            slots: slots to which the program attends, see `next_chunks`.
            with_logprobs: whether to compute log-probabilities.

        Returns:
            The results of `row_programs.prefill_chunk` for each chunk.
        """
        per_copy = self._rows // self.copies
        tokens_CT, targets_CT = np.zeros((2, self.copies, size), np.int32)
        lengths_C, used_C = np.zeros((2, self.copies), np.int32)
        for row, tokens, targets, used in chunks:
            copy = row // per_copy
            tokens_CT[copy, : len(tokens)], targets_CT[copy, : len(targets)] = tokens, targets
            lengths_C[copy], used_C[copy] = len(tokens), used
        rows = [row for row, *_ in chunks]
        self._state, logprobs = row_programs.prefill_chunk(
            self._config, self._model, self._state, number_rows(rows, self._rows),
            shard_array(tokens_CT, "BT"), shard_array(lengths_C, "B"), shard_array(used_C, "B"),
            shard_array(targets_CT, "BT"), with_logprobs, slots,
        )  # fmt: skip
        jax.block_until_ready(self._state.logits_BV)
        arrays = [np.asarray(x_CT_) for x_CT_ in logprobs]
        return [[x_CT_[row // per_copy] for x_CT_ in arrays] for row in rows]

    @_on_all_hosts
    def start(self, row: int, request: dict[str, Any]) -> None:
        """Makes a row whose prompt is prefilled generate tokens.

        Args:
            row: number of the row.
            request: result of `request_to_json`.
        """
        settings = row_programs.init_row(self._config, request_from_json(request))
        number = number_rows([row], self._rows)
        self._state = row_programs.start_row(self._state, number, settings)

    @_on_all_hosts
    def stop(self, row: int) -> None:
        """Makes a row generate no more tokens."""
        self._state = row_programs.stop_row(self._state, row)

    @_on_all_hosts
    def decode(self, n: int, with_logprobs: bool) -> tuple[np.ndarray, ...]:
        """Decodes up to `n` tokens in each row that generates; returns `GeneratedTokens`."""
        generated, self._state = row_programs.decode_rows(
            self._config, self._model, self._state, n, with_logprobs, self._full_mask_BW
        )
        return tuple(np.asarray(x_Bn_) for x_Bn_ in generated)

    @_on_all_hosts
    def decode_constrained(
        self, masks: Sequence[str], with_logprobs: bool
    ) -> tuple[np.ndarray, GeneratedTokens]:
        """Starts to decode one token in each row that generates.

        Args:
            masks: results of `mask_to_text`, one for each row; '' allows all tokens.
            with_logprobs: whether to compute log-probabilities.

        Returns:
            The tokens [B], as soon as they are chosen, and the result, which the devices still
            compute.
        """
        mask_BW = shard_array(masks_from_text(masks, self._config.vocab_size), "BS")
        state = self._state
        tokens_B, mask_BW = row_programs.choose_tokens(state.rows, state.logits_BV, mask_BW)
        generated, self._state = row_programs.decode_rows(
            self._config, self._model, state, 1, with_logprobs, mask_BW
        )
        return np.asarray(tokens_B), generated


def check_rows(rows: int) -> None:
    """Checks that the copies of the model on the current mesh can have equally many rows.

    Raises:
        InputError: they can't.
    """
    copies = batch_shards()
    if rows % copies:
        raise InputError(
            f"{rows} rows can't be shared equally by {copies} copies of the model: ask for a"
            f" multiple of {copies}"
        )


def end_following() -> None:
    """Makes `follow` return on the other hosts."""
    hosts.broadcast_decision(lambda: None)


def follow(batch: DeviceBatch) -> None:
    """Repeats the calls of host 0 on another host, until `end_following`."""
    call: Any
    while (call := hosts.broadcast_decision(lambda: None)) is not None:
        name, args, named = call
        getattr(DeviceBatch, name).__wrapped__(batch, *args, **named)
