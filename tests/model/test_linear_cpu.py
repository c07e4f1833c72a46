import platform

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model.linear_cpu import einsum_float32
from llama_jax.parallel.mesh import one_device_mesh
from llama_jax.runtime.cpu import cpu_has_bfloat16


@pytest.mark.parametrize(
    ("equation", "x_shape", "dy_shape", "rows"),
    [
        ("MD,MF->DF", (96, 24), (96, 40), 96),
        ("MD,MNH->DNH", (96, 24), (96, 5, 8), 96),
        ("MNH,MD->NHD", (96, 5, 8), (96, 24), 96),
        ("BTD,BTV->DV", (3, 32, 24), (3, 32, 40), 96),
        ("MD,MF->DF", (7, 24), (7, 40), 7),  # which no block divides
    ],
)
def test_the_gradient_of_a_bfloat16_weight_has_a_kernel_and_equals_float64(
    equation, x_shape, dy_shape, rows
):
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=n), jnp.bfloat16) for n in (x_shape, dy_shape))
    with jax.set_mesh(one_device_mesh()):
        gradient = jax.jit(einsum_float32, static_argnums=0).lower(equation, x, dy).compile()
        dw = gradient(x, dy)
    if rows != 7 and platform.machine() == "x86_64" and cpu_has_bfloat16():
        assert "__ynn_fusion" in (gradient.as_text() or "")
    assert dw.dtype == jnp.float32
    # The products are exact. Each sum is rounded by at most 2^-24 of the sum of the magnitudes.
    x, dy, dw = (np.asarray(a, np.float64) for a in (x, dy, dw))
    bound = rows * 2.0**-24 * np.einsum(equation, abs(x), abs(dy))
    assert np.all(abs(dw - np.einsum(equation, x, dy)) <= bound)
