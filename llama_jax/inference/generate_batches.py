"""Continues many prompts in batches of equal shapes, on any mesh and any number of hosts."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.inference.generate import (
    NO_TOKEN,
    DecodeState,
    GeneratedTokens,
    Rows,
    decode,
    extend_cache,
    init_rows,
    prefill,
)
from llama_jax.inference.sampling import Sampling
from llama_jax.inference.stream import check_prompt
from llama_jax.model.weights import Llama, UnstackedLlama
from llama_jax.parallel.mesh import batch_shards, shard_array
from llama_jax.parallel.sharding import activation_spec
from llama_jax.runtime.program_store import stored_jit
from llama_jax.tokenizer.tokenizer import Tokenizer

# Of one shard of the batch. Decoding reads all weights once for all rows; the cache of so many
# slots takes 4 GB for 7B in bfloat16.
_MAX_ROWS, _MAX_SLOTS = 16, 8192
_BLOCK = 16  # tokens generated in one dispatch; stop strings are searched after each


class GenerateRequest(NamedTuple):
    """A prompt to continue.

    Attributes:
        tokens: ids of the prompt, at least one.
        max_new_tokens: the most tokens to generate.
        stops: texts, not empty; the row ends at the latest a block after the first of them.
        sampling: the sampling settings.
        seed: of the draws, uint32.
    """

    tokens: tuple[int, ...]
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    sampling: Sampling = Sampling()
    seed: int = 0


def generate_batches(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    tokenizer: Tokenizer,
    requests: Sequence[GenerateRequest],
) -> Iterator[tuple[int, list[int]]]:
    """Yields the index of each request and its generated tokens, as the requests end.

    An end id is the last token of its row; after a stop string, up to a block of tokens follows.
    Requests of similar length share a batch, the longest first, and few shapes are compiled. All
    hosts of the mesh call this with the same requests, and get the same tokens. A request gets the
    tokens that it gets alone.

    Args:
        config: the model's config.
        model: weights of that config, on a mesh that does not split sequences.
        tokenizer: the model's tokenizer.
        requests: in any order.

    Raises:
        InputError: a prompt is empty, contains an unknown id, or doesn't fit the model's context.
    """
    for request in requests:
        check_prompt(config, request.tokens, request.max_new_tokens)
    order = sorted(range(len(requests)), key=lambda i: (_slots(requests[i]), -i), reverse=True)
    while order:
        slots = _slots(requests[order[0]])
        similar = [i for i in order if 2 * _slots(requests[i]) > slots]
        order = order[len(similar) :]
        most = batch_shards() * _power_below(min(_MAX_ROWS, _MAX_SLOTS // slots))
        rows = batch_shards()
        while rows < min(most, len(similar)):
            rows *= 2
        batch = _Batch(config, model, tokenizer, rows, slots)
        pending = [(i, requests[i]) for i in similar]
        while pending or batch.running:
            if pending and batch.is_worth_filling(pending):
                n = batch.n_free
                batch.fill(pending[:n])
                pending = pending[n:]
            yield from batch.decode()


class _Batch:
    """Rows that generate; new requests take the place of rows that have ended.

    Attributes:
        running: of each row that generates: the index of its request, the request, and the tokens
            generated so far.
    """

    running: dict[int, tuple[int, GenerateRequest, list[int]]]

    def __init__(
        self,
        config: ModelConfig,
        model: Llama | UnstackedLlama,
        tokenizer: Tokenizer,
        rows: int,
        slots: int,
    ):
        self._config, self._model, self._tokenizer = config, model, tokenizer
        self._n_rows, self._slots, self.running = rows, slots, {}
        self._state: DecodeState | None = None  # before the first requests
        self._idle = 0  # tokens that free rows could have generated since the batch was filled

    @property
    def n_free(self) -> int:
        """Number of rows that generate nothing."""
        return self._n_rows - len(self.running)

    def is_worth_filling(self, pending: Sequence[tuple[int, GenerateRequest]]) -> bool:
        """Returns whether to fill the free rows now, or to let the others end first.

        Filling computes a prompt's length of tokens in every row, also in those that run. It waits
        until the free rows have been idle for as many tokens as that: in hindsight this costs at
        most twice as much as the better choice. It writes so many slots, too, which the running
        rows must have behind their tokens.
        """
        if not self.n_free:
            return False
        T = _padded_length(pending[: self.n_free])
        used = [len(request.tokens) + len(new) for _, request, new in self.running.values()]
        return self._idle >= T * len(used) and max(used, default=0) + T <= self._slots

    def fill(self, new: Sequence[tuple[int, GenerateRequest]]) -> None:
        """Starts requests, with their indices, in free rows."""
        free = [row for row in range(self._n_rows) if row not in self.running]
        placed = dict(zip(free, new, strict=False))
        tokens = np.zeros((self._n_rows, _padded_length(new)), np.int32)
        lengths = np.zeros(self._n_rows, np.int32)
        in_prompt = np.zeros((self._n_rows, self._config.vocab_size), bool)
        for row, (_, request) in placed.items():
            lengths[row] = len(request.tokens)
            tokens[row, : lengths[row]] = request.tokens
            in_prompt[row, [*request.tokens]] = True
        by_row = [placed.get(row, new[0])[1] for row in range(self._n_rows)]
        rows = init_rows(
            [r.sampling for r in by_row],
            [r.seed for r in by_row],
            [r.max_new_tokens for r in by_row],
            [sorted(self._tokenizer.end_ids)] * self._n_rows,
            in_prompt,
        )
        if self._state is None:
            lengths = np.maximum(lengths, 1)  # rows without a request compute a token for nobody
        prompts = shard_array(tokens, "BT"), shard_array(lengths, "B")
        if self._state is None:
            started = prefill(self._config, self._model, *prompts, slots=self._slots)
            self._state = DecodeState(*started, rows)
        else:
            self._state = _fill_rows(self._config, self._model, self._state, *prompts, rows)
        self.running |= {row: (*entry, []) for row, entry in placed.items()}
        self._idle = 0

    def decode(self) -> Iterator[tuple[int, list[int]]]:
        """Generates a block of tokens in each running row; yields the requests that ended."""
        assert self._state is not None
        remaining = np.zeros(self._n_rows, np.int32)
        for row, (_, request, generated) in self.running.items():
            remaining[row] = request.max_new_tokens - len(generated)
        # Rows with a stop string have ended here, and only here.
        rows = self._state.rows._replace(remaining_B=shard_array(remaining, "B"))
        state = self._state._replace(rows=rows)
        found: GeneratedTokens
        found, self._state = decode(self._config, self._model, state, _BLOCK, capacity=_BLOCK)
        block = np.asarray(found.tokens_Bn)
        for row, (i, request, generated) in [*self.running.items()]:
            new = block[row][block[row] != NO_TOKEN].tolist()
            generated += new
            if (
                len(generated) == request.max_new_tokens
                or not self._tokenizer.end_ids.isdisjoint(new)
                or _stops(self._tokenizer, request, generated)
            ):
                del self.running[row]
                yield i, generated
        self._idle += self.n_free * _BLOCK


@stored_jit(static_argnums=0, donate_argnums=2)
def _fill_rows(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    state: DecodeState,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    rows: Rows,
) -> DecodeState:
    """Returns the state with other prompts, and their `rows`, where `lengths_B` is not 0.

    The cache has T slots behind the tokens of every row: they are written in all rows.
    """
    is_new_B = lengths_B > 0
    used_B = jnp.where(is_new_B, 0, state.cache.used_B)
    cache, logits_BV = extend_cache(
        config, model, state.cache._replace(used_B=used_B), tokens_BT, lengths_B
    )

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(is_new_B.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    logits_BV = jax.reshard(logits_BV, activation_spec("BV"))
    new, old = (logits_BV, rows), (state.logits_BV, state.rows)
    return DecodeState(cache, *jax.tree.map(choose, new, old))


def _padded_length(requests: Sequence[tuple[int, GenerateRequest]]) -> int:
    """Returns the length to which the prompts of a batch are padded [tokens]."""
    return _round_up(max(len(request.tokens) for _, request in requests))


def _stops(tokenizer: Tokenizer, request: GenerateRequest, generated: Sequence[int]) -> bool:
    text = tokenizer.decode(generated) if request.stops else ""
    return any(stop in text for stop in request.stops)


def _slots(request: GenerateRequest) -> int:
    """Returns the slots of the KV cache: of the padded prompt, or of all tokens and one more."""
    n = len(request.tokens)
    return _round_up(max(_round_up(n), n + request.max_new_tokens + 1))


def _round_up(number: int) -> int:
    """Returns the next power of two or three quarters of one, at least 32: few sizes serve all."""
    power = 1 << max(5, int(number - 1).bit_length())
    return power * 3 // 4 if 32 <= number <= power * 3 // 4 else power


def _power_below(number: int) -> int:
    """Returns the largest power of two up to `number`, at least 1."""
    return 1 << max(0, number.bit_length() - 1)
