"""Many requests at a time: they join and leave one running batch.

A thread of its own goes round: it gives free rows to waiting requests, reads one chunk of one
prompt, and makes a few tokens in every row that is ready. So no running request waits longer than a
chunk for another's prompt. What a row has read stays in its slots when its request ends; a later
prompt that begins alike starts from there.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError
from llama_jax.inference.bandwidth import step_bytes
from llama_jax.inference.engine import row_programs
from llama_jax.inference.engine.requests import (
    EngineStopped,
    Event,
    GeneratedToken,
    PromptDone,
    QueueFull,
    Request,
    RequestEnded,
    Statistics,
    Ticket,
    check_request,
)
from llama_jax.inference.engine.warm_up import warm_up
from llama_jax.inference.generate import NO_TOKEN
from llama_jax.model.cache import copy_row, resize_cache
from llama_jax.model.weights import Llama, UnstackedLlama
from llama_jax.parallel.mesh import shard_array
from llama_jax.runtime.compile_cache import compile_statistics

_log = logging.getLogger(__name__)

DECODE_STEPS_DURING_PREFILL = 2  # when a prompt is to be read


class _Row:
    """A row of the batch: the tokens that its slots hold, and whose it is."""

    def __init__(self):
        self.tokens: list[int] = []
        self.ticket: Ticket | None = None
        self.ready = False  # its prompt has been read
        self.scores: list[
            GeneratedToken
        ] = []  # the prompt's but the first, where they are asked for
        self.since = 0.0  # when it was last given away


class Engine:
    """Continues many texts with one model.

    Args:
        config: of the model.
        model: weights of that config, on the current mesh.
        rows: texts that are continued at a time.
        context: longest prompt with its continuation [tokens]; default: the model's.
        queue: requests that may wait.
        progress: is called before each program is compiled, as `warm_up` says.

    Raises:
        InputError: a number is out of range.
    """

    def __init__(
        self,
        config: ModelConfig,
        model: Llama | UnstackedLlama,
        *,
        rows: int = 8,
        context: int | None = None,
        queue: int = 64,
        progress: Callable[[float, str], None] = lambda share, text: None,
    ):
        context = config.context if context is None else context
        if not 1 <= context <= config.context:
            raise InputError(
                f"a context of {context} tokens is outside of 1 … {config.context}, the model's:"
                " ask for one within"
            )
        if rows < 1 or queue < 0:
            raise InputError(f"{rows} rows and a queue of {queue}: at least 1 and 0 are needed")
        self.rows, self.context = rows, context
        self._config, self._model, self._queue = config, model, queue
        self._mesh = jax.sharding.get_mesh()
        self._sizes = row_programs.cache_sizes(context)
        self._rows = [_Row() for _ in range(rows)]
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()  # its lock is reentrant
        self._closing = False
        self._failure: str | None = None
        self._numbers = Statistics()
        begun = compile_statistics().seconds
        self._state = warm_up(config, model, rows, context, progress)
        self._numbers = self._numbers._replace(compile_seconds=compile_statistics().seconds - begun)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self, requests: Sequence[Request], deliver: Callable[[int, Event], None]
    ) -> list[Ticket]:
        """Puts all requests into the queue, or none.

        They are taken as long as the queue is not full, however many they are: so a group may
        be larger than the queue.

        Args:
            requests: what is to be continued.
            deliver: is called with a request's index and each of its events, mostly from the
                engine's thread; it must not block.

        Raises:
            QueueFull: too many wait already.
            EngineStopped: the engine has failed, or is closed.
            InputError: a request can't be served; the message says why.
        """
        for request in requests:
            check_request(self._config, self.context, request)
        tickets = [Ticket(r, partial(deliver, i), self._cancel) for i, r in enumerate(requests)]
        with self._changed:
            if self._failure is not None or self._closing:
                raise EngineStopped(self._failure)
            free = sum(row.ticket is None or row.ticket.cancelled for row in self._rows)
            if len(self._waiting) >= self._queue + free:
                raise QueueFull(f"{len(self._waiting)} requests are waiting: try again later")
            self._waiting += tickets
            self._changed.notify()
        return tickets

    def _cancel(self, ticket: Ticket) -> None:
        with self._changed:
            ticket.cancelled = True
            if ticket not in self._waiting:
                return
            self._waiting.remove(ticket)
            self._count(cancelled=1)
        ticket.deliver(RequestEnded("cancelled"))

    def statistics(self) -> Statistics:
        """Returns what it has done so far."""
        with self._changed:
            running = sum(row.ticket is not None for row in self._rows)
            return self._numbers._replace(waiting=len(self._waiting), running=running)

    @property
    def failure(self) -> str | None:
        """Why the engine has stopped by itself; None while it runs."""
        return self._failure

    def close(self) -> None:
        """Ends all requests, and the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            with jax.set_mesh(self._mesh):
                while self._wait_for_work():
                    self._iterate()
        except BaseException as error:  # not only Exception: whatever ends the thread, all are told
            self._failure = f"{type(error).__name__}: {str(error)[:200]}"
            _log.critical("the engine has failed", exc_info=True)
        with self._changed:
            self._closing = True
            left = [*self._waiting, *(row.ticket for row in self._rows if row.ticket)]
            self._waiting.clear()
        for ticket in left:
            ticket.deliver(
                RequestEnded("error", self._failure) if self._failure else RequestEnded("cancelled")
            )

    def _wait_for_work(self) -> bool:
        """Returns when there is something to do; False when it is to end."""
        with self._changed:
            while not (self._closing or self._waiting or any(row.ticket for row in self._rows)):
                self._changed.wait()
            return not self._closing

    def _iterate(self) -> None:
        for row in self._rows:
            if row.ticket is not None and row.ticket.cancelled:
                self._release(row, RequestEnded("cancelled"))
        self._admit()
        reading = [row for row in self._rows if row.ticket is not None and not row.ready]
        if reading:
            self._prefill_next_chunk(min(reading, key=lambda row: row.since))
        ready = [row for row in self._rows if row.ready]
        if ready:
            self._decode(
                ready, DECODE_STEPS_DURING_PREFILL if reading else row_programs.DECODE_STEPS
            )

    def _admit(self) -> None:
        """Gives free rows to those who wait, in their order."""
        while free := [row for row in self._rows if row.ticket is None]:
            with self._changed:
                if not self._waiting:
                    return
                ticket = self._waiting[0]
            # What is not read anew has no log-probabilities.
            known = () if ticket.request.prompt_logprobs else ticket.request.prompt
            row, source, common = self._choose_row(free, known)
            with self._changed:
                if ticket.cancelled:  # it has left the queue
                    continue
                # Always in the queue or in a row: a failure finds it there.
                self._waiting.popleft()
                row.ticket, row.ready, row.since = ticket, False, time.monotonic()
            if source is not row:
                numbers = self._rows.index(source), self._rows.index(row)
                cache = copy_row(self._state.cache, *numbers, common)
                self._state = self._state._replace(cache=cache)
            row.tokens = list(ticket.request.prompt[:common])
            row.scores = []
            self._count(reused_tokens=common)
            self._resize_cache()

    def _choose_row(self, free: list[_Row], prompt: Sequence[int]) -> tuple[_Row, _Row, int]:
        """Returns the row to give, the row that has read most of the prompt, and how much.

        One token at least is left to read: the first new one follows from it.
        """
        common = {
            row: row_programs.common_prefix_length(row.tokens, prompt[:-1]) for row in self._rows
        }
        source = max(self._rows, key=lambda row: (common[row], row in free))
        row = source if source in free and common[source] else min(free, key=lambda r: r.since)
        return row, source if common[source] else row, common[source]

    def _resize_cache(self) -> None:
        """Gives the cache the slots that the texts need, and no more than the next size."""
        tickets = [row.ticket.request for row in self._rows if row.ticket is not None]
        needed = max(row_programs.slots_needed(request) for request in tickets)
        slots = next(size for size in self._sizes if size >= needed)
        if slots == self._state.cache.slots:
            return
        cache = resize_cache(self._state.cache, slots=slots)
        used_B = jnp.minimum(cache.used_B, slots - 1)
        self._state = self._state._replace(cache=cache._replace(used_B=used_B))
        for row in self._rows:
            row.tokens = row.tokens[: slots - 1]

    def _prefill_next_chunk(self, row: _Row) -> None:
        """Reads one chunk of a prompt; with the last one the row is ready."""
        assert row.ticket is not None
        request, begun = row.ticket.request, time.perf_counter()
        used = len(row.tokens)
        rest = request.prompt[used:]
        size = next(
            (size for size in row_programs.CHUNK_SIZES if size >= len(rest)),
            row_programs.CHUNK_SIZES[-1],
        )
        chunk = np.zeros((2, size), np.int32)
        length = min(size, len(rest))
        for part, tokens in zip(chunk, (rest[:length], rest[1 : length + 1]), strict=True):
            part[: len(tokens)] = tokens
        number, with_logprobs = self._rows.index(row), request.prompt_logprobs
        tokens, targets = (shard_array(part[None], "BT") for part in chunk)
        self._state, scores = row_programs.prefill_chunk(
            self._config, self._model, self._state, number, tokens, length, used, targets,
            with_logprobs,
        )  # fmt: skip
        row.tokens += rest[:length]
        if with_logprobs:  # the token after the prompt's last one is not known yet
            scores_T = (np.asarray(x_1T)[0] for x_1T in scores)
            row.scores += row_programs.attach_logprobs(
                rest[1 : length + 1], *scores_T, top=request.top_logprobs
            )
        if length == len(rest):
            settings = row_programs.init_row(self._config, request)
            self._state = row_programs.start_row(self._state, number, settings)
            row.ready = True
            row.ticket.deliver(PromptDone(tuple(row.scores)))
        jax.block_until_ready(self._state.logits_BV)
        self._count(prompt_tokens=length, prefill_seconds=time.perf_counter() - begun)

    def _decode(self, ready: list[_Row], n: int) -> None:
        begun = time.perf_counter()
        requests = [row.ticket.request for row in ready if row.ticket is not None]
        told = any(request.logprobs for request in requests)
        made, self._state = row_programs.decode_rows(
            self._config, self._model, self._state, n, told
        )
        made = jax.tree.map(np.asarray, made)
        seconds = time.perf_counter() - begun
        total = steps = 0
        for row in ready:
            number = self._rows.index(row)
            ids = made.tokens_Bn[number]
            ids = ids[ids != NO_TOKEN].tolist()
            total, steps = total + len(ids), max(steps, len(ids))
            self._deliver(row, ids, [x[number] for x in made[1:]])
        self._count(
            made_tokens=total,
            decode_seconds=seconds,
            decode_steps=steps,
            bytes_read=steps * self._step_bytes(),
        )

    def _step_bytes(self) -> int:
        return step_bytes(self._config, self._model, self.rows, self._state.cache.slots)

    def _deliver(self, row: _Row, ids: list[int], told: list[np.ndarray]) -> None:
        ticket = row.ticket
        assert ticket is not None
        request = ticket.request
        row.tokens += ids
        for token in row_programs.attach_logprobs(ids, *told, top=request.top_logprobs):
            ticket.deliver(token)
        if ids and ids[-1] in request.end_ids:
            self._release(row, RequestEnded("stop"))
        elif len(row.tokens) == len(request.prompt) + request.max_new_tokens:
            self._release(row, RequestEnded("length"))

    def _release(self, row: _Row, ended: RequestEnded) -> None:
        """Ends a row's request; what its slots hold stays."""
        ticket = row.ticket
        assert ticket is not None
        if ended.reason == "cancelled":
            self._state = row_programs.stop_row(self._state, self._rows.index(row))
        with self._changed:
            row.ticket, row.ready = None, False
        self._count(**{"cancelled" if ended.reason == "cancelled" else "finished": 1})
        ticket.deliver(ended)

    def _count(self, **more: float) -> None:
        with self._changed:
            old = self._numbers._asdict()
            sums = {name: old[name] + value for name, value in more.items()}
            self._numbers = self._numbers._replace(**sums)
