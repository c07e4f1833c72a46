"""Orbax reads what this project writes."""

import jax
import numpy as np
from conftest import mesh_of
from orbax.checkpoint import v1 as ocp
from test_training_checkpoints import CONFIG

from llama_jax.checkpoint.model_folders import load_model, save_model
from llama_jax.checkpoint.tree import tree_to_dict
from llama_jax.model.weights import Llama


def test_orbax_reads_a_model_folder_bit_for_bit(tmp_path):
    with jax.set_mesh(mesh_of((2, 2, 2))):
        model = Llama(CONFIG.model, jax.random.key(0))
        save_model(tmp_path / "m", CONFIG.model, model, None)
        loaded = ocp.load_checkpointables(str(tmp_path / "m" / "weights"))["model"]
    saved = tree_to_dict(model)
    assert jax.tree.structure(loaded) == jax.tree.structure(saved)
    for theirs, ours in zip(jax.tree.leaves(loaded), jax.tree.leaves(saved), strict=True):
        assert theirs.dtype == ours.dtype
        np.testing.assert_array_equal(theirs, ours)
    with jax.set_mesh(mesh_of((1, 1, 1))):
        assert load_model(tmp_path / "m")[0] == CONFIG.model
