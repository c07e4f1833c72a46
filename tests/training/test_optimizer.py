import math
from functools import partial

import jax
import numpy as np
import pytest
from conftest import tiny_model

from llama_jax.config.run import OptimizerConfig
from llama_jax.model.weights import Llama
from llama_jax.training.optimizer import decay_mask, learning_rate


@pytest.mark.parametrize(("warmup", "steps"), [(2000, 250_000), (1, 10), (0, 5), (10, 10)])
def test_the_schedule_is_that_of_the_paper(warmup, steps):
    config = OptimizerConfig(peak_lr=3e-4, warmup_steps=warmup)
    schedule = learning_rate(config, steps)

    def expected(step):  # 1 is the first
        if step <= warmup:
            return 3e-4 * step / warmup
        progress = (step - warmup) / (max(steps, warmup + 1) - warmup)
        return 3e-4 * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)

    for step in sorted({1, 2, warmup, warmup + 1, steps // 2, steps - 1, steps} - {0}):
        assert float(schedule(step - 1)) == pytest.approx(expected(step), rel=1e-5)
    assert float(schedule(0)) > 0
    if steps > warmup:
        assert float(schedule(steps - 1)) == pytest.approx(3e-5, rel=1e-5)


@pytest.mark.usefixtures("one_device")
def test_matrices_decay_and_norms_do_not():
    model = jax.eval_shape(partial(Llama, tiny_model()), jax.random.key(0))
    leaves = jax.tree.leaves_with_path(decay_mask(model))
    decays = {jax.tree_util.keystr(path): value for path, value in leaves}
    exempt = {name for name, value in decays.items() if not value}
    assert exempt == {name for name in decays if "norm" in name}
    assert len(exempt) == 3
    assert len(decays) == 12
    assert np.sum(list(decays.values())) == 9
