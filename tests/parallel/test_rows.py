import jax
import numpy as np
import pytest
from conftest import mesh_of

from llama_jax.parallel.mesh import shard_array
from llama_jax.parallel.rows import number_rows, put_rows, take_rows


@pytest.mark.parametrize(
    ("mesh", "numbers"),
    [((1, 1, 1), [4]), ((2, 1, 4), [1, 4]), ((2, 1, 4), [5]), ((1, 2, 2), [2]), ((2, 1, 2), [])],
)
def test_only_the_numbered_rows_are_taken_and_replaced(mesh, numbers):
    batch = np.random.default_rng(0).normal(size=(6, 8, 3)).astype(np.float32)
    copies = mesh[0] * mesh[1]
    with jax.set_mesh(mesh_of(mesh)):
        x_BVS, rows = shard_array(batch, "BVS"), number_rows(numbers, 6)
        taken = np.asarray(jax.jit(take_rows)(x_BVS, rows))
        new = shard_array(np.full((copies, 8, 3), 7, np.float32), "BVS")
        replaced = np.asarray(jax.jit(put_rows)(x_BVS, new, rows))
    expected = batch.copy()
    expected[numbers] = 7
    np.testing.assert_array_equal(replaced, expected)
    for number in numbers:
        np.testing.assert_array_equal(taken[number * copies // 6], batch[number])
