"""Several drawn answers to an item: pass@k and maj1@k."""

import itertools
from collections import defaultdict
from importlib.util import find_spec

import pytest
from conftest import peer
from test_tasks import humaneval, math_row, measure, rows_of, write

from llama_jax.cli.main import main
from llama_jax.errors import InputError
from llama_jax.evaluation.drawn_answers import majority, pass_at
from llama_jax.evaluation.tasks import load_tasks


@pytest.mark.parametrize(("n", "n_right"), [(1, 0), (1, 1), (6, 0), (6, 2), (6, 5), (6, 6)])
def test_pass_at_k_is_the_share_of_the_choices_of_k_that_contain_a_right_one(n, n_right):
    for k in range(1, n + 1):
        choices = list(itertools.combinations([True] * n_right + [False] * (n - n_right), k))
        assert pass_at(k, n, n_right) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_the_answer_that_was_drawn_first_wins_a_tie():
    assert majority(["b", "a", "a", "b"]) == "b"


def answers_in_turn(by_item):
    """Returns a model that gives the answers to each item in turn."""
    drawn = defaultdict(int)

    def answer(request):
        settings = request.args[1]
        assert (settings["do_sample"], settings["temperature"]) == (True, 0.5)
        item = request.task_name, request.doc_id
        drawn[item] += 1
        return by_item(request.doc)[drawn[item] - 1]

    return answer


def test_programs_have_pass_at_k(tmp_path):
    peer("lm_eval")
    write(tmp_path, "humaneval_test.jsonl", [humaneval(0), humaneval(1)])
    tasks = load_tasks(["humaneval"], tmp_path, run_code=True, samples=12, temperature=0.5)

    def programs(doc):
        n_right = 3 if doc == tasks["tasks"]["humaneval"].eval_docs[0] else 0
        return [doc["canonical_solution"]] * n_right + ["    return None\n"] * (12 - n_right)

    found = measure(tasks, answers_in_turn(programs))["humaneval"]
    for k in (1, 10, 12):
        assert found[f"pass@{k}"] == pytest.approx(pass_at(k, 12, 3) / 2)
    assert not {"pass@80", "pass@100"} & found.keys()


def test_the_majority_of_the_final_answers_is_judged(tmp_path):
    peer("lm_eval")
    rows = [{"question": "1 + 1?", "answer": "#### 2"}, {"question": "1 + 2?", "answer": "#### 3"}]
    write(tmp_path, "gsm8k_test.jsonl", rows)
    tasks = load_tasks(["paper_gsm8k"], tmp_path, samples=11, temperature=0.5)
    # Of ten draws 2 has six votes and 3 four against five; the eleventh makes that a tie.
    votes = {"1 + 1?": "92222999222", "1 + 2?": "33344444313"}

    def solutions(doc):
        return [f"So. The answer is {digit}." for digit in votes[doc["question"]]]

    found = measure(tasks, answers_in_turn(solutions))["paper_gsm8k"]
    assert [found[f"maj1@{k}"] for k in (1, 10, 11)] == [0.5, 0.5, 1]


def test_answers_to_math_vote_in_their_normal_form(tmp_path):
    peer("lm_eval")
    if find_spec("math_verify") is None:
        pytest.skip("needs math-verify, of the extra eval")
    row = math_row(0)
    write(tmp_path, "math_test.jsonl", [row])
    tasks = load_tasks(["minerva_math_algebra"], tmp_path, samples=3, temperature=0.5)
    right = row["solution"].partition("boxed{")[2].partition("}")[0]

    def solutions(doc):
        written = ["77", f"x = {right}", f"{right} \\text{{ dollars}}"]
        return [f"Final Answer: The final answer is ${w}$. I hope it is correct." for w in written]

    found = measure(tasks, answers_in_turn(solutions))["minerva_math_algebra"]
    assert (found["maj1@1"], found["maj1@3"]) == (0, 1)


def test_tasks_without_drawn_answers_are_refused(tmp_path, capsys):
    peer("lm_eval")
    write(tmp_path, "openbookqa_test.jsonl", rows_of("openbookqa"))
    with pytest.raises(InputError, match="the answers to task openbookqa are not drawn"):
        load_tasks(["openbookqa"], tmp_path, samples=2)
    for options in (["--samples", "0"], ["--temperature", "1"]):
        assert main(["eval", str(tmp_path), "--tasks", "humaneval", *options]) == 2
    assert "--samples must be at least 1, not 0" in (err := capsys.readouterr().err)
    assert "--temperature is that of --samples, and must be above 0" in err
