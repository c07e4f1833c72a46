"""Rows of local files: formats, and the sentence for rows of another data set."""

import gzip
import json

import pytest
from conftest import peer

from llama_jax.errors import InputError
from llama_jax.evaluation.task_data import read_splits

FIELDS = {"question": "str", "choices": "dict", "answerKey": "in choices.label", "label": [0, 1]}
ROWS = [
    {"question": f"q{i}", "choices": {"label": ["A", "B"]}, "answerKey": "B", "label": i % 2}
    for i in range(3)
]


def read(folder, **options):
    peer("datasets")
    options = {"files": {"test": "quiz"}, "evaluated": "test", "fields": FIELDS, **options}
    return read_splits(hub="someone/quiz", config="main", data=str(folder), **options)


def test_rows_are_equal_in_every_format(tmp_path):
    import pyarrow
    import pyarrow.parquet

    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    writers = {
        "quiz.jsonl": lambda path: path.write_text(lines),
        "quiz.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
        "quiz.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines.encode())),
        "quiz.parquet": lambda path: pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(ROWS), path
        ),
    }
    for name, write in writers.items():
        write(tmp_path / name)
        assert read(tmp_path)["test"].to_list() == ROWS, name
        (tmp_path / name).unlink()
    with pytest.raises(InputError, match=r"has no quiz.jsonl .*datasets/someone/quiz \(main\)$"):
        read(tmp_path)


def test_rows_are_selected_by_a_field(tmp_path):
    (tmp_path / "quiz.json").write_text(json.dumps(ROWS))
    assert read(tmp_path, where={"label": 0})["test"]["question"] == ["q0", "q2"]
    with pytest.raises(InputError, match="has no rows with question 'q9'"):
        read(tmp_path, where={"question": "q9"})


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({**ROWS[0], "label": -1}, r"label -1"),
        ({**ROWS[0], "answerKey": "C"}, r'answerKey "C"'),
        ({**ROWS[0], "question": None}, r"question null"),
        ({"context": "c", "ending": "e"}, r"context, ending"),
        ([1], "list"),
    ],
)
def test_a_row_of_another_data_set_is_refused_with_the_fields(row, found, tmp_path):
    (tmp_path / "quiz.json").write_text(json.dumps([ROWS[0], row]))
    fields = r"question \(str\), choices \(dict\), answerKey \(in choices.label\), label \(0 or 1\)"
    with pytest.raises(InputError, match=f"row 2 has {found}, but the task needs {fields}: use"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["quiz.jsonl", "quiz.parquet", "quiz.json.gz"])
def test_a_damaged_file_is_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"{half")
    with pytest.raises(InputError, match=name):
        read(tmp_path)
