import jax
import numpy as np
import pytest
from conftest import MESHES, mesh_of

from llama_jax.inference.logit_limits import (
    full_mask,
    init_bias,
    limit_logits,
    mask_to_text,
    masks_from_text,
    only_token,
)
from llama_jax.parallel.mesh import shard_array

V, ROWS = 96 - 8, 8  # V: no multiple of 32
LOGITS = np.random.default_rng(0).normal(0, 3, (ROWS, V)).astype(np.float32)
LOGITS[0, :3] = -0.0
BIASES = [(), ((3, 2.5), (87, -100.0)), (), ((0, 0.5),), (), (), (), ()]
ALLOWED = np.random.default_rng(1).random((ROWS, V)) < 0.5
ALLOWED[[0, 1, 4]] = True


def packed(allowed_BV):
    """Returns a mask with the bits of `allowed_BV`, and ones after them in unrestricted rows."""
    padded = np.pad(allowed_BV, [(0, 0), (0, -V % 32)], mode="edge")
    padded[np.all(allowed_BV, axis=1)] = True
    return np.packbits(padded, axis=1, bitorder="little").view(np.uint32)


@pytest.mark.parametrize("shape", MESHES)
def test_limits_equal_numpys_on_every_mesh(shape):
    expected = LOGITS.copy()
    for row, pairs in zip(expected, BIASES, strict=True):
        for token, bias in pairs:
            row[token] += np.float32(bias)
    expected[~ALLOWED] = -np.inf
    with jax.set_mesh(mesh_of(shape)):
        logits_BV = shard_array(LOGITS, "BV")
        bias, mask_BW = init_bias(V, BIASES), shard_array(packed(ALLOWED), "BS")
        limited = np.asarray(jax.jit(limit_logits)(bias, mask_BW, logits_BV))
        assert limited.tobytes() == expected.tobytes()
        free = jax.jit(limit_logits)(init_bias(V, [()] * ROWS), full_mask(ROWS, V), logits_BV)
        assert np.asarray(free).tobytes() == LOGITS.tobytes()
        tokens = np.arange(ROWS, dtype=np.int32) * 11
        only = only_token(mask_BW, shard_array(tokens, "B"))
        hot = np.where(np.all(ALLOWED, axis=1)[:, None], True, np.arange(V) == tokens[:, None])
        assert np.asarray(only).tobytes() == packed(hot).tobytes()


def test_masks_pass_through_text():
    mask_BW = packed(ALLOWED)
    texts = [mask_to_text(mask_W) for mask_W in mask_BW]
    assert masks_from_text(["", *texts], V)[1:].tobytes() == mask_BW.tobytes()
    assert masks_from_text([""], V).tolist() == [[2**32 - 1] * 3]
    assert masks_from_text([mask_to_text(mask_BW[2, :1])], V).tolist() == [[mask_BW[2, 0], 0, 0]]
