"""Models load onto a fitting mesh, in the compute dtype that is fastest on the machine."""

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from conftest import mesh_of, tiny_model

import llama_jax as lj
from llama_jax.checkpoint.model_folders import save_model
from llama_jax.errors import InputError
from llama_jax.inference import load as load_module
from llama_jax.inference.load import load
from llama_jax.model.weights import Llama
from llama_jax.parallel.mesh import one_device_mesh

# Over 8 devices and over 6.
SHAPES = [
    {"n_kv_heads": 8},
    {"n_heads": 6, "n_kv_heads": 6, "hidden_dim": 60, "vocab_size": 300, "dtype": "bfloat16"},
]
forward = jax.jit(lj.forward, static_argnums=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    paths = []
    for i, shape in enumerate(SHAPES):
        config = tiny_model(**shape, param_dtype=shape.get("dtype", "float32"))
        paths.append(tmp_path_factory.mktemp("models") / str(i))
        with jax.set_mesh(one_device_mesh()):
            model = jax.jit(Llama, static_argnums=0)(config, jax.random.key(0))
            save_model(paths[-1], config, model, None)
    return paths


def test_each_model_loads_onto_its_own_mesh(folders):
    tokens_BT = np.array([[1, 2, 3]])

    def load_both():  # in a thread, which has its own current mesh
        wide = load(folders[0])
        assert jax.sharding.get_mesh().size == 8
        narrow = load(folders[1])
        assert jax.sharding.get_mesh().size == 6
        assert forward(*narrow, tokens_BT).shape == (1, 3, 300)
        for use in (forward, lj.forward):
            with pytest.raises(InputError, match=r"another mesh \(.*tensor 8\) than .*tensor 6\)"):
                use(*wide, tokens_BT)
        with jax.set_mesh(wide[1].norm[...].sharding.mesh):
            assert forward(*wide, tokens_BT).shape == (1, 3, 320)
        assert jax.sharding.get_mesh().size == 6

    with ThreadPoolExecutor(1) as thread:
        thread.submit(load_both).result()


def test_a_mesh_that_the_caller_set_is_used_or_refused(folders):
    with jax.set_mesh(mesh_of((1, 1, 4))):
        load(folders[0])
        assert jax.sharding.get_mesh().size == 4
        with pytest.raises(InputError, match=r"tensor 4 does not divide model.n_heads \(6\)"):
            load(folders[1])


@pytest.mark.usefixtures("one_device")
def test_a_cpu_without_bfloat16_computes_in_float32(folders, monkeypatch):
    dtypes = {}
    for units in (True, False):
        monkeypatch.setattr(load_module, "cpu_has_bfloat16", lambda units=units: units)
        config, model = load(folders[1])
        dtypes[units] = config.dtype, config.param_dtype, str(model.layers[0].w1[...].dtype)
        assert load(folders[0])[0].dtype == "float32"
    assert dtypes == {True: ("bfloat16",) * 3, False: ("float32",) * 3}
    huge = lj.FAMILY["llama3.1-405b"]  # 1.6 TB in float32
    assert load_module.choose_compute_dtype(huge) == huge


BAD_TOKENS = [
    ([[1, 2], [3]], "the tokens are not an array [B, T]: give rows of equal length"),
    ([1, 2, 3], "the tokens must be integers [B, T], not int64 [3]"),
    (np.array([[1.5]]), "the tokens must be integers [B, T], not float64 [1, 1]"),
    ([["a"]], "the tokens must be integers [B, T]"),
    ([[1, 320]], "the token 320 is not in the vocabulary: ids are 0 to 319"),
    (np.array([[-1, 3]]), "the token -1 is not in the vocabulary"),
    ([[1 << 40]], "the token 1099511627776 is not in the vocabulary"),
]


def test_tokens_are_lists_or_arrays_and_invalid_ones_are_refused_with_a_reason(folders):
    with jax.set_mesh(mesh_of((1, 1, 2))):
        config, model = load(folders[0])
        expected = forward(config, model, np.array([[1, 2, 3]], np.int32))
        for function, tokens in [
            (lj.forward, [[1, 2, 3]]),
            (forward, [[1, 2, 3]]),
            (forward, jax.numpy.array([[1, 2, 3]])),
        ]:
            found = function(config, model, tokens, [[0, 1, 2]], [[1, 1, 1]])
            np.testing.assert_allclose(found, expected, atol=1e-5)
        for tokens, message in BAD_TOKENS:
            with pytest.raises(InputError) as raised:
                lj.forward(config, model, tokens)
            assert message in str(raised.value)
        with pytest.raises(InputError, match="must be integers"):
            forward(config, model, [1, 2, 3])
        options = {"max_new_tokens": 2}
        tokens = [
            lj.generate(config, model, rows, lengths, lj.Sampling(), seeds, **options).tokens_Bn
            for rows, lengths, seeds in (
                ([[1, 2, 3]], [3], [0]),
                (np.array([[1, 2, 3]]), np.array([3]), np.array([0])),
            )
        ]
        np.testing.assert_array_equal(*tokens)
