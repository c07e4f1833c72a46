import json

import pytest
from conftest import run

from llama_jax.data.prepare.decontamination import find_ngrams, load_index
from llama_jax.errors import InputError
from llama_jax.evaluation.item_texts import find_evaluation_sets, read_item_texts, write_ngrams

QUESTION = "is the tallest tower of this small town older than its oldest bridge over the river"
ROWS = {
    "boolq_validation": {"question": QUESTION, "passage": "The tower " * 20, "answer": True},
    "arc_easy_test": {
        "question": "What?", "answerKey": "A",
        "choices": {"text": ["one", "two"], "label": ["A", "B"]},
    },
    "mmlu_test": {"subject": "law", "question": "Who?", "choices": ["me", "you"], "answer": 1},
    "gsm8k_test": {"question": "How many?", "answer": "#### 5"},
    "gsm8k_train": {"question": "May be learned", "answer": "yes"},
}  # fmt: skip


def test_questions_and_answers_of_evaluated_splits_are_read_without_passages(tmp_path):
    for name, row in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    sets = find_evaluation_sets(tmp_path)
    assert {name: [*read_item_texts(*source)] for name, source in sets.items()} == {
        "boolq_validation": [[QUESTION]],
        "arc_easy_test": [["What?", "one", "two"]],
        "mmlu_test": [["Who?", "me", "you"]],
        "gsm8k_test": [["How many?", "#### 5"]],
    }
    folder = write_ngrams(tmp_path, tmp_path / "out")
    index = load_index(folder)
    assert dict(zip(index.names, index.sizes, strict=True)) == {
        "arc_easy_test": (1, 1), "boolq_validation": (1, 0), "gsm8k_test": (1, 1),
        "mmlu_test": (1, 1),
    }  # fmt: skip
    assert len(find_ngrams(index, f"I wonder: {QUESTION.title()}?").hashes) == 16 - 12
    assert write_ngrams(tmp_path, tmp_path / "out") == folder
    (tmp_path / "mmlu_test.jsonl").unlink()
    assert write_ngrams(tmp_path, tmp_path / "out") != folder


def test_the_texts_of_an_item_have_the_order_of_the_file_in_every_process(tmp_path):
    # Their hash is in the folder's name, which a run that continues must find again.
    answer = {f"{name}s": [name] for name in ("value", "alias", "entity", "name", "spelling")}
    row = {"question": "Who?", "answer": answer}
    (tmp_path / "triviaqa_validation.jsonl").write_text(json.dumps(row) + "\n")
    [source] = find_evaluation_sets(tmp_path).values()
    assert [*read_item_texts(*source)] == [
        ["Who?", "value", "alias", "entity", "name", "spelling"],
    ]


def test_a_folder_without_evaluation_sets_or_with_other_rows_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no evaluation set: save files there"):
        find_evaluation_sets(tmp_path)
    (tmp_path / "gsm8k_test.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(InputError, match=r"row 1 has none of the fields question, answer"):
        write_ngrams(tmp_path, tmp_path)


def test_the_command_cuts_evaluation_sets_out_and_reports_them(tmp_path, capsys):
    data = tmp_path / "eval-data"
    data.mkdir()
    (data / "boolq_validation.jsonl").write_text(json.dumps(ROWS["boolq_validation"]) + "\n")
    bodies = [f"Tell me, {QUESTION}?", "Another question. " * 20]
    rows = (f'<row Id="{i}" PostTypeId="1" Body="{body}"/>' for i, body in enumerate(bodies))
    (tmp_path / "towns.xml").write_text(f"<posts>{''.join(rows)}</posts>")
    config = tmp_path / "data.yaml"
    entry = {
        "kind": "stackexchange", "inputs": [f"{tmp_path}/towns.xml"], "decontaminate": str(data),
    }  # fmt: skip
    config.write_text(json.dumps({"prepare": {"towns": entry}}))
    code, table, _ = run(capsys, "prepare", config, "--out", tmp_path / "docs", "--workers", 1)
    assert code == 0
    lines = [line.split() for line in table.splitlines()]
    assert ["decontamination", "2", "1", "50.00%", "0", "93", "20.58%"] in lines
    assert lines[-1] == ["boolq_validation", "1", "0", "1", "1"]
    assert len([*(tmp_path / "docs").glob("evaluation-ngrams-*/boolq_validation.npy")]) == 1
