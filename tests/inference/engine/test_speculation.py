import jax
import numpy as np
import pytest
from conftest import load_reference, tiny_model

from llama_jax.errors import InputError
from llama_jax.inference.engine import speculation
from llama_jax.inference.engine.speculation import guess, stream_ahead
from llama_jax.inference.sampling import Sampling
from llama_jax.inference.stream import stream
from llama_jax.model.weights import Llama
from llama_jax.tokenizer.tokenizer import load_tokenizer

CONFIG = tiny_model(context=256)
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def model():
    from llama_jax.parallel.mesh import one_device_mesh

    with jax.set_mesh(one_device_mesh()):
        return jax.jit(Llama, static_argnums=0)(CONFIG, jax.random.key(0))


def test_a_guess_is_what_followed_the_longest_and_last_place_alike():
    def of(*tokens):
        padded = np.full(40, -1, np.int32)
        padded[: len(tokens)] = tokens
        guessed, found = guess(padded, np.int32(len(tokens)))
        return guessed[:2].tolist() if found else None

    assert of(1, 2, 3, 7, 8, 9, 2, 3) == [7, 8]
    assert of(1, 2, 3, 7, 8, 4, 2, 3, 5, 6, 1, 2, 3) == [7, 8]  # three alike before two
    assert of(2, 3, 7, 8, 2, 3, 5, 6, 2, 3) == [5, 6]  # the last of equals
    assert of(1, 2, 3, 4, 5, 3) is None  # one token alike is no reason
    assert of(5) is None


def test_a_text_that_repeats_itself_is_the_same_in_fewer_passes(model, monkeypatch):
    passes, decode = [], speculation._decode

    def counted(*args, **options):
        text = decode(*args, **options)
        passes.append(int(text.passes))
        return text

    monkeypatch.setattr(speculation, "_decode", counted)
    prompt = np.random.default_rng(0).integers(3, 320, 20).tolist() * 2
    expected = list(stream(CONFIG, model, prompt, max_new_tokens=120))
    assert list(stream_ahead(CONFIG, model, prompt, max_new_tokens=120)) == expected
    assert passes[-1] < 100


def test_it_ends_at_an_end_id_and_at_the_last_token(model):
    prompt = [5, 6, 7, 5, 6, 7, 5, 6]
    expected = list(stream(CONFIG, model, prompt, max_new_tokens=40))
    for end in set(expected[:12]):
        until = expected[: expected.index(end) + 1]
        ends = frozenset({end})
        assert list(stream_ahead(CONFIG, model, prompt, max_new_tokens=40, end_ids=ends)) == until
    assert list(stream_ahead(CONFIG, model, prompt, max_new_tokens=7)) == expected[:7]


def test_a_really_trained_model_tells_the_same_story(shared_data):
    folder = shared_data / "stories260K"
    config, model = load_reference(folder / "hf")
    tokenizer = load_tokenizer(folder / "hf")
    made = list(stream_ahead(config, model, [tokenizer.bos_id], max_new_tokens=200))
    assert (
        tokenizer.decode([tokenizer.bos_id, *made])
        == (folder / "greedy_200_expected.txt").read_text()
    )


def test_draws_are_refused(model):
    with pytest.raises(InputError, match="speculation takes the most likely token each time"):
        next(stream_ahead(CONFIG, model, [1], max_new_tokens=9, sampling=Sampling(temperature=1)))
