"""A tiny model, requests to its engine, and their tokens without the engine."""

import functools
import os
import queue
import time
import zlib

import jax
import numpy as np
from conftest import tiny_model

from llama_jax.inference.engine.requests import GeneratedToken, RequestEnded
from llama_jax.inference.sampling import Sampling
from llama_jax.inference.stream import stream
from llama_jax.parallel.mesh import one_device_mesh

CONFIG = tiny_model(context=2048)
DRAWN = Sampling(temperature=0.9, top_p=0.95)


def random_prompt(n):
    """Returns tokens that depend only on the test and on its earlier calls.

    With a generator of the process they would depend on the tests that ran before, so that now and
    then two prompts began with the same token, or two tokens were equally likely but for rounding.
    """
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]  # without setup, call or teardown
    return tuple(_generator(test).integers(3, 320, n).tolist())


@functools.lru_cache(maxsize=1)
def _generator(test):
    return np.random.default_rng(zlib.crc32(test.encode()))


class Response:
    """Submits a request and collects its events."""

    def __init__(self, engine, request, pause=0.0):
        self.events, self.pause = queue.Queue(), pause
        (self.ticket,) = engine.submit([request], lambda _, event: self.deliver(event))
        self.tokens, self.reason, self.prompt_done = [], None, None

    def deliver(self, event):
        time.sleep(self.pause)  # slows the engine, so that a tiny model doesn't finish too soon
        self.events.put(event)

    def wait(self, n=None):
        """Waits for the last event, or for `n` tokens."""
        while self.reason is None and (n is None or len(self.tokens) < n):
            event = self.events.get(timeout=60)
            if isinstance(event, GeneratedToken):
                self.tokens.append(event)
            elif isinstance(event, RequestEnded):
                self.reason = event.reason
            else:
                self.prompt_done = event
        return self

    @property
    def ids(self):
        return [token.id for token in self.tokens]


def tokens_alone(model, request, config=CONFIG):
    """Returns the tokens of a request that runs alone, without the engine."""
    with jax.set_mesh(one_device_mesh()):
        return list(
            stream(
                config, model, request.prompt, max_new_tokens=request.max_new_tokens,
                sampling=request.sampling, seed=request.seed, end_ids=request.end_ids,
            )
        )  # fmt: skip


def submit(engine, *requests):
    return [Response(engine, request) for request in requests]
