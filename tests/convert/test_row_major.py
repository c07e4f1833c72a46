import numpy as np
import pytest
from blake3 import blake3

from llama_jax.convert.receipt import tensor_hash
from llama_jax.convert.row_major import row_major

MATRIX = np.random.default_rng(0).integers(0, 1 << 16, (300, 2500), np.uint16)  # several tiles


@pytest.mark.parametrize("array", [
    MATRIX, MATRIX.T, MATRIX[::2].T, MATRIX[:, 7:1999].T, MATRIX[0], MATRIX[:1].T, MATRIX[:0].T,
    np.broadcast_to(MATRIX[0], (3, 2500)),
])  # fmt: skip
def test_any_order_of_an_array_is_copied_and_hashed_in_row_major_order(array):
    expected = np.array(array, order="C")
    copied = row_major(array)
    assert copied.flags.c_contiguous
    np.testing.assert_array_equal(copied, expected)
    assert tensor_hash(array) == blake3(expected.tobytes()).hexdigest()


def test_an_array_in_row_major_order_is_not_copied():
    assert np.shares_memory(row_major(MATRIX), MATRIX)
