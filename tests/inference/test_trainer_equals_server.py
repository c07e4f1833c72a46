"""The log-probabilities of `forward` are those of the engine, however it came to a token."""

import queue
from contextlib import closing
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import pytest
import textbook
from conftest import load_reference, quick_compilation, tiny_model

from llama_jax.inference.engine.engine import Engine
from llama_jax.inference.engine.requests import GeneratedToken, PromptDone, Request, RequestEnded
from llama_jax.inference.sampling import Sampling
from llama_jax.model.summary import path_names
from llama_jax.model.transformer import forward
from llama_jax.model.weights import Llama, unstack_layers
from llama_jax.parallel.mesh import one_device_mesh
from llama_jax.tokenizer.tokenizer import load_tokenizer

CONTEXT = 700
# The shape of stories260K, so that random weights of it need no other programs.
SHAPE = {
    "dim": 64, "n_layers": 5, "n_heads": 8, "n_kv_heads": 4, "hidden_dim": 172, "vocab_size": 512,
    "tied_head": True, "context": 2048, "remat": "full",
}  # fmt: skip
DRAWN = Sampling(temperature=1.0)


class Answer(NamedTuple):
    prompt: tuple[int, ...]
    prompt_logprobs: tuple[GeneratedToken, ...]
    tokens: list[GeneratedToken]

    @property
    def text(self) -> list[int]:
        return [*self.prompt, *(token.id for token in self.tokens)]


def answers(engine: Engine, *requests: Request) -> list[Answer]:
    """Returns the answers to requests that are in the engine together."""
    queues: list[queue.Queue] = [queue.Queue() for _ in requests]
    engine.submit(requests, lambda number, event: queues[number].put(event))
    found = []
    for request, events in zip(requests, queues, strict=True):
        begun, tokens = PromptDone(), []
        while not isinstance(event := events.get(timeout=60), RequestEnded):
            if isinstance(event, PromptDone):
                begun = event
            else:
                tokens.append(event)
        assert (event.reason, len(tokens)) == ("length", request.max_new_tokens)
        found.append(Answer(request.prompt, begun.prompt_logprobs, tokens))
    return found


def stories260k(folder):
    """Returns a trained model and a text of its tokenizer."""
    config, model = load_reference(folder / "stories260K/meta")
    text = (folder / "text/tinyshakespeare.txt").read_text()[:4000]
    return config, model, load_tokenizer(folder / "stories260K/meta").encode(text, bos=True)


def random_weights():
    config = tiny_model(**SHAPE)
    make = jax.jit(partial(Llama, config), compiler_options=quick_compilation())
    model = make(jax.random.key(0))
    return config, model, np.random.default_rng(0).integers(3, 512, CONTEXT + 400).tolist()


def rounding(model, logits_BTV: np.ndarray, text: list[int]) -> float:
    """Returns how far two float32 computations of a log-probability may be apart.

    Each rounds a score of attention about four times in each layer (projection, rotation, products,
    sum), and a logit at the end; a rounding has a deviation of 2^-24 / √3 of its number. 4.4
    deviations of the sum of 2 · 4 · 5 layers of them are 16 · 2^-24, and so the largest of 40,000
    numbers is not beyond it. The scores are what counts: those of stories260K reach 350 in a long
    text. Most of that is common to all keys, so softmax drops it, but its rounding stays.
    """
    weights = {".".join(path_names(p)): np.asarray(w) for p, w in jax.tree.leaves_with_path(model)}
    positions = np.arange(len(text))[None]
    logits = jax.jit(textbook.logits, compiler_options=quick_compilation())
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
            found = answers(engine, long)
            # The first starts in the slots of `long`, the second in a copy of them.
            branches = [Request(text[:300] + other[i : i + 45], 40, seed=i, **ask) for i in (0, 50)]
            found += answers(engine, *branches)
            assert engine.statistics().reused_tokens == 600
            short = [Request(other[i : 9 * i], 90, seed=i, **ask) for i in (5, 20)]
            found += answers(engine, *short, long)  # one is read while the others make tokens

        texts = np.zeros((len(found), CONTEXT), np.int32)
        for row, answer in zip(texts, found, strict=True):
            row[: len(answer.text)] = answer.text
        trained = jax.jit(partial(forward, config), compiler_options=quick_compilation())
        logits_BTV = np.asarray(trained(model, texts))
    bound = rounding(model, logits_BTV, found[0].text)
    shifted = logits_BTV.astype(np.float64) - logits_BTV.max(-1, keepdims=True)
    logprobs_BTV = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    for answer, logprobs_TV in zip(found, logprobs_BTV, strict=True):
        pairs = [
            (token.logprob, logprobs_TV[i, token.id])
            for i, token in enumerate(answer.prompt_logprobs)
        ]
        for i, token in enumerate(answer.tokens, len(answer.prompt) - 1):
            pairs += [(token.logprob, logprobs_TV[i, token.id])]
            pairs += [(logprob, logprobs_TV[i, id_]) for id_, logprob in token.top]
        assert len(pairs) == len(answer.prompt_logprobs) + 21 * len(answer.tokens)
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=0, atol=bound)
    assert [len(answer.prompt_logprobs) for answer in found] == [599, 0, 0, 0, 0, 599]
