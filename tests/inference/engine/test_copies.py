"""An engine with several copies of the model."""

import jax
import pytest
from conftest import mesh_of
from engine_requests import CONFIG, DRAWN, random_prompt, submit, tokens_alone

from llama_jax.errors import InputError
from llama_jax.inference.engine.device_batch import check_rows
from llama_jax.inference.engine.engine import Engine
from llama_jax.inference.engine.requests import Request
from llama_jax.inference.sampling import Sampling
from llama_jax.model.weights import Llama, unstack_layers
from llama_jax.parallel.mesh import one_device_mesh


def model_on(mesh):
    with jax.set_mesh(mesh):
        return unstack_layers(jax.jit(Llama, static_argnums=0)(CONFIG, jax.random.key(0)))


@pytest.mark.slow
@pytest.mark.parametrize("cache_tokens", [None, 4096])
def test_copies_of_the_model_give_the_tokens_of_one_device(cache_tokens):
    alone, model = model_on(one_device_mesh()), model_on(mesh_of((2, 1, 2)))
    requests = [
        Request(random_prompt(5), 20),
        Request(random_prompt(300), 12, DRAWN, seed=7),
        Request(random_prompt(40), 30, DRAWN, seed=8),
        Request(random_prompt(1), 9),
        Request(random_prompt(257), 5, Sampling(repetition_penalty=1.5)),
        Request(random_prompt(600), 20, DRAWN, seed=9),
        Request(random_prompt(9), 5, logit_bias=((7, 100.0),)),
    ]
    expected = [tokens_alone(alone, request) for request in requests[:-1]] + [[7] * 5]
    with jax.set_mesh(mesh_of((2, 1, 2))):
        engine = Engine(CONFIG, model, rows=4, context=700, cache_tokens=cache_tokens)
    for _ in range(2):  # the second time with the KV cache of the first
        responses = submit(engine, *requests, *requests)
        assert [response.wait().ids for response in responses] == expected * 2
    # Three prompts are scored as trees, two at a time; the last is prefilled.
    scored = Request(random_prompt(200), 1, logprobs=True, prompt_logprobs=True)
    others = [scored._replace(prompt=random_prompt(n)) for n in (9, 300)]
    found = submit(engine, scored, *others, scored._replace(max_new_tokens=2))
    tree, *_, prefilled = (response.wait().prompt_done.prompt_logprobs for response in found)
    assert [token.id for token in tree] == [*scored.prompt[1:]]
    # Sums of float32 terms in different orders; the logits are below 8.
    for one, other in zip(tree, prefilled, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
    engine.close()


def test_the_rows_are_a_multiple_of_the_copies():
    with jax.set_mesh(mesh_of((2, 1, 2))):
        check_rows(6)
        message = "5 rows can't be shared equally by 2 copies of the model: ask for a multiple of 2"
        with pytest.raises(InputError, match=message):
            check_rows(5)
