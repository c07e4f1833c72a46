from functools import cache

import jax
import numpy as np
import pytest
from conftest import load_reference, mesh_of, tiny_model

from llama_jax.checkpoint.tree import abstract_model
from llama_jax.errors import InputError
from llama_jax.inference.score import ScoreRequest, score
from llama_jax.model.transformer import forward
from llama_jax.model.weights import Llama, quantize_model, unstack_layers
from llama_jax.parallel.mesh import one_device_mesh

CONFIG = tiny_model(context=320)
# Each log-probability is a sum of 320 exponentials, after 2 layers whose sums have at most 320
# float32 terms of size 1: 320 · 6e-8 relative to the largest logit, which is below 4.
TOLERANCE = 1e-5
random = np.random.default_rng(0)


def random_tokens(n):
    return tuple(random.integers(3, 320, n).tolist())


def all_requests():
    """Questions with several answers; nested, equal and unrelated sequences; a long one."""
    question, example = random_tokens(30), random_tokens(20)
    answers = [ScoreRequest(question + random_tokens(n), 30) for n in (1, 1, 2, 7, 12)]
    shots = [ScoreRequest(example + random_tokens(n), 20 + n // 2) for n in (9, 14, 23)]
    nested = [ScoreRequest(question[:n], n // 3) for n in (5, 17, 30)]
    unrelated = [ScoreRequest(random_tokens(n), 1) for n in (2, 3, 50, 90, 120)]
    long = ScoreRequest(question + random_tokens(280), 300)
    return [*answers, *shots, *nested, *unrelated, answers[3], long]


REQUESTS = all_requests()


@pytest.fixture(scope="module")
def model():
    with jax.set_mesh(one_device_mesh()):
        return jax.jit(Llama, static_argnums=0)(CONFIG, jax.random.key(0))


def plain(config, model, requests):
    """Returns each request's log-probabilities and whether it is greedy, by separate `forward`s.

    Padding on the right doesn't change what is to its left.
    """
    compiled = jax.jit(forward, static_argnums=0)
    results = []
    for tokens, n_context in requests:
        padded = np.zeros((1, 320), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(compiled(config, model, padded), np.float64)[0]
        logits = logits[n_context - 1 : len(tokens) - 1]
        log_sums = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))
        chosen = logits[np.arange(len(logits)), tokens[n_context:]] - logits.max(-1)
        results.append((chosen - log_sums, (logits.argmax(-1) == tokens[n_context:]).all()))
    return results


@cache
def expected_results(model):
    with jax.set_mesh(one_device_mesh()):
        return plain(CONFIG, model, REQUESTS)


def check(found, expected, tolerance=TOLERANCE):
    """Checks that every request has its score, once."""
    found = list(found)
    scores = dict(found)
    assert len(found) == len(scores) == len(expected)
    for index, (logprobs, greedy) in enumerate(expected):
        assert scores[index].logprobs.dtype == np.float32
        np.testing.assert_allclose(scores[index].logprobs, logprobs, atol=tolerance)
        assert scores[index].greedy == greedy
        assert scores[index].total == pytest.approx(logprobs.sum(), abs=tolerance * len(logprobs))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 2, 1, 4)])
def test_scores_are_those_of_separate_forward_passes_on_every_mesh(model, shape):
    expected = expected_results(model)
    with jax.set_mesh(mesh_of(shape)):
        sharded = jax.device_put(model, jax.tree.map(lambda a: a.sharding, abstract_model(CONFIG)))
        check(score(CONFIG, sharded, REQUESTS), expected)


@pytest.mark.usefixtures("one_device")
def test_a_request_alone_and_other_batches_give_the_same_scores(model):
    expected = expected_results(model)
    check(score(CONFIG, model, REQUESTS, row_tokens=256), expected)
    for index in (0, 3, 8, 12):
        check(score(CONFIG, model, [REQUESTS[index]], row_tokens=256), [expected[index]])
    assert list(score(CONFIG, model, [])) == []


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("quantize", [False, True])
def test_an_unstacked_and_a_quantized_model_give_the_scores_of_forward(quantize):
    config, model = CONFIG, jax.jit(Llama, static_argnums=0)(CONFIG, jax.random.key(0))
    if quantize:
        config, model = quantize_model(config, model)
    requests = REQUESTS[:14]
    expected = plain(config, model, requests)
    check(score(config, model, requests), expected)
    check(score(config, unstack_layers(model), requests), expected)


@pytest.mark.usefixtures("one_device")
def test_a_trained_models_most_likely_tokens_are_greedy(shared_data):
    config, model = load_reference(shared_data / "stories260K/hf")
    text, compiled = [1], jax.jit(forward, static_argnums=0)
    for t in range(40):
        logits = compiled(config, model, np.array([text + [0] * (40 - t)], np.int32))
        text.append(int(np.asarray(logits)[0, t].argmax()))
    right = [ScoreRequest(tuple(text), n) for n in (1, 20, 40)]
    wrong = [ScoreRequest((*text[:n], 5, *text[n + 1 :]), 10) for n in (10, 30, 40)]
    scores = dict(score(config, model, [*right, *wrong]))
    assert [scores[i].greedy for i in range(6)] == [True] * 3 + [False] * 3


@pytest.mark.usefixtures("one_device")
def test_of_equally_likely_tokens_the_first_is_greedy():
    model = jax.jit(Llama, static_argnums=0)(CONFIG, jax.random.key(0))
    model.output[...] = 0 * model.output[...]
    found = dict(score(CONFIG, model, [ScoreRequest((5, 0), 1), ScoreRequest((5, 1), 1)]))
    assert found[0].greedy
    assert not found[1].greedy
    assert found[0].logprobs == found[1].logprobs == pytest.approx(-np.log(320))


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    ("tokens", "n_context", "sentence"),
    [
        ((1, 2), 0, "a request of 2 tokens with 0 of context: at least one token of context"),
        ((1, 2), 2, "a request of 2 tokens with 2 of context: at least one token of context"),
        ((1, 320), 1, "token 320 is outside the model's vocabulary of 320"),
        ((-1, 3), 1, "token -1 is outside the model's vocabulary of 320"),
        ((1,) * 322, 1, "a request of 322 tokens doesn't fit the model's context of 320"),
    ],
)
def test_a_request_that_can_not_be_scored_is_refused_before_any_is_computed(
    model, tokens, n_context, sentence
):
    with pytest.raises(InputError, match=sentence):
        score(CONFIG, model, [REQUESTS[0], ScoreRequest(tokens, n_context)])
