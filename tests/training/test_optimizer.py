from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from conftest import tiny_model

from llama_jax.config.run import OptimizerConfig
from llama_jax.model.weights import Llama
from llama_jax.training.optimizer import decay_mask, learning_rate


def rate(config, steps, step):
    """Returns the learning rate of `step` (1 is the first), in float64."""
    peak, last, warmup = config.peak_lr, config.final_lr_fraction, config.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    if config.schedule == "cosine":
        progress = (step - warmup) / (max(steps, warmup + 1) - warmup)
        return peak * (last + (1 - last) * (1 + np.cos(np.pi * progress)) / 2)
    start = steps - config.decay_steps
    if config.decay_steps == 0 or step <= start:
        return peak
    return peak * (1 - (1 - last) * np.sqrt((step - start) / config.decay_steps))


@pytest.mark.parametrize(
    ("schedule", "warmup", "decay", "last", "steps"),
    [
        ("cosine", 2000, 0, 0.1, 250_000),
        ("cosine", 1, 0, 0.0, 10),
        ("cosine", 0, 0, 0.1, 5),
        ("cosine", 10, 0, 0.1, 10),
        ("wsd", 2000, 0, 0.1, 250_000),
        ("wsd", 2000, 50_000, 0.0, 250_000),
        ("wsd", 2000, 50_000, 0.1, 20_000_000),  # float32 doesn't represent all step numbers
        ("wsd", 0, 5, 0.1, 5),
        ("wsd", 4, 6, 0.5, 10),
        ("wsd", 10, 0, 0.1, 10),
        ("wsd", 20, 0, 0.1, 10),
        ("wsd", 3, 1, 0.1, 10),
    ],
)
def test_the_schedule_is_that_of_the_paper(schedule, warmup, decay, last, steps):
    config = OptimizerConfig(
        peak_lr=3e-4,
        schedule=schedule,
        warmup_steps=warmup,
        decay_steps=decay,
        final_lr_fraction=last,
    )
    ours = jax.jit(learning_rate(config, steps))
    start = steps - decay
    marks = {1, 2, warmup, warmup + 1, steps // 2, start, start + 1, start + 2, steps - 1, steps}
    for step in sorted(mark for mark in marks if 1 <= mark <= steps):
        expected = rate(config, steps, step)
        assert float(ours(step - 1)) == pytest.approx(expected, rel=1e-5, abs=1e-10), step
    assert float(ours(0)) > 0
    if schedule == "cosine" or decay:
        expected = 3e-4 * (last if steps > warmup else 1)
        assert float(ours(steps - 1)) == pytest.approx(expected, rel=1e-5, abs=1e-10)
    else:  # neither in the last step nor after it
        stable = np.float32(3e-4) * min(1, steps / warmup)
        assert float(ours(steps - 1)) == pytest.approx(stable, rel=1e-6)
        assert float(ours(10 * steps)) == np.float32(3e-4)


def test_before_its_decay_a_wsd_run_of_any_length_has_the_same_rates_bit_for_bit():
    config = OptimizerConfig(schedule="wsd", warmup_steps=7)
    lengths = [(50, 0), (90, 0), (100, 30), (64, 14)]
    rates = [
        jax.jit(jax.vmap(learning_rate(replace(config, decay_steps=decay), steps)))(np.arange(50))
        for steps, decay in lengths
    ]
    for other in rates[1:]:
        np.testing.assert_array_equal(rates[0], other)
    assert set(np.asarray(rates[0][6:]).tolist()) == {float(np.float32(config.peak_lr))}


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
