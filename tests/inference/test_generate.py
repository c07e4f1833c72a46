import json

import jax
import numpy as np
import pytest
from conftest import MESHES, REFERENCES, load_reference, mesh_of, tiny_model

from llama_jax.checkpoint.model_folders import save_model
from llama_jax.checkpoint.tree import abstract_model
from llama_jax.errors import InputError
from llama_jax.inference.detokenize import stream_text
from llama_jax.inference.generate import NO_TOKEN, generate
from llama_jax.inference.load import load
from llama_jax.inference.sampling import Sampling
from llama_jax.inference.score import ScoreRequest, score
from llama_jax.inference.stream import stream
from llama_jax.model.transformer import forward
from llama_jax.model.weights import Llama, quantize_model, restore_layout
from llama_jax.parallel.mesh import one_device_mesh, shard_array, tensor_mesh
from llama_jax.tokenizer.tokenizer import load_tokenizer

CONFIG = tiny_model()
LENGTHS = [12, 1, 7, 5, 12, 3, 9, 2]
PROMPTS = [np.random.default_rng(i).integers(3, 320, n).tolist() for i, n in enumerate(LENGTHS)]
DRAWN = Sampling(temperature=0.8, top_k=50, top_p=0.9)


def padded_prompts(side):
    tokens = np.zeros((8, 12), np.int32)
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        row[slice(12 - len(prompt), 12) if side == "left" else slice(0, len(prompt))] = prompt
    return tokens


def generate_batch(model, side="right", sampling=Sampling(), config=CONFIG, **options):
    tokens, lengths = (
        shard_array(padded_prompts(side), "BT"),
        shard_array(np.array(LENGTHS, np.int32), "B"),
    )
    options = {"max_new_tokens": 10, "left_padded": side == "left"} | options
    seeds = shard_array(np.arange(8, dtype=np.uint32), "B")
    return generate(config, model, tokens, lengths, sampling, seeds, **options)


def generated_tokens(*args, **options):
    return np.asarray(generate_batch(*args, **options).tokens_Bn)


@pytest.fixture(scope="module")
def model():
    with jax.set_mesh(one_device_mesh()):
        return jax.jit(Llama, static_argnums=0)(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def greedy(model):
    with jax.set_mesh(one_device_mesh()):
        return generated_tokens(model)


def test_greedy_tokens_equal_those_of_full_forward_passes(model, greedy):
    full = jax.jit(forward, static_argnums=0)
    with jax.set_mesh(one_device_mesh()):
        for i in (0, 1, 2):
            text = [*PROMPTS[i], *greedy[i].tolist()]
            tokens = np.array([text + [0] * (24 - len(text))], np.int32)
            logits = np.asarray(full(CONFIG, model, tokens))[0]
            at = range(len(PROMPTS[i]) - 1, len(text) - 1)
            assert logits[at].argmax(-1).tolist() == greedy[i].tolist()


@pytest.mark.parametrize("mesh", MESHES[2:])
def test_tokens_are_the_same_on_every_mesh_and_padding(model, greedy, mesh):
    with jax.set_mesh(mesh_of(mesh)):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_model(CONFIG))
        sharded = jax.device_put(model, shardings)
        np.testing.assert_array_equal(generated_tokens(sharded, "left"), greedy)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    with jax.set_mesh(one_device_mesh()):
        save_model(folder, CONFIG, model, tokenizer=None)
    return folder


# All heads on one device, one key/value head per device, copied heads.
@pytest.mark.parametrize("devices", [1, 4, 8])
def test_greedy_tokens_are_the_same_over_any_number_of_devices(folder, greedy, devices):
    mesh = tensor_mesh(CONFIG, jax.devices()[:devices])
    assert mesh.size == devices
    with jax.set_mesh(mesh):
        config, model = load(folder)
        assert config.n_kv_heads == CONFIG.n_kv_heads
        wk = restore_layout(model).layers[0].wk[...]
        assert wk.shape[1] == max(CONFIG.n_kv_heads, devices)
        assert wk.sharding.shard_shape(wk.shape)[1] == wk.shape[1] // devices
        np.testing.assert_array_equal(generated_tokens(model, config=config), greedy)


def test_int8_generates_the_same_tokens_on_one_device_and_with_copied_heads(
    model, folder, tmp_path
):
    with jax.set_mesh(one_device_mesh()):
        config, quantized = quantize_model(CONFIG, model)
        save_model(tmp_path / "int8", config, quantized, tokenizer=None)
        config, loaded = load(tmp_path / "int8")
        continued = generated_tokens(loaded, config=config)
    with jax.set_mesh(tensor_mesh(CONFIG, jax.devices()[:8])):
        config, loaded = load(folder, quantize="int8")
        wk = loaded.layers[0].wk.values[...]
        assert wk.size == 2 * CONFIG.count("DKH")
        np.testing.assert_array_equal(generated_tokens(loaded, config=config), continued)
        _, same = load(tmp_path / "int8")
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.usefixtures("one_device")
class TestOnOneDevice:
    def test_each_row_has_its_own_settings(self, model, greedy):
        drawn = generated_tokens(model, sampling=DRAWN)
        mixed = generated_tokens(model, sampling=(Sampling(), DRAWN) * 4)
        np.testing.assert_array_equal(mixed[::2], greedy[::2])
        np.testing.assert_array_equal(mixed[1::2], drawn[1::2])
        assert np.any(drawn != greedy)

    def test_a_large_repetition_penalty_forbids_repeated_tokens(self, model, greedy):
        no_repeats = Sampling(repetition_penalty=1e6)
        for row, prompt in zip(generated_tokens(model, sampling=no_repeats), PROMPTS, strict=True):
            assert len({*row.tolist(), *prompt}) == len(row) + len(set(prompt))

    def test_logprobs_equal_those_of_a_full_forward_pass(self, model, greedy):
        generated = jax.tree.map(np.asarray, generate_batch(model, top=3))
        np.testing.assert_array_equal(generated.tokens_Bn, greedy)
        text = np.array([[*PROMPTS[0], *greedy[0], 0, 0]], np.int32)
        logits = np.asarray(jax.jit(forward, static_argnums=0)(CONFIG, model, text))[0]
        logprobs = np.asarray(jax.nn.log_softmax(logits))[11:21]
        best = np.argsort(-logprobs, axis=-1)[:, :3]
        np.testing.assert_array_equal(generated.top_tokens_BnA[0], best)
        expected = np.take_along_axis(logprobs, best, axis=-1)
        np.testing.assert_allclose(generated.top_logprobs_BnA[0], expected, atol=1e-5)
        np.testing.assert_allclose(generated.logprobs_Bn[0], expected[:, 0], atol=1e-5)

    def test_the_side_of_the_padding_does_not_change_the_draws(self, model):
        left, right = (generated_tokens(model, side, DRAWN) for side in ("left", "right"))
        np.testing.assert_array_equal(left, right)

    def test_any_of_the_end_ids_ends_its_row(self, model, greedy):
        ends = (int(greedy[0, 4]), int(greedy[3, 2]))
        ended = generated_tokens(model, end_ids=ends)
        for row, full in zip(ended, greedy, strict=True):
            hits = np.flatnonzero(np.isin(full, ends))
            length = hits[0] + 1 if len(hits) else len(full)
            np.testing.assert_array_equal(row[:length], full[:length])
            assert np.all(row[length:] == NO_TOKEN)
        assert (ended == NO_TOKEN).any()

    @pytest.mark.parametrize("row", [0, 1])
    def test_stream_yields_the_tokens_of_generate(self, model, greedy, row):
        streamed = list(stream(CONFIG, model, PROMPTS[row], max_new_tokens=10))
        assert streamed == greedy[row].tolist()

    def test_the_block_size_does_not_change_the_draws(self, model):
        options = {"max_new_tokens": 11, "sampling": DRAWN, "seed": 5}
        three, eight = (list(stream(CONFIG, model, PROMPTS[2], block=n, **options)) for n in (3, 8))
        assert three == eight
        assert len(three) == 11
        other = list(stream(CONFIG, model, PROMPTS[2], **(options | {"seed": 6})))
        assert other != three

    def test_streaming_stops_at_an_end_id(self, model, greedy):
        end = int(greedy[0, 4])
        streamed = list(
            stream(CONFIG, model, PROMPTS[0], max_new_tokens=10, end_ids=frozenset({end}))
        )
        assert streamed == greedy[0, : greedy[0].tolist().index(end) + 1].tolist()

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ([], "the prompt is empty"),
            ([320], "token 320 of the prompt is outside the model's vocabulary of 320"),
            ([1] * 60, "a prompt of 60 tokens and 10 new ones don't fit the model's context of 64"),
        ],
    )
    def test_invalid_prompts_are_refused_with_a_reason(self, model, prompt, message):
        with pytest.raises(InputError, match=message):
            next(stream(CONFIG, model, prompt, max_new_tokens=10))

    def test_stories260k_is_reproduced(self, shared_data):
        folder = shared_data / "stories260K"
        config, model = load_reference(folder / "hf")
        tokenizer = load_tokenizer(folder / "hf")
        arrays = np.load(folder / "stories260K_reference.npz")
        text_ids = arrays["text_ids"][None].astype(np.int32)
        full = jax.jit(forward, static_argnums=0)
        reference = json.loads((folder / "stories260K_reference.json").read_text())
        for i, case in enumerate(reference["prompts"]):
            ids = tokenizer.encode(case["prompt"], bos=True)
            assert ids == case["ids"]
            padded = np.zeros_like(text_ids)  # padded to the text's shape, to share its program
            padded[0, : len(ids)] = ids
            logits = full(config, model, padded)[0, : len(ids)]
            np.testing.assert_allclose(logits, arrays[f"logits_{i}"], atol=5e-5)
            n = len(case["greedy_ids"])
            assert list(stream(config, model, ids, max_new_tokens=n)) == case["greedy_ids"]
        tokens = list(stream(config, model, [tokenizer.bos_id], max_new_tokens=200))
        assert len(tokens) == 200
        text = "".join(stream_text(tokenizer, [tokenizer.bos_id], iter(tokens)))
        assert text == (folder / "greedy_200_expected.txt").read_text()
        logits = np.asarray(full(config, model, text_ids))[0, :-1]
        nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), text_ids[0, 1:]]
        np.testing.assert_allclose(nll, arrays["text_nll"], atol=5e-5)
        ((_, scored),) = score(config, model, [ScoreRequest(tuple(text_ids[0].tolist()), 1)])
        np.testing.assert_allclose(-scored.logprobs, arrays["text_nll"], atol=5e-5)

    @pytest.mark.parametrize("name", REFERENCES)
    def test_greedy_continuations_are_those_of_metas_code(self, shared_data, name):
        folder = shared_data / "meta_reference" / name
        expected = np.load(folder.parent / "logits.npz")
        config, model = load_reference(folder)
        prompts = expected["tokens"][:, :6]
        lengths, seeds = np.full(2, 6, np.int32), np.zeros(2, np.uint32)
        n = expected["greedy"].shape[1]
        generated = generate(config, model, prompts, lengths, Sampling(), seeds, max_new_tokens=n)
        np.testing.assert_array_equal(generated.tokens_Bn, expected["greedy"])
