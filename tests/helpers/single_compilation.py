"""A plan for the TPU that compiles one program instead of three."""

import pytest

from llama_jax.plan import training_program


def compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the complete step of a run with one layer for its unrolled layers too.

    A compilation takes about 15 seconds of CPU time. `tests/plan/test_training.py` has a plan of
    all three.
    """
    compile_train_step, compiled = training_program.compile_train_step, []

    def compile_first(config, mesh, chip):
        if not compiled:
            assert config.model.n_layers == 1
            compiled.append(compile_train_step(config, mesh, chip))
        return compiled[0]

    monkeypatch.setattr(training_program, "compile_train_step", compile_first)
