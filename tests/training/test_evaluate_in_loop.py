"""Evaluation on tasks during a run: on its mesh, with its weights, into its metrics."""

import json

import pytest
from conftest import peer, run, tiny_model
from eval_data import write_task_data

from llama_jax.config import yaml_file
from llama_jax.config.mesh import MeshConfig
from llama_jax.config.run import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    TrainingConfig,
)
from llama_jax.errors import InputError
from llama_jax.training import loop
from llama_jax.training.loss_figure import draw_losses
from llama_jax.training.metrics import read_metrics

TASKS = {"tasks": ["arc_easy"], "every": 2, "limit": 8}


def run_config(folder, tokens, evaluate, lora=None, init_from=None, **mesh):
    return Config(
        model=tiny_model(context=128),
        mesh=MeshConfig(**mesh),
        data=DataConfig(mixture={str(tokens): 1.0}, batch_size=8, seq_len=16),
        lora=lora,
        training=TrainingConfig(
            out=str(folder / "run"), init_from=init_from and str(init_from), steps=4,
            eval_every=0, eval_batches=1, evaluate=evaluate,
        ),
        checkpoint=CheckpointConfig(every=4),
        logging=LoggingConfig(progress=False, tensorboard=False),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_the_last_result_of_a_run_is_that_of_the_command(
    capsys, token_folder, model_folder, shared_data, tmp_path, lora
):
    peer("lm_eval")
    data = write_task_data(shared_data, tmp_path / "data")
    config = run_config(
        tmp_path, token_folder, TASKS | {"data": str(data)}, lora, model_folder, data=2, fsdp=2,
        tensor=2,
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml_file.dump(config))
    code, _, err = run(capsys, "train", tmp_path / "run.yaml")
    assert code == 0, err
    records = [r for r in read_metrics(tmp_path / "run/metrics.jsonl") if "eval/arc_easy/acc" in r]
    assert [r["step"] for r in records] == [2, 4]
    command = ["eval", tmp_path / "run", "--tasks", "arc_easy", "--data", data, "--limit", 8]
    code, _, err = run(capsys, *command, "--out", tmp_path / "results")
    assert code == 0, err
    results = json.loads((tmp_path / "results/results.json").read_text())
    for name, measured in results["tasks"]["arc_easy"]["metrics"].items():
        assert records[-1][f"eval/arc_easy/{name}"] == measured["value"]
    assert (tmp_path / "run/loss.png").is_file()


def test_a_run_without_the_function_that_evaluates_is_refused(token_folder, tmp_path):
    with pytest.raises(InputError, match=r"training\.evaluate needs a function that evaluates"):
        loop.run(run_config(tmp_path, token_folder, TASKS, fsdp=8))
    assert not (tmp_path / "run").exists()


def test_tasks_on_a_mesh_that_splits_sequences_are_refused(capsys, token_folder, tmp_path):
    peer("lm_eval")
    config = run_config(tmp_path, token_folder, TASKS, context=2, fsdp=4)
    (tmp_path / "run.yaml").write_text(yaml_file.dump(config))
    code, _, err = run(capsys, "train", tmp_path / "run.yaml")
    assert (code, "training.evaluate needs mesh.context 1, not 2" in err) == (2, True)


def test_the_figure_shows_results_on_tasks_in_a_panel_of_their_own(tmp_path):
    import matplotlib.image

    lines = [{"step": step, "loss": 3.0 - step} for step in (1, 2)]
    heights = []
    for more in ([], [{"step": 2, "eval/arc_easy/acc": 0.5, "eval/arc_easy/acc_norm": None}]):
        text = "".join(json.dumps(line) + "\n" for line in lines + more)
        (tmp_path / "metrics.jsonl").write_text(text)
        heights.append(len(matplotlib.image.imread(draw_losses(tmp_path, None))))
    assert heights == [540, 1080]
