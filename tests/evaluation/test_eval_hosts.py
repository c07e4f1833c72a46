"""An evaluation by several real processes: host 0 runs the harness, all compute."""

import json

import pytest
from conftest import peer, run
from eval_data import write_task_data
from processes import Group

from llama_jax.convert.convert import convert


def generated(out):
    """Returns the generated tokens of an evaluation, by request."""
    lines = (out / "answers.jsonl").read_text().splitlines()[1:]
    answers = dict(json.loads(line) for line in lines)
    return {key: ids for key, ids in answers.items() if not isinstance(ids[-1], bool)}


@pytest.mark.slow
def test_two_processes_have_the_results_of_one(capsys, shared_data, tmp_path):
    peer("lm_eval")
    data = write_task_data(shared_data, tmp_path / "data")
    model = tmp_path / "stories"
    convert(shared_data / "stories260K/meta", model)
    command = ["eval", model, "--data", data, "--limit", 4, "--tasks"]
    generates = "arc_easy,nq_open"
    runs = {"arc_easy": [], generates: ["--mesh", "data=2,tensor=2"]}
    results = []
    for i, (tasks, mesh) in enumerate(runs.items()):
        out = tmp_path / f"two{i}"
        argv = *command, tasks, *mesh, "--out", out
        group = Group(tmp_path / f"group{i}", 2, *argv, devices=4)
        assert group.wait() == [0, 0], group.outputs("err")
        # Gloo prints on the standard output of each process, and host 0 the results.
        assert ["arc_easy" in output for output in group.outputs("out")] == [True, False]
        results.append(json.loads((out / "results.json").read_text()))
    code, _, err = run(capsys, *command, generates, "--out", tmp_path / "one")
    assert code == 0, err
    one = json.loads((tmp_path / "one/results.json").read_text())
    first, both = (found["tasks"] for found in results)
    assert both == one["tasks"]
    assert first["arc_easy"] == one["tasks"]["arc_easy"]
    tokens = generated(tmp_path / "one")
    assert len(tokens) == 4
    assert generated(tmp_path / "two1") == tokens
    assert [found["mesh"] for found in results] == [
        {"data": 1, "fsdp": 2, "context": 1, "tensor": 2},
        {"data": 2, "fsdp": 1, "context": 1, "tensor": 2},
    ]
