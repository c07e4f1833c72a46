"""Each task on local data: a model that knows the answers scores 1, a random one chance."""

import gzip
import json
import math
import random
import re
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED, peer

from llama_jax.errors import InputError
from llama_jax.evaluation.paper_tables import TABLES
from llama_jax.evaluation.tasks import _write_task_files, expand_names, load_tasks, task_names

SAMPLES = SHARED / "data" / "eval_samples"
N = 64  # rows of each task
PROGRAM = "    return a + b\n"


def index_of_key(row: dict[str, Any]) -> int:
    return row["choices"]["label"].index(row["answerKey"])


def hellaswag(i: int) -> dict[str, Any]:
    endings = [f"does thing {i} {j}." for j in range(4)]
    fields = {"activity_label": "Sport", "ctx_a": f"A man {i}.", "ctx_b": "he"}
    return {**fields, "endings": endings, "label": str(i % 4)}


def triviaqa(i: int) -> dict[str, Any]:
    return {
        "question": f"Which one is {i}?",
        "answer": {"value": f"N{i}", "aliases": [f"N{i}", "x"]},
    }


def race(i: int) -> dict[str, Any]:
    options = [f"option {i} {j}" for j in range(4)]
    return {"article": "Text.", "question": "Which?", "options": options, "answer": "ABCD"[i % 4]}


def math_row(i: int) -> dict[str, Any]:
    solution = f"We add and find $\\boxed{{{i}}}$."
    return {"problem": f"What is {i}+0?", "solution": solution, "type": "Algebra"}


def humaneval(i: int) -> dict[str, Any]:
    prompt, test = "def add(a, b):\n", f"def check(f):\n    assert f({i}, 2) == {i + 2}\n"
    fields = {"prompt": prompt, "test": test, "entry_point": "add"}
    return {**fields, "canonical_solution": PROGRAM}


def mbpp(i: int) -> dict[str, Any]:
    tests = [f"assert add({i}, {j}) == {i + j}" for j in range(3)]
    return {"text": "Add two numbers.", "code": f"def add(a, b):\n{PROGRAM}", "test_list": tests,
            "test_setup_code": ""}  # fmt: skip


def truthfulqa(i: int) -> dict[str, Any]:
    targets = {"choices": ["true", f"false {i}", "wrong"], "labels": [1, 0, 0]}
    return {"question": f"Is it {i}?", "mc1_targets": targets, "mc2_targets": targets}


def winogender(i: int) -> dict[str, Any]:
    fields = {"sentence": "The doctor told the patient.", "pronoun": "she"}
    return {**fields, "occupation": "doctor", "participant": "patient", "label": i % 2}


# Task, file, sample or rows, metric, number of choices (0: the model writes an answer), and the
# right choice or answer by the fields of the original data set.
TASKS: list[tuple[str, str, Any, str, int, Any]] = [
    ("boolq", "boolq_validation", "boolq", "acc", 2, lambda r: int(r["answer"])),
    ("paper_boolq", "boolq_validation", "boolq", "acc_relative", 2, lambda r: int(r["answer"])),
    ("piqa", "piqa_validation", "piqa", "acc_norm", 2, lambda r: r["label"]),
    ("social_iqa", "siqa_validation", "siqa", "acc_norm", 3, lambda r: int(r["label"]) - 1),
    ("hellaswag", "hellaswag_validation", hellaswag, "acc_norm", 4, lambda r: int(r["label"])),
    ("winogrande", "winogrande_validation", "winogrande", "acc", 2, lambda r: int(r["answer"]) - 1),
    ("arc_easy", "arc_easy_test", "arc_easy", "acc_norm", 4, index_of_key),
    ("arc_challenge", "arc_challenge_test", "arc_challenge", "acc_norm", 4, index_of_key),
    ("openbookqa", "openbookqa_test", "openbookqa", "acc_norm", 4, index_of_key),
    ("paper_openbookqa", "openbookqa_test", "openbookqa", "acc_relative", 4, index_of_key),
    ("race_middle", "race_middle_test", race, "acc_norm", 4, lambda r: "ABCD".index(r["answer"])),
    ("race_high", "race_high_test", race, "acc_norm", 4, lambda r: "ABCD".index(r["answer"])),
    ("mmlu_virology", "mmlu_test", "mmlu", "acc", 4, lambda r: r["answer"]),
    ("truthfulqa_mc1", "truthfulqa_validation", truthfulqa, "acc", 3, lambda r: 0),
    ("truthfulqa_mc2", "truthfulqa_validation", truthfulqa, "acc", 3, lambda r: 0),
    ("winogender_all", "winogender_test", winogender, "acc", 2, lambda r: r["label"]),
    ("nq_open", "nq_open_validation", "nq_open", "exact_match", 0, lambda r: f" {r['answer'][-1]}"),
    ("paper_nq_open_0shot", "nq_open_validation", "nq_open", "exact_match", 0,
     lambda r: f" {r['answer'][0]}"),
    ("triviaqa", "triviaqa_validation", triviaqa, "exact_match", 0, lambda r: r["answer"]["value"]),
    ("paper_triviaqa_0shot", "triviaqa_validation", triviaqa, "exact_match", 0,
     lambda r: f" the {r['answer']['value']}"),
    ("gsm8k", "gsm8k_test", "gsm8k", "exact_match", 0, lambda r: r["answer"]),
    ("paper_gsm8k", "gsm8k_test", "gsm8k", "exact_match", 0,
     lambda r: f"So. The answer is {r['answer'].split('#### ')[1]}."),
    ("minerva_math_algebra", "math_test", math_row, "exact_match", 0,
     lambda r: "Final Answer: The final answer is $"
     + re.findall(r"boxed\{(.*)\}", r["solution"])[0] + "$. I hope it is correct."),
    ("humaneval", "humaneval_test", humaneval, "pass@1", 0, lambda r: r["canonical_solution"]),
    ("mbpp", "mbpp_test", mbpp, "pass@1", 0, lambda r: r["code"]),
]  # fmt: skip


def rows_of(source: Any) -> list[dict[str, Any]]:
    """Returns N rows: of the sample of the original data set, repeated, or of a function."""
    if callable(source):
        return [source(i) for i in range(4 if source in (humaneval, mbpp, math_row) else N)]
    (path,) = SAMPLES.glob(f"{source}_*_sample.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return (rows * N)[:N]


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(tasks: Any, answer: Any) -> dict[str, dict[str, float]]:
    """Returns the metrics of a model that scores, or answers, by `answer(instance)`."""
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate

    class Model(LM):
        def loglikelihood(self, requests: Any) -> Any:
            return [(answer(request), False) for request in requests]

        def generate_until(self, requests: Any) -> Any:
            return [answer(request) for request in requests]

        def loglikelihood_rolling(self, requests: Any) -> Any:
            raise NotImplementedError

    found = evaluate(
        Model(), tasks, bootstrap_iters=0, log_samples=False, confirm_run_unsafe_code=True
    )
    assert found
    return {
        task: {name.split(",")[0]: value for name, value in metrics.items() if "flex" not in name}
        for task, metrics in found["results"].items()
    }


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """The metrics of a model that knows the answers, and of one that draws them."""
    peer("lm_eval")
    folder = tmp_path_factory.mktemp("data")
    table = {row[0]: row[3:] for row in TASKS if callable(row[2]) or SAMPLES.is_dir()}
    if find_spec("math_verify") is None:  # of the extra
        table = {task: row for task, row in table.items() if "math" not in task}
    for task, file, source, *_ in TASKS:
        if task in table:
            write(folder, f"{file}.jsonl", rows_of(source))
    draw = random.Random(0)

    def oracle(request: Any) -> Any:
        right = table[request.task_name][-1](request.doc)
        return right if isinstance(right, str) else 0.0 if request.idx == right else -1000.0

    def guess(request: Any) -> Any:
        metric, choices, _ = table[request.task_name]
        # Divided by its number of characters, each choice has the same distribution.
        length = len(request.args[1]) - 1 if metric == "acc_norm" else 1
        return -length * draw.random() if choices else "no idea"

    tasks = load_tasks(list(table), folder, 0, run_code=True)
    return measure(tasks, oracle), measure(tasks, guess)


@pytest.mark.parametrize(
    ("task", "source", "metric", "choices"), [(t, s, m, n) for t, _, s, m, n, _ in TASKS]
)
def test_an_oracle_scores_one_and_a_random_model_chance(task, source, metric, choices, scores):
    if task not in scores[0]:
        pytest.skip("needs ../shared/data/eval_samples, or math-verify")
    oracle, guess = (results[task][metric] for results in scores)
    assert oracle == 1
    chance = 1 / choices if choices else 0
    # Each row is a draw that is right with this probability: four standard deviations. mc2 is the
    # probability of the right choices, which varies less.
    assert abs(guess - chance) <= 4 * math.sqrt(chance * (1 - chance) / len(rows_of(source)))


def test_each_task_that_has_a_name_is_tested():
    peer("lm_eval")
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        files = _write_task_files(Path(folder), Path(lm_eval.tasks.__file__).parent)
        names = TaskManager(include_path=str(files), include_defaults=False).all_subtasks
    families = r"mmlu_|minerva_math_|paper_nq_open_|paper_triviaqa_"
    tested = {re.sub(f"({families}).*", r"\1", task) for task, *_ in TASKS}
    assert {re.sub(f"({families}).*", r"\1", name) for name in names} == tested
    columns = {task for table in TABLES.values() for task in table.tasks}
    groups = {"mmlu", "minerva_math"}
    assert columns | {n for n in task_names() if ":" not in n} <= set(names) | groups


def test_choices_relative_to_answer_are_scored_in_two_contexts(tmp_path):
    peer("lm_eval")
    row = {"question": "is it so", "passage": "It is so.", "answer": True}
    write(tmp_path, "boolq_validation.jsonl", [row])
    seen = {}
    # By likelihood 'no' is best; 'yes' gains most from the context.
    scores = {("Q", " no"): -1.0, ("Q", " yes"): -2.0, ("A", " no"): -1.5, ("A", " yes"): -9.0}

    def answer(request: Any) -> float:
        context, completion = request.args
        seen[context, completion] = request.idx
        return scores["A" if context == "Answer:" else "Q", completion]

    tasks = load_tasks(["paper_boolq"], tmp_path)
    assert measure(tasks, answer)["paper_boolq"]["acc_relative"] == 1
    prompt = "It is so.\nQuestion: is it so?\nAnswer:"
    assert seen == {
        (prompt, " no"): 0, (prompt, " yes"): 1, ("Answer:", " no"): 2, ("Answer:", " yes"): 3,
    }  # fmt: skip


def test_examples_come_from_the_training_split_and_never_from_the_scored_rows(tmp_path):
    peer("lm_eval")
    rows = [{"question": f"q{i}", "answer": [f"a{i}"]} for i in range(9)]
    write(tmp_path, "nq_open_validation.jsonl", rows[:2])
    with pytest.raises(InputError, match=r"shows 5 examples, .* has no nq_open_train.jsonl"):
        load_tasks(["nq_open"], tmp_path, 5)
    with gzip.open(tmp_path / "nq_open_train.json.gz", "wt") as file:
        json.dump(rows[2:], file)
    prompts = []

    def answer(request: Any) -> str:
        prompts.append(request.args[0])
        return ""

    measure(load_tasks(["paper_nq_open_5shot"], tmp_path), answer)
    lines = prompts[0].splitlines()
    assert lines[0] == "Answer these questions:"
    assert lines[-2:] == ["Q: q0?", "A:"]
    shown = [re.fullmatch(r"Q: q(\d)\?", line) for line in lines[1:-2:2]]
    numbers = [int(match[1]) for match in shown if match]
    assert len(numbers) == len(set(numbers)) == 5
    assert min(numbers) >= 2
    assert lines[2:-1:2] == [f"A: a{i}" for i in numbers]
    with pytest.raises(InputError, match="has only 7 examples to show: give a smaller --shots"):
        load_tasks(["nq_open"], tmp_path, 64)


def test_mmlu_reads_all_subjects_from_two_files(tmp_path):
    peer("lm_eval")
    rows = rows_of("mmlu")
    subjects = {row["subject"] for row in rows}
    write(tmp_path, "mmlu_test.jsonl", rows)
    with pytest.raises(InputError, match=r"has no rows with subject 'abstract_algebra'"):
        load_tasks(["mmlu"], tmp_path, 0)
    shutil.copy(tmp_path / "mmlu_test.jsonl", tmp_path / "mmlu_dev.jsonl")
    loaded = load_tasks([f"mmlu_{subject}" for subject in subjects], tmp_path)
    assert {task.config.num_fewshot for task in loaded["tasks"].values()} == {5}


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["hellaswg"], {}, r"hellaswg can't read local data \(did you mean hellaswag\?\)"),
        (["paper:maths"], {}, "there is no table paper:maths: choose one of paper:common-sense"),
        (["paper:mmlu"], {"shots": 0}, "--shots 0: the numbers of examples .* are the paper's"),
        (["boolq"], {}, "has no boolq_validation.jsonl .* split 'validation' of .*google/boolq"),
        (["race_high"], {}, r"race_high_test.jsonl .*huggingface.co/datasets/ehovy/race \(high\)"),
        (["mbpp"], {}, "runs the programs that the model writes: add --run-code"),
    ],
)
def test_a_wrong_request_is_refused_in_a_sentence(names, options, message, tmp_path):
    peer("lm_eval")
    write(tmp_path, "mbpp_test.jsonl", [mbpp(0)])
    with pytest.raises(InputError, match=message):
        load_tasks(names, tmp_path, **options)


def test_the_papers_tables_expand_to_tasks():
    assert expand_names(["piqa", "paper:reading", "piqa"]) == ["piqa", "race_middle", "race_high"]
    assert expand_names(["paper:closed-book"], 64) == [
        "paper_nq_open_64shot",
        "paper_triviaqa_64shot",
    ]
    assert expand_names(["paper:mmlu"]) == ["mmlu"]
    assert len(expand_names(["paper:all"])) == 8 + 8 + 2 + 2 + 2 + 1
