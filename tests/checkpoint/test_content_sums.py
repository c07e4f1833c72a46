import hashlib
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.checkpoint.content_sums import block_sum, complete_sums

SHAPE, CHUNK = (3, 4, 7), (1, 3, 5)  # chunks at the ends are smaller, and divide words


def reference(values, chunk):
    """The definition, element by element."""
    total = 0
    bits = values.view(f"u{values.itemsize}")
    for index in np.ndindex(values.shape):
        position = [i // size for i, size in zip(index, chunk, strict=True)]
        digest = hashlib.sha256(str(position).encode()).digest()
        factor = int.from_bytes(digest[:8], "little")
        shift = 8 * values.itemsize * (index[-1] % (8 // values.itemsize))
        total += (int(bits[index]) << shift) * factor
    return total % (1 << 64)


def numbers(dtype, shape=SHAPE):
    bits = np.random.default_rng(0).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
    return np.ascontiguousarray(bits).view(dtype)[..., 0]


@pytest.mark.parametrize("dtype", ["float32", jnp.bfloat16, "float16", "int8", "int32"])
def test_any_division_into_blocks_has_the_sum_of_the_definition(dtype):
    values = numbers(dtype)
    cuts = [[0, 3], [0, 1, 4], [0, 1, 4, 6, 7]]
    total = 0
    for piece in itertools.product(*map(itertools.pairwise, cuts)):
        block = values[tuple(slice(a, b) for a, b in piece)]
        total += block_sum(block, [a for a, _ in piece], CHUNK)
    assert block_sum(values, (0, 0, 0), CHUNK) == total % (1 << 64) == reference(values, CHUNK)


def test_the_parts_of_hosts_are_added_modulo_64_bits():
    assert complete_sums([{"a": (1 << 64) - 1, "b": 3}, {"a": 17}]) == {
        "a": f"{16:016x}",
        "b": f"{3:016x}",
    }


def test_a_scalar_has_a_sum():
    assert block_sum(np.array(7, np.int32), (), ()) != block_sum(np.array(8, np.int32), (), ())


def test_exchanged_chunks_change_the_sum():
    values = numbers("float32", (4, 6))
    sums = {block_sum(values[order], (0, 0), (1, 6)) for order in map(list, ORDERS)}
    assert len(sums) == len(ORDERS) == 24


ORDERS = list(itertools.permutations(range(4)))
