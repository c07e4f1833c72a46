"""The engine's log-probabilities equal those of `forward`, also after a reused prefix."""

import queue
from contextlib import closing
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import pytest
import textbook
from conftest import load_reference, tiny_model

from llama_jax.inference.engine.engine import Engine
from llama_jax.inference.engine.requests import GeneratedToken, PromptDone, Request, RequestEnded
from llama_jax.inference.sampling import Sampling
from llama_jax.model.summary import path_names
from llama_jax.model.transformer import forward
from llama_jax.model.weights import Llama, unstack_layers
from llama_jax.parallel.mesh import one_device_mesh
from llama_jax.tokenizer.tokenizer import load_tokenizer

CONTEXT = 700
# The shape of stories260K, so that random weights share its compiled programs.
SHAPE = {
    "dim": 64, "n_layers": 5, "n_heads": 8, "n_kv_heads": 4, "hidden_dim": 172, "vocab_size": 512,
    "tied_head": True, "context": 2048, "remat": "full",
}  # fmt: skip
DRAWN = Sampling(temperature=1.0)


class Response(NamedTuple):
    prompt: tuple[int, ...]
    prompt_logprobs: tuple[GeneratedToken, ...]
    tokens: list[GeneratedToken]

    @property
    def text(self) -> list[int]:
        return [*self.prompt, *(token.id for token in self.tokens)]


def run_together(engine: Engine, *requests: Request) -> list[Response]:
    """Returns the responses to requests that are in the engine at the same time."""
    queues: list[queue.Queue] = [queue.Queue() for _ in requests]
    engine.submit(requests, lambda number, event: queues[number].put(event))
    responses = []
    for request, events in zip(requests, queues, strict=True):
        prompt_done, tokens = PromptDone(), []
        while not isinstance(event := events.get(timeout=60), RequestEnded):
            if isinstance(event, PromptDone):
                prompt_done = event
            else:
                tokens.append(event)
        assert (event.reason, len(tokens)) == ("length", request.max_new_tokens)
        responses.append(Response(request.prompt, prompt_done.prompt_logprobs, tokens))
    return responses


def stories260k(folder):
    """Returns a trained model and a text of its tokenizer."""
    config, model = load_reference(folder / "stories260K/meta")
    text = (folder / "text/tinyshakespeare.txt").read_text()[:4000]
    return config, model, load_tokenizer(folder / "stories260K/meta").encode(text, bos=True)


def random_weights():
    config = tiny_model(**SHAPE)
    init = jax.jit(partial(Llama, config))
    model = init(jax.random.key(0))
    return config, model, np.random.default_rng(0).integers(3, 512, CONTEXT + 400).tolist()


def rounding(model, logits_BTV: np.ndarray, text: list[int]) -> float:
    """Returns the largest expected difference of two float32 computations of a log-probability.

    Each computation rounds an attention score about four times in each layer (projection, rotation,
    products, sum), and a logit at the end; the standard deviation of a rounding error is
    2^-24 / √3 of the number. The sum has 2 · 4 · 5 of them, for 5 layers: 4.4 standard deviations
    of the sum are 16 · 2^-24, which also bounds the largest of 40,000 numbers. The scores dominate:
    those of stories260K reach 350 in a long text. Most of a score is common to all keys, so softmax
    cancels it, but its rounding error stays.
    """
    weights = {".".join(path_names(p)): np.asarray(w) for p, w in jax.tree.leaves_with_path(model)}
    positions = np.arange(len(text))[None]
    logits = jax.jit(textbook.logits)
    _, score = logits(weights, np.array([text]), positions, np.ones_like(positions))
    return 16 * 2.0**-24 * float(score + np.abs(logits_BTV).max())


@pytest.mark.parametrize("which", ["random", "stories260K"])
def test_prefill_and_decode_give_the_logprobs_of_forward(request, which):
    with jax.set_mesh(one_device_mesh()):
        if which == "random":
            config, model, tokens = random_weights()
        else:
            config, model, tokens = stories260k(request.getfixturevalue("shared_data"))
        text, other = tuple(tokens[:600]), tuple(tokens[600:1000])
        served = unstack_layers(jax.tree.map(lambda w: w.copy(), model))
        with closing(Engine(config, served, rows=3, context=CONTEXT)) as engine:
            ask = {"sampling": DRAWN, "logprobs": True, "top_logprobs": 20}
            long = Request(text, 40, prompt_logprobs=True, **ask)  # in chunks of 256, 256 and 88
            responses = run_together(engine, long)
            # The first branch reuses the slots of `long`, the second a copy of them.
            branches = [Request(text[:300] + other[i : i + 45], 40, seed=i, **ask) for i in (0, 50)]
            responses += run_together(engine, *branches)
            assert engine.statistics().reused_tokens == 600
            short = [Request(other[i : 9 * i], 90, seed=i, **ask) for i in (5, 20)]
            responses += run_together(engine, *short, long)  # `long` prefills while others decode

        texts = np.zeros((len(responses), CONTEXT), np.int32)
        for row, response in zip(texts, responses, strict=True):
            row[: len(response.text)] = response.text
        full_pass = jax.jit(partial(forward, config))
        logits_BTV = np.asarray(full_pass(model, texts))
    bound = rounding(model, logits_BTV, responses[0].text)
    shifted = logits_BTV.astype(np.float64) - logits_BTV.max(-1, keepdims=True)
    logprobs_BTV = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    for response, logprobs_TV in zip(responses, logprobs_BTV, strict=True):
        pairs = [
            (token.logprob, logprobs_TV[i, token.id])
            for i, token in enumerate(response.prompt_logprobs)
        ]
        for i, token in enumerate(response.tokens, len(response.prompt) - 1):
            pairs += [(token.logprob, logprobs_TV[i, token.id])]
            pairs += [(logprob, logprobs_TV[i, id_]) for id_, logprob in token.top]
        assert len(pairs) == len(response.prompt_logprobs) + 21 * len(response.tokens)
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=0, atol=bound)
    assert [len(response.prompt_logprobs) for response in responses] == [599, 0, 0, 0, 0, 599]
