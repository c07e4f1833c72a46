"""The answers of an evaluation: saved one by one, found again, refused for another model."""

from contextlib import closing

import pytest

from llama_jax.errors import Fault, InputError
from llama_jax.evaluation.answers import FILE, Answers, request_key

IDENTITY = {"model": "abc", "dtype": "float32", "pairs": None}
KEYS = [request_key("score", (1, 2, i), 2) for i in range(3)]


def write(folder, *values):
    answers = Answers(folder, IDENTITY)
    for key, value in zip(KEYS, values, strict=False):
        answers.add(key, value)
    answers.close()
    return folder / FILE


def test_a_killed_evaluation_has_all_answers_but_the_line_that_it_was_writing(tmp_path):
    path = write(tmp_path, [-1.5, True], [7, 8, 9])
    complete = path.read_bytes()
    for cut in range(1, len(complete.splitlines()[-1]) + 1):
        path.write_bytes(complete[:-cut])
        answers = Answers(tmp_path, IDENTITY)
        assert answers[KEYS[0]] == [-1.5, True]
        assert KEYS[1] not in answers
        answers.add(KEYS[1], [7, 8, 9])
        answers.close()
        assert path.read_bytes() == complete


def test_a_kill_while_the_first_line_was_written_leaves_no_answers(tmp_path):
    path = write(tmp_path)
    complete = path.read_bytes()
    path.write_bytes(complete[:-9])
    write(tmp_path, [-1.0, False])
    assert path.read_bytes().startswith(complete)
    with closing(Answers(tmp_path, IDENTITY)) as answers:
        assert answers[KEYS[0]] == [-1.0, False]


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ({"model": "def"}, "contains results with model abc, but this evaluation has def"),
        ({"dtype": "bfloat16"}, "contains results with dtype float32, but this evaluation has bf"),
        ({"more": 1}, "contains results with more None, but this evaluation has 1"),
    ],
)
def test_a_folder_of_another_model_is_refused(tmp_path, identity, message):
    path = write(tmp_path, [-1.5, True])
    content = path.read_bytes()
    with pytest.raises(InputError, match=message):
        Answers(tmp_path, IDENTITY | identity)
    assert path.read_bytes() == content


def test_a_damaged_line_is_refused(tmp_path):
    path = write(tmp_path, [-1.5, True], [-2.0, True])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"x" + lines[1] + lines[2])
    with pytest.raises(InputError, match=r"answers\.jsonl is damaged"):
        Answers(tmp_path, IDENTITY)


def test_a_full_disk_is_a_fault(tmp_path):
    answers = Answers(tmp_path, IDENTITY)
    answers.close()
    answers._file = open("/dev/full", "wb")  # noqa: SIM115 (`answers` closes it)
    with pytest.raises(Fault, match="No space left on device"):
        answers.add(KEYS[0], 1)
    answers.close()


def test_without_a_folder_answers_stay_in_memory():
    answers = Answers()
    answers.add(KEYS[0], "text")
    assert (answers[KEYS[0]], KEYS[1] in answers) == ("text", False)
    answers.close()
