"""Batched generation: the tokens of each prompt are those that it gets alone."""

from functools import partial

import jax
import numpy as np
import pytest
from conftest import mesh_of, tiny_model

from llama_jax.checkpoint.tree import abstract_model
from llama_jax.errors import InputError
from llama_jax.inference import generate_batches as batches_module
from llama_jax.inference.generate_batches import GenerateRequest, _round_up, generate_batches
from llama_jax.inference.sampling import Sampling
from llama_jax.inference.stream import stream
from llama_jax.model.weights import Llama
from llama_jax.parallel.mesh import one_device_mesh

CONFIG = tiny_model(context=128)
RNG = np.random.default_rng(0)
PROMPTS = [tuple(RNG.integers(3, 320, n).tolist()) for n in (5, 40, 9, 33, 20)]


class LetterTokenizer:
    """Token i is the letter i; `end_ids` end a text."""

    def __init__(self, end_ids=()):
        self.end_ids = frozenset(end_ids)

    def decode(self, ids):
        return "".join(chr(0x4E00 + i) for i in ids)


@pytest.fixture(scope="module")
def model():
    with jax.set_mesh(one_device_mesh()):
        init = jax.jit(partial(Llama, CONFIG))
        return init(jax.random.key(0))


def alone(model, request):
    options = {"max_new_tokens": request.max_new_tokens, "seed": request.seed}
    return list(stream(CONFIG, model, request.tokens, sampling=request.sampling, **options))


def test_prompts_in_batches_get_the_tokens_that_they_get_alone(model):
    requests = [GenerateRequest(p, 23 - i) for i, p in enumerate(PROMPTS)]
    requests += [r._replace(sampling=Sampling(temperature=1.0), seed=7) for r in requests[:2]]
    with jax.set_mesh(one_device_mesh()):
        expected = [alone(model, request) for request in requests]
    end = expected[1][11]  # ends some of the rows
    ended = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in expected]
    assert ended != expected
    for shape in (1, 1, 1), (1, 2, 4):
        with jax.set_mesh(mesh_of(shape)):
            like = jax.tree.map(lambda leaf: leaf.sharding, abstract_model(CONFIG))
            sharded = jax.device_put(model, like)
            found = dict(generate_batches(CONFIG, sharded, LetterTokenizer([end]), requests))
        assert [found[i] for i in range(len(found))] == ended


@pytest.mark.parametrize(("shape", "rows_of_a_shard"), [((1, 1, 1), 4), ((2, 1, 4), 2)])
def test_requests_take_the_place_of_rows_that_have_ended(
    model, shape, rows_of_a_shard, monkeypatch
):
    requests = [
        GenerateRequest(PROMPTS[i % 5], 1 + 11 * i % 48, sampling=Sampling(temperature=1.0), seed=i)
        for i in range(20)
    ]
    with jax.set_mesh(one_device_mesh()):
        expected = [alone(model, request) for request in requests]
    filled, fill = [], batches_module._fill_rows

    def record(config, model, state, tokens, lengths, rows):
        filled.append(np.asarray(lengths).tolist())
        return fill(config, model, state, tokens, lengths, rows)

    monkeypatch.setattr(batches_module, "_MAX_ROWS", rows_of_a_shard)
    monkeypatch.setattr(batches_module, "_fill_rows", record)
    with jax.set_mesh(mesh_of(shape)):
        like = jax.tree.map(lambda leaf: leaf.sharding, abstract_model(CONFIG))
        sharded = jax.device_put(model, like)
        found = dict(generate_batches(CONFIG, sharded, LetterTokenizer(), requests))
    assert [found[i] for i in range(20)] == expected
    assert any(0 in lengths for lengths in filled)  # while other rows ran


def test_a_row_ends_within_a_block_of_its_stop_string(model):
    tokenizer, request = LetterTokenizer(), GenerateRequest(PROMPTS[0], 40)
    with jax.set_mesh(one_device_mesh()):
        [(_, complete)] = generate_batches(CONFIG, model, tokenizer, [request])
        stop = tokenizer.decode(complete[3:5])
        stopped = request._replace(stops=("never", stop))
        found = dict(generate_batches(CONFIG, model, tokenizer, [stopped, request]))
    assert len(complete) == 40
    assert found[0] == complete[:16]
    assert found[1] == complete


def test_few_sizes_serve_all_lengths():
    assert [_round_up(n) for n in (1, 32, 33, 48, 49, 64, 65, 96, 97, 1500, 1537)] == [
        32, 32, 48, 48, 64, 64, 96, 96, 128, 1536, 2048,
    ]  # fmt: skip


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_computed(model):
    requests = [GenerateRequest(PROMPTS[0], 8), GenerateRequest(PROMPTS[1], 89)]
    with pytest.raises(InputError, match="40 tokens and 89 new ones don't fit"):
        next(generate_batches(CONFIG, model, LetterTokenizer(), requests))
