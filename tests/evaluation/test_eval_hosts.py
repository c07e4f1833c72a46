"""An evaluation by several real processes: host 0 runs the harness, all compute."""

import json

import pytest
from conftest import peer, run
from eval_data import write_task_data
from processes import Group


@pytest.mark.slow
def test_two_processes_have_the_results_of_one(capsys, model_folder, shared_data, tmp_path):
    peer("lm_eval")
    data = write_task_data(shared_data, tmp_path / "data")
    command = ["eval", model_folder, "--data", data, "--limit", 8]
    results = []
    for i, mesh in enumerate(([], ["--mesh", "data=2,fsdp=2,tensor=2"])):
        argv = [*command, "--tasks", "arc_easy", *mesh]
        out = tmp_path / f"two{i}"
        group = Group(tmp_path / f"group{i}", 2, *argv, "--out", out)
        assert group.wait() == [0, 0], group.outputs("err")
        # Gloo prints on the standard output of each process, and host 0 the results.
        assert ["arc_easy" in output for output in group.outputs("out")] == [True, False]
        results.append(json.loads((out / "results.json").read_text()))
    code, _, err = run(capsys, *command, "--tasks", "arc_easy", "--out", tmp_path / "one")
    assert code == 0, err
    one = json.loads((tmp_path / "one/results.json").read_text())
    assert [found["tasks"] for found in results] == [one["tasks"]] * 2
    assert [found["mesh"] for found in results] == [
        {"data": 1, "fsdp": 2, "context": 1, "tensor": 4},
        {"data": 2, "fsdp": 2, "context": 1, "tensor": 2},
    ]
