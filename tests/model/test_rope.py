import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model

from llama_jax.config.model import RopeScaling
from llama_jax.model.rope import apply_rope, rope_frequencies, rope_sin_cos


@pytest.mark.parametrize(
    "name", ["llama1_mha", "llama2_mha", "llama2_gqa", "llama3_gqa", "llama31_scaled"]
)
def test_angles_equal_those_of_metas_code(shared_data, name):
    folder = shared_data / "meta_reference" / name
    params = json.loads((folder / "info.json").read_text())["params"]
    expected = np.load(folder / "logits.npz")["rope_angle_per_position"]
    scaled = params.get("use_scaled_rope", False)
    config = tiny_model(
        head_dim=params["dim"] // params["n_heads"],
        rope_theta=params.get("rope_theta", 10_000.0),
        rope_scaling=RopeScaling(factor=8.0) if scaled else None,
    )
    # Both are float32 powers: they may differ in the last bit, 6e-8 for an angle of at most 1.
    np.testing.assert_allclose(rope_frequencies(config), expected, rtol=2e-7)


def test_rotation_preserves_norms_and_scores_depend_only_on_distance():
    config = tiny_model(head_dim=16)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def at(x, position):
        return apply_rope(x, rope_sin_cos(config, jnp.array([[position]])))

    assert np.allclose(jnp.linalg.norm(at(q, 37)), jnp.linalg.norm(q), rtol=1e-6)
    near = jnp.sum(at(q, 5) * at(k, 2))
    far = jnp.sum(at(q, 35) * at(k, 32))
    # Angles of up to 35 rad have a rounding error of 2e-6; the scores are about 4.
    assert abs(near - far) < 2e-5


def test_scaling_stretches_only_long_wavelengths():
    plain = rope_frequencies(tiny_model(head_dim=64, rope_theta=5e5))
    scaled = rope_frequencies(tiny_model(head_dim=64, rope_theta=5e5, rope_scaling=RopeScaling()))
    wavelength = 2 * np.pi / plain
    assert np.array_equal(scaled[wavelength < 2048], plain[wavelength < 2048])
    assert np.allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8)
    between = (wavelength > 2048) & (wavelength < 8192)
    assert between.any()
    assert np.all((scaled < plain)[between] & (scaled > plain / 8)[between])
