import queue

import jax
import numpy as np
import pytest
from engine_requests import CONFIG, Response, random_prompt, submit, tokens_alone

from llama_jax.inference.engine.engine import Engine
from llama_jax.inference.engine.requests import Request, RequestEnded
from llama_jax.model.transformer import forward
from llama_jax.model.weights import Llama, unstack_layers
from llama_jax.parallel.mesh import one_device_mesh


@pytest.fixture(scope="module")
def model():
    with jax.set_mesh(one_device_mesh()):
        return unstack_layers(jax.jit(Llama, static_argnums=0)(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def engine(model):
    with jax.set_mesh(one_device_mesh()):
        engine = Engine(CONFIG, model, rows=3, context=700, queue=4)
        yield engine
        engine.close()


def logprobs_of_forward(model, text):
    """Returns the log-probabilities [T, V] of one forward pass over a text."""
    with jax.set_mesh(one_device_mesh()):
        padded = np.zeros((1, 320), np.int32)  # one program for all texts
        padded[0, : len(text)] = text
        logits = jax.jit(forward, static_argnums=0)(CONFIG, model, padded)
    exact = np.asarray(logits, np.float64)[0, : len(text)]
    return exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("n", [1, 3])  # with one greedy token, prompts are scored as prefix trees
def test_logprobs_come_with_the_tokens(engine, model, n):
    request = Request(random_prompt(300), n, logprobs=True, top_logprobs=4, prompt_logprobs=True)
    # The slots of this request have the same prompt: prompt log-probabilities must not reuse it.
    submit(engine, Request(request.prompt, 1))[0].wait()
    (response,) = submit(engine, request)
    response.wait()
    text = [*request.prompt, *response.ids]
    exact = logprobs_of_forward(model, text)
    expected = exact[np.arange(len(text) - 1), text[1:]]
    tokens = [*response.prompt_done.prompt_logprobs, *response.tokens]
    np.testing.assert_allclose([token.logprob for token in tokens], expected, atol=1e-5)
    assert [token.id for token in tokens] == text[1:]
    greedy = 0
    for token, exact_V in zip(tokens, exact, strict=False):
        best = np.argsort(-exact_V)[:4]
        assert [i for i, _ in token.top] == best.tolist()
        np.testing.assert_allclose([logprob for _, logprob in token.top], exact_V[best], atol=1e-5)
        # Clients compare a token with the most likely one: the numbers must be bitwise equal.
        assert dict(token.top).get(token.id, token.logprob) == token.logprob
        greedy += token.top[0][0] == token.id
    assert n <= greedy < 100


def test_prompts_are_scored_together_while_texts_are_generated(engine, model):
    prefix = random_prompt(60)
    prompts = [prefix + random_prompt(n) for n in (1, 5, 5, 30)] + [random_prompt(1)]
    scored = Request((), 1, logprobs=True, top_logprobs=1, prompt_logprobs=True)
    requests = [scored._replace(prompt=prompt) for prompt in prompts]
    exact = [logprobs_of_forward(model, prompt) for prompt in prompts]
    requests[0] = requests[0]._replace(end_ids=frozenset({int(exact[0][-1].argmax())}))
    generating = Request(random_prompt(4), 40)
    running = Response(engine, generating, pause=0.005).wait(1)
    before, events = engine.statistics(), queue.Queue()
    engine.submit(requests, lambda *event: events.put(event))
    delivered = [events.get(timeout=60) for _ in range(3 * len(requests))]
    assert running.events.qsize() < 39
    computed = engine.statistics().prompt_tokens - before.prompt_tokens
    assert computed == 60 + 1 + 5 + 5 + 30 + 1
    for i, request in enumerate(requests):
        done, token, ended = (event for index, event in delivered if index == i)
        assert token.id == exact[i][-1].argmax()
        assert ended == RequestEnded("length" if i else "stop")
        scores = [*done.prompt_logprobs, token]
        expected = exact[i][np.arange(len(scores)), [*request.prompt[1:], token.id]]
        np.testing.assert_allclose([score.logprob for score in scores], expected, atol=1e-5)
    assert running.wait().ids == tokens_alone(model, generating)
