"""`llama-jax eval`: results, resumed evaluations, comparisons, bad inputs."""

import importlib.util
import json

import pytest
from conftest import peer, run
from eval_data import write_task_data

from llama_jax.evaluation import jobs


@pytest.fixture
def task_data(shared_data, tmp_path):
    peer("lm_eval")
    return write_task_data(shared_data, tmp_path / "data")


@pytest.fixture
def computed(monkeypatch):
    """The number of requests of each job."""
    sizes = []

    def count(config, model, requests):
        sizes.append(len(requests))
        return score(config, model, requests)

    score = jobs.score
    monkeypatch.setattr(jobs, "score", count)
    return sizes


def test_the_papers_table_is_printed_and_drawn(capsys, model_folder, tmp_path):
    peer("lm_eval")
    data, picture = tmp_path / "data", tmp_path / "tables.png"
    data.mkdir()
    row = {"article": "A a.", "question": "b?", "options": ["a", "b", "c", "d"], "answer": "B"}
    for level in ("middle", "high"):
        (data / f"race_{level}_test.jsonl").write_text(json.dumps(row))
    command = ["eval", model_folder, "--tasks", "paper:reading", "--data", data]
    code, out, err = run(capsys, *command, "--picture", picture)
    assert code == 0, err
    table = out[out.index("Table 6") :].splitlines()
    assert table[9].split() == ["LLaMA", "65B", "67.9", "51.6"]
    name, *values = table[10].split()
    assert name == model_folder.name
    assert values in (["0.0", "0.0"], ["100.0", "100.0"])  # both levels have the same question
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, _, err = run(capsys, "eval", model_folder, "--tasks", "piqb", "--picture", picture)
    assert (code, "add one of them" in err) == (2, True)


@pytest.mark.slow
def test_a_killed_evaluation_computes_only_what_is_missing(
    capsys, model_folder, task_data, tmp_path, computed
):
    out = tmp_path / "results"
    command = ["eval", model_folder, "--tasks", "arc_easy", "--data", task_data, "--limit", 6]
    code, table, err = run(capsys, *command, "--out", out)
    assert code == 0, err
    assert table.splitlines()[0].split() == ["task", "shots", "items", "metric", "value", "stderr"]
    [line] = [line for line in table.splitlines() if " acc " in line]
    results = json.loads((out / "results.json").read_text())
    accuracy = results["tasks"]["arc_easy"]["metrics"]["acc"]
    assert line.split() == [
        "arc_easy", "0", "6", "acc", f"{accuracy['value']:.4f}", "±", f"{accuracy['stderr']:.4f}",
    ]  # fmt: skip
    items = [json.loads(line) for line in (out / "items/arc_easy.jsonl").read_text().splitlines()]
    assert accuracy["value"] == pytest.approx(sum(i["metrics"]["acc"] for i in items) / 6)
    assert results["identity"]["dtype"] == results["config"]["dtype"] == "float32"
    assert results["options"]["limit"] == 6
    assert {"llama_jax", "jax", "lm-eval"} <= results["versions"].keys()
    answers = (out / "answers.jsonl").read_bytes().splitlines(keepends=True)
    assert computed == [len(answers) - 1]

    (out / "answers.jsonl").write_bytes(b"".join(answers[:9]) + answers[9][:20])
    assert run(capsys, *command, "--out", out)[:2] == (0, table)
    assert computed[1:] == [computed[0] - 8]
    assert run(capsys, *command, "--out", out)[:2] == (0, table)
    assert len(computed) == 2
    again = json.loads((out / "results.json").read_text())
    assert again | {"date": 0} == results | {"date": 0}

    code, _, err = run(capsys, *command, "--out", out, "--quantize", "int8")
    assert (code, "contains results with" in err) == (2, True)
    code, _, err = run(capsys, *command, "--out", tmp_path / "int8", "--quantize", "int8")
    assert code == 0, err
    code, compared, _ = run(capsys, "eval", "--compare", out, tmp_path / "int8")
    assert code == 0
    assert compared.startswith(f"arc_easy acc: {accuracy['value']:.4f} → ")
    assert run(capsys, *command[:-1], 5, "--out", tmp_path / "five")[0] == 0
    code, _, err = run(capsys, "eval", "--compare", out, tmp_path / "five")
    assert (code, "the prompts of arc_easy differ between the two results" in err) == (2, True)


def test_a_missing_extra_is_reported_before_the_model_is_loaded(capsys, monkeypatch):
    find_spec = importlib.util.find_spec

    def find_others(name):
        return None if name == "lm_eval" else find_spec(name)

    monkeypatch.setattr("importlib.util.find_spec", find_others)
    code, _, err = run(capsys, "eval", "models/none", "--tasks", "arc_easy")
    assert code == 2
    assert err == (
        "llama-jax eval: evaluating tasks needs lm-eval: install it with"
        " pip install 'llama_jax[eval]'\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no model: give a FOLDER, or --compare A B"),
        (["m"], "give either --tasks or --perplexity"),
        (["m", "--tasks", "a", "--perplexity", "b"], "give either --tasks or --perplexity"),
        (["m", "--tasks", "a", "--limit", "0"], "--limit must be at least 1, not 0"),
        (["m", "--tasks", "a", "--shots", "-1"], "--shots must be at least 0, not -1"),
        (["m", "--tasks", "a", "--out", "ftp://a/b"], "URLs of ftp: are not supported"),
    ],
)
def test_bad_arguments_are_refused(capsys, arguments, message):
    code, _, err = run(capsys, "eval", *arguments)
    assert (code, message in err) == (2, True), err


def test_results_can_not_be_written_into_a_bucket(capsys, model_folder, task_data):
    command = ["eval", model_folder, "--tasks", "arc_easy", "--out", "gs://bucket/results"]
    code, _, err = run(capsys, *command)
    assert (code, "give a local folder" in err) == (2, True)
