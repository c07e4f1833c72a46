"""Continuous batching: requests join and leave one running batch.

The engine's thread repeats one iteration: score one prefix tree of prompts, assign free rows to
waiting requests, prefill one chunk of one prompt, and decode a few tokens in every row whose prompt
is prefilled. So a running request waits at most one tree and one chunk for the prompts of other
requests. Keys and values stay in the cache when their request ends; a later prompt with a common
prefix reuses them (`slots.RowSlots`, or `pages.PagedRows`).

On several hosts host 0 has the engine, and `device_batch.follow` runs on the others.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError
from llama_jax.inference.engine import constrained, prompt_scores, row_programs
from llama_jax.inference.engine.device_batch import DeviceBatch, end_following
from llama_jax.inference.engine.pages import PagedRows
from llama_jax.inference.engine.requests import (
    EngineStopped,
    Event,
    PromptDone,
    QueueFull,
    Request,
    RequestEnded,
    Statistics,
    Ticket,
    check_request,
    request_to_json,
)
from llama_jax.inference.engine.rows import Row, next_chunks
from llama_jax.inference.engine.slots import RowSlots
from llama_jax.inference.generate import NO_TOKEN
from llama_jax.model.weights import Llama, UnstackedLlama
from llama_jax.runtime import hosts
from llama_jax.runtime.compile_cache import compile_statistics

_log = logging.getLogger(__name__)

DECODE_STEPS_DURING_PREFILL = 2  # of one dispatch, while a prompt waits for its prefill


class Engine:
    """Continues many texts at the same time with one model.

    Args:
        config: the model's config.
        model: weights of that config, on the current mesh.
        rows: texts that the engine continues at the same time.
        context: longest prompt with its continuation [tokens]; default: the model's context.
        queue: requests that may wait.
        progress: called before each compilation, see `warm_up`.
        cache_tokens: of the KV cache, see `page_pool.pool_pages`.

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
        cache_tokens: int | None = None,
    ):
        context = config.context if context is None else context
        if not 1 <= context <= config.context:
            raise InputError(
                f"a context of {context} tokens is outside of the model's 1 … {config.context}:"
                " ask for one in this range"
            )
        if rows < 1 or queue < 0:
            raise InputError(
                f"{rows} rows and a queue of {queue}: ask for at least 1 row, and for a queue of at"
                " least 0"
            )
        self.rows, self.context = rows, context
        self._config, self._queue = config, queue
        self._mesh = jax.sharding.get_mesh()
        self._rows = [Row() for _ in range(rows)]
        self._waiting: deque[Ticket] = deque()
        self._trees: list[prompt_scores.Tree] = []  # prompts of waiting requests
        self._changed = threading.Condition()  # with a reentrant lock
        self._closing = False
        self._failure: str | None = None
        self._statistics = Statistics()
        before = compile_statistics().seconds
        self._batch = DeviceBatch(config, model, rows, context, progress, cache_tokens)
        storage = RowSlots if self._batch.pages is None else PagedRows
        self._storage = storage(self._batch, self._rows, context)
        seconds = compile_statistics().seconds - before
        self._statistics = self._statistics._replace(compile_seconds=seconds)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self, requests: Sequence[Request], deliver: Callable[[int, Event], None]
    ) -> list[Ticket]:
        """Puts all requests into the queue, or none of them.

        A queue that is not full takes any number of requests, so that a group may be larger than
        the queue.

        Args:
            requests: the requests.
            deliver: called with the index of a request and each of its events, mostly from the
                engine's thread; it must not block.

        Raises:
            QueueFull: too many requests are waiting.
            EngineStopped: the engine has failed, or is closed.
            InputError: the engine can't serve a request; the message gives the reason.
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
        """Returns the counts so far and the current load."""
        with self._changed:
            running = sum(row.ticket is not None for row in self._rows)
            return self._statistics._replace(waiting=len(self._waiting), running=running)

    @property
    def failure(self) -> str | None:
        """The error that ended the engine; None if there was none."""
        return self._failure

    def close(self) -> None:
        """Ends all requests and the engine's thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        failure = None
        try:
            with jax.set_mesh(self._mesh):
                while self._wait_for_work():
                    self._iterate()
            end_following()
        except BaseException as error:  # also SystemExit: every request must get its last event
            failure = error
            self._failure = f"{type(error).__name__}: {str(error)[:200]}"
            _log.critical("the engine has failed", exc_info=True)
        with self._changed:
            self._closing = True
            unfinished = [*self._waiting, *(row.ticket for row in self._rows if row.ticket)]
            self._waiting.clear()
        ended = RequestEnded("error", self._failure) if self._failure else RequestEnded("cancelled")
        for ticket in unfinished:
            ticket.deliver(ended)
        if failure is not None and hosts.is_multi_host():
            hosts.fail(failure)  # the other hosts would wait for this one

    def _wait_for_work(self) -> bool:
        """Waits until there is a request; returns False if the engine is closing."""
        with self._changed:
            while not (self._closing or self._waiting or any(row.ticket for row in self._rows)):
                self._changed.wait()
            return not self._closing

    def _iterate(self) -> None:
        """Scores a tree, assigns rows, prefills a chunk of the oldest prompt, decodes the rest."""
        for row in self._rows:
            if row.ticket is not None and row.ticket.cancelled:
                self._release(row, RequestEnded("cancelled"))
        self._score_next_trees()
        self._admit()
        prefilling = any(row.ticket is not None and not row.ready for row in self._rows)
        if prefilling:
            self._prefill_next_chunks()
        ready = [row for row in self._rows if row.ready]
        if ready:
            n = DECODE_STEPS_DURING_PREFILL if prefilling else row_programs.DECODE_STEPS
            self._decode(ready, n)

    def _score_next_trees(self) -> None:
        """Scores a prefix tree of prompts on each copy of the model, and ends their requests."""
        self._trees = [tree for tree in self._trees if not all(t.cancelled for t in tree.tickets)]
        if not self._trees:
            with self._changed:
                tickets = [t for t in self._waiting if prompt_scores.is_score(t.request)]
            self._trees = prompt_scores.pack_trees(tickets)
        if not self._trees:
            return
        start = time.perf_counter()
        trees, length = prompt_scores.take_trees(self._trees, self._batch.copies)
        computed = self._batch.score([tree.row[:5] for tree in trees], length)
        n_tokens = sum(len(tree.row.tokens) for tree in trees)
        self._count(prompt_tokens=n_tokens, prefill_seconds=time.perf_counter() - start)
        for tree, arrays in zip(trees, computed, strict=True):
            self._end_scored(tree, prompt_scores.score_events(tree, arrays))

    def _end_scored(self, tree: prompt_scores.Tree, events: list[list[Event]]) -> None:
        """Ends the requests of a tree that is scored."""
        for ticket, events_of_ticket in zip(tree.tickets, events, strict=True):
            with self._changed:
                if ticket.cancelled:  # it has already left the queue
                    continue
                self._waiting.remove(ticket)
            self._count(finished=1, generated_tokens=1)
            for event in events_of_ticket:
                ticket.deliver(event)

    def _admit(self) -> None:
        """Assigns free rows to waiting requests, first in, first out."""
        while True:
            with self._changed:
                generating = (t for t in self._waiting if not prompt_scores.is_score(t.request))
                ticket = next(generating, None)
            if ticket is None:
                return
            # Only prefilled tokens get prompt log-probabilities: if requested, nothing is reused.
            request = ticket.request
            reusable = () if request.prompt_logprobs else request.prompt
            free_row = self._storage.find(reusable, request)
            if free_row is None:
                return
            row = free_row.row
            with self._changed:
                if ticket.cancelled:  # it has already left the queue
                    continue
                # Under one lock, so that after a failure each ticket is in the queue or in a row.
                self._waiting.remove(ticket)
                row.ticket, row.ready, row.assigned_at = ticket, False, time.monotonic()
            row.prompt_logprobs = []
            self._count(reused_tokens=self._storage.assign(free_row, request))

    def _prefill_next_chunks(self) -> None:
        """Prefills a chunk of the oldest prompt, and of one in each other copy of the model."""
        start, storage = time.perf_counter(), self._storage
        self._count(reused_tokens=sum(map(storage.share, self._rows)))
        chunks, size, slots = next_chunks(self._rows, self._batch.copies, storage.prefill_slots)
        rows = [self._rows[chunk.row] for chunk in chunks]
        requests = [row.ticket.request for row in rows if row.ticket is not None]
        with_logprobs = any(request.prompt_logprobs for request in requests)
        found = self._batch.prefill(chunks, size, slots, with_logprobs)
        for row, request, chunk, logprobs in zip(rows, requests, chunks, found, strict=True):
            row.tokens += chunk.tokens
            storage.record(row)
            if request.prompt_logprobs:  # the prompt's last token has no target yet
                row.prompt_logprobs += row_programs.attach_logprobs(
                    chunk.targets, *logprobs, top=request.top_logprobs
                )
            if len(row.tokens) == len(request.prompt) and row.ticket is not None:
                self._batch.start(chunk.row, request_to_json(request))
                row.ready = True
                row.ticket.deliver(PromptDone(tuple(row.prompt_logprobs)))
        n_tokens = sum(len(chunk.tokens) for chunk in chunks)
        self._count(prompt_tokens=n_tokens, prefill_seconds=time.perf_counter() - start)

    def _decode(self, ready: list[Row], n: int) -> None:
        """Decodes up to `n` tokens in the ready rows and delivers them."""
        start = time.perf_counter()
        with_logprobs = any(row.ticket.request.logprobs for row in ready if row.ticket is not None)
        if any(row.constraint for row in ready):
            generated = constrained.decode(self._batch, self._rows, with_logprobs)
        else:
            generated = self._batch.decode(n, with_logprobs)
        tokens_Bn, *logprobs = generated
        step_bytes = self._batch.step_bytes(self._storage.slots_read())
        seconds = time.perf_counter() - start
        total = steps = 0
        for row in ready:
            index = self._rows.index(row)
            ids = tokens_Bn[index]
            ids = ids[ids != NO_TOKEN].tolist()
            total, steps = total + len(ids), max(steps, len(ids))
            self._deliver(row, ids, [x_Bn_[index] for x_Bn_ in logprobs])
        self._count(
            generated_tokens=total,
            decode_seconds=seconds,
            decode_steps=steps,
            bytes_read=steps * step_bytes,
        )

    def _deliver(self, row: Row, ids: list[int], logprobs: list[np.ndarray]) -> None:
        """Delivers new tokens of a row; after the last one the row is free."""
        ticket = row.ticket
        assert ticket is not None
        request = ticket.request
        row.tokens += ids
        for token in row_programs.attach_logprobs(ids, *logprobs, top=request.top_logprobs):
            ticket.deliver(token)
        if ids and ids[-1] in request.end_ids:
            self._release(row, RequestEnded("stop"))
        elif len(row.tokens) == len(request.prompt) + request.max_new_tokens:
            self._release(row, RequestEnded("length"))
        elif row.constraint is not None and row.constraint.error is not None:
            self._release(row, RequestEnded("constraint", row.constraint.error))

    def _release(self, row: Row, ended: RequestEnded) -> None:
        """Ends a row's request and frees the row; its keys and values stay in the cache."""
        ticket = row.ticket
        assert ticket is not None
        if ended.reason in ("cancelled", "constraint"):  # the device would continue the row
            self._batch.stop(self._rows.index(row))
        self._storage.release(row)
        with self._changed:
            row.ticket, row.ready = None, False
        self._count(**{"cancelled" if ended.reason == "cancelled" else "finished": 1})
        ticket.deliver(ended)

    def _count(self, **increments: float) -> None:
        """Adds to the statistics."""
        with self._changed:
            old = self._statistics._asdict()
            sums = {name: old[name] + value for name, value in increments.items()}
            self._statistics = self._statistics._replace(**sums)
