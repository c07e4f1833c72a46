"""Biases and masks limit the tokens of their own rows, and change nothing in other rows."""

import jax
import numpy as np
import pytest
from engine_requests import CONFIG, DRAWN, random_prompt, submit, tokens_alone

from llama_jax.errors import InputError
from llama_jax.inference.engine.engine import Engine
from llama_jax.inference.engine.requests import Request
from llama_jax.inference.generate import prefill
from llama_jax.inference.logit_limits import mask_words
from llama_jax.model.weights import Llama, unstack_layers
from llama_jax.parallel.mesh import one_device_mesh
from llama_jax.runtime.compile_cache import compile_statistics

V, SLOTS = CONFIG.vocab_size, 64


@pytest.fixture(scope="module")
def model():
    with jax.set_mesh(one_device_mesh()):
        return unstack_layers(jax.jit(Llama, static_argnums=0)(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def engine(model):
    with jax.set_mesh(one_device_mesh()):
        engine = Engine(CONFIG, model, rows=3, context=200, queue=4)
        yield engine
        engine.close()


class Multiples:
    """Allows multiples of a number; the number is one more after each token."""

    def __init__(self, first: int, *, last: int = 1000):
        self.number, self.last = first, last
        self.error: str | None = None
        self.allow()

    def allow(self):
        allowed_V = np.zeros(32 * mask_words(V), bool)
        allowed_V[: V : self.number] = True
        self.mask_W = np.packbits(allowed_V, bitorder="little").view(np.uint32)

    def advance(self, token: int):
        assert token % self.number == 0
        self.number += 1
        self.error = "no number is left" if self.number > self.last else None
        self.allow()


def greedy_tokens(model, prompt, n, limit):
    """Returns the most likely tokens by whole forward passes and NumPy.

    `limit` returns the logits of the allowed tokens of step i.
    """
    tokens = list(prompt)
    with jax.set_mesh(one_device_mesh()):
        for i in range(n):
            padded_BT = np.array([[*tokens, *[0] * (SLOTS - len(tokens))]], np.int32)
            lengths_B = np.array([len(tokens)], np.int32)
            _, logits_BV = prefill(CONFIG, model, padded_BT, lengths_B, slots=SLOTS)
            tokens.append(int(np.argmax(limit(i, np.array(logits_BV[0], np.float64)))))
    return tokens[len(prompt) :]


def test_a_mask_allows_only_its_tokens(engine, model):
    def limit(i, logits_V):
        return np.where(np.arange(V) % (3 + i) == 0, logits_V, -np.inf)

    prompt = random_prompt(9)
    (response,) = submit(engine, Request(prompt, 12, constraint=Multiples(3)))
    assert response.wait().ids == greedy_tokens(model, prompt, 12, limit)
    assert response.reason == "length"


def test_a_bias_is_added_to_the_logits(engine, model):
    prompt = random_prompt(9)
    bias = ((7, 2.5), (11, 2.0), (12, -100.0), (300, 1.5))

    def limit(i, logits_V):
        logits_V[[token for token, _ in bias]] += [number for _, number in bias]
        return logits_V

    (response,) = submit(engine, Request(prompt, 12, logit_bias=bias))
    expected = greedy_tokens(model, prompt, 12, limit)
    assert response.wait().ids == expected != tokens_alone(model, Request(prompt, 12))
    (forced,) = submit(engine, Request(prompt, 5, DRAWN, logit_bias=((7, 100.0),)))
    assert forced.wait().ids == [7] * 5


def test_limits_in_one_row_change_no_other_row(engine, model):
    """Neither tokens nor log-probabilities, of requests with limits and without, change."""
    free = [Request(random_prompt(n), 25, DRAWN, seed=n, logprobs=True) for n in (5, 30)]
    limited = Request(random_prompt(6), 20, DRAWN, seed=1, logprobs=True, top_logprobs=2)
    biased = limited._replace(logit_bias=((9, 4.0),))

    def events(*requests):
        return [r.wait().tokens for r in submit(engine, *requests)]

    def constrained():
        return limited._replace(constraint=Multiples(2))

    before = compile_statistics().programs
    alone = [events(request)[0] for request in (*free, constrained(), biased)]
    assert events(*free, constrained(), biased) == alone
    assert compile_statistics().programs == before
    for request, tokens in zip(free, alone, strict=False):
        assert [token.id for token in tokens] == tokens_alone(model, request)


def test_log_probabilities_are_those_of_the_model_without_limits(engine):
    prompt = random_prompt(9)
    (free,) = submit(engine, Request(prompt, 1, logprobs=True, top_logprobs=20))
    (biased,) = submit(
        engine, Request(prompt, 1, logprobs=True, top_logprobs=20, logit_bias=((7, 50.0),))
    )
    assert free.wait().tokens[0].top == biased.wait().tokens[0].top
    assert biased.ids == [7]


def test_an_impossible_constraint_ends_its_own_request(engine, model):
    free = Request(random_prompt(5), 30)
    ended, other = submit(
        engine, Request(random_prompt(8), 30, constraint=Multiples(2, last=5)), free
    )
    assert ended.wait().reason == "constraint"
    assert len(ended.ids) == 4
    assert other.wait().ids == tokens_alone(model, free)
    assert submit(engine, free)[0].wait().ids == other.ids


@pytest.mark.parametrize("pair", [(V, 1.0), (-1, 1.0), (5, 100.5), (5, float("nan"))])
def test_an_invalid_bias_is_refused(engine, pair):
    with pytest.raises(InputError, match=r"logit_bias has .* numbers from -100 to 100"):
        engine.submit([Request((5,), 1, logit_bias=(pair,))], lambda *_: None)
