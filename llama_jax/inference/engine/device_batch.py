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
from llama_jax.inference.bandwidth import step_bytes
from llama_jax.inference.engine import prompt_scores, row_programs
from llama_jax.inference.engine.requests import request_from_json
from llama_jax.inference.engine.warm_up import warm_up
from llama_jax.inference.generate import GeneratedTokens
from llama_jax.inference.logit_limits import full_mask, masks_from_text
from llama_jax.model import cache
from llama_jax.model.weights import Llama, UnstackedLlama
from llama_jax.parallel.mesh import shard_array
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
    """

    def __init__(
        self,
        config: ModelConfig,
        model: Llama | UnstackedLlama,
        rows: int,
        context: int,
        progress: Callable[[float, str], None],
    ):
        self._config, self._model, self._rows = config, model, rows
        self._full_mask_BW = full_mask(rows, config.vocab_size)
        self._state = warm_up(config, model, rows, context, progress)

    @property
    def slots(self) -> int:
        """Number of slots in each row [tokens]."""
        return self._state.cache.slots

    def step_bytes(self) -> int:
        """Returns the bytes that a decode step reads."""
        return step_bytes(self._config, self._model, self._rows, self.slots)

    @_on_all_hosts
    def score(self, columns: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, ...]:
        """Returns the results of `prompt_scores.score_row`."""
        return prompt_scores.score_row(self._config, self._model, columns, length)

    @_on_all_hosts
    def copy_row(self, source: int, target: int, used: int) -> None:
        """Copies the slots of a row to another row, which then has `used` tokens."""
        copied = cache.copy_row(self._state.cache, source, target, used)
        self._state = self._state._replace(cache=copied)

    @_on_all_hosts
    def resize(self, slots: int) -> None:
        """Changes the number of slots in each row."""
        resized = cache.resize_cache(self._state.cache, slots=slots)
        used_B = jnp.minimum(resized.used_B, slots - 1)
        self._state = self._state._replace(cache=resized._replace(used_B=used_B))

    @_on_all_hosts
    def prefill(
        self, row: int, tokens: Sequence[int], targets: Sequence[int], used: int, size: int,
        with_logprobs: bool,
    ) -> list[np.ndarray]:  # fmt: skip
        """Prefills one chunk of a prompt into a row, and waits until it is computed.

        Args:
            row: number of the row, which has `used` tokens.
            tokens: the next tokens of its prompt.
            targets: the token after each, as far as the prompt goes.
            used: tokens in the row.
            size: tokens of the program, which is padded to it.
            with_logprobs: whether to compute log-probabilities.

        Returns:
            With log-probabilities the results of `row_programs.prefill_chunk`, without B.
        """
        chunk = np.zeros((2, 1, size), np.int32)
        for padded, ids in zip(chunk, (tokens, targets), strict=True):
            padded[0, : len(ids)] = ids
        tokens_1T, targets_1T = (shard_array(padded, "BT") for padded in chunk)
        self._state, logprobs = row_programs.prefill_chunk(
            self._config, self._model, self._state, row, tokens_1T, len(tokens), used, targets_1T,
            with_logprobs,
        )  # fmt: skip
        jax.block_until_ready(self._state.logits_BV)
        return [np.asarray(x_1T)[0] for x_1T in logprobs] if with_logprobs else []

    @_on_all_hosts
    def start(self, row: int, request: dict[str, Any]) -> None:
        """Makes a row generate tokens, whose prompt is prefilled.

        Args:
            row: number of the row.
            request: of `request_to_json`.
        """
        settings = row_programs.init_row(self._config, request_from_json(request))
        self._state = row_programs.start_row(self._state, row, settings)

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
            masks: of `mask_to_text`, one for each row; '' allows all tokens.
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


def end_following() -> None:
    """Makes `follow` return on the other hosts."""
    hosts.broadcast_decision(lambda: None)


def follow(batch: DeviceBatch) -> None:
    """Repeats the calls of host 0 on another host, until `end_following`."""
    call: Any
    while (call := hosts.broadcast_decision(lambda: None)) is not None:
        name, args, named = call
        getattr(DeviceBatch, name).__wrapped__(batch, *args, **named)
