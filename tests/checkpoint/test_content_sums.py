import hashlib
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.checkpoint.content_sums import block_sum, complete_sums

SHAPE, CHUNK = (3, 4, 7), (1, 3, 5)  # chunks at the ends are smaller, and divide 32-bit words


def reference(values, chunk):
    """The definition, element by element."""
    total = 0
    bits = values.view(f"u{values.itemsize}")
    for index in np.ndindex(values.shape):
        position = [i // size for i, size in zip(index, chunk, strict=True)]
        digest = hashlib.sha256(str(position).encode()).digest()
        factor = int.from_bytes(digest[:8], "little") | 1
        shift = 8 * values.itemsize * (index[-1] % (4 // values.itemsize))
        total += (int(bits[index]) << shift) * factor
    return total


def numbers(dtype, shape=SHAPE):
    bits = np.random.default_rng(0).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
    return np.ascontiguousarray(bits).view(dtype)[..., 0]


@pytest.mark.parametrize("dtype", ["float32", jnp.bfloat16, "float16", "int8", "int32"])
def test_any_division_into_blocks_has_the_same_sum(dtype):
    values = numbers(dtype)
    cuts = [[0, 3], [0, 1, 4], [0, 1, 4, 6, 7]]
    total = 0
    for piece in itertools.product(*map(itertools.pairwise, cuts)):
        block = values[tuple(slice(a, b) for a, b in piece)]
        total += block_sum(block, [a for a, _ in piece], CHUNK)
    expected = [complete_sums([{"a": block_sum(values, (0, 0, 0), CHUNK)}])]
    expected.append(complete_sums([{"a": total - 5}, {"a": 5}]))
    assert expected[0] == expected[1]
    assert len(expected[0]["a"]) == 16


@pytest.mark.parametrize("dtype", ["float32", jnp.bfloat16, "int8"])
def test_the_sum_is_that_of_its_definition_if_no_word_overflows(dtype):
    """In a chunk the words are added modulo 2³²: here few of their bits are set."""
    unsigned = f"u{np.dtype(dtype).itemsize}"
    values = (numbers(dtype).view(unsigned) & 3).view(dtype)
    assert block_sum(values, (0, 0, 0), CHUNK) == reference(values, CHUNK) % (1 << 64)


def test_a_scalar_has_a_sum():
    assert block_sum(np.array(7, np.int32), (), ()) != block_sum(np.array(8, np.int32), (), ())


def test_exchanged_chunks_change_the_sum():
    values = numbers("float32", (4, 6))
    sums = {block_sum(values[order], (0, 0), (1, 6)) for order in map(list, ORDERS)}
    assert len(sums) == len(ORDERS) == 24


ORDERS = list(itertools.permutations(range(4)))
