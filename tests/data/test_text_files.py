"""How the reader of a corpus decides between JSON lines and plain text."""

import gzip
import json

import pytest

from llama_jax.data import corpus
from llama_jax.data.bad_records import BadRecords
from llama_jax.data.corpus_plan import list_ranges
from llama_jax.data.text_files import find_files, is_json_lines, split_lines
from llama_jax.errors import InputError

TEXTS = ["one\ntwo", "three"]
C4 = "".join(json.dumps({"text": text, "url": "u"}) + "\n" for text in TEXTS).encode()
DOLMA = "".join(json.dumps({"id": "1", "text": text}) + "\n" for text in TEXTS).encode()
PRETTY = json.dumps({"text": "a"}, indent=1).encode()
ARRAY = json.dumps([{"text": text} for text in TEXTS]).encode()


def documents(path, fraction=0.0):
    settings = corpus.CorpusSettings(end_share=fraction)
    texts = corpus.read_range(
        list_ranges([path], settings)[0], settings, lambda text: 0, BadRecords(limit=0)
    )
    return [("".join(text.parts), text.split) for text in texts]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c4.json", C4),
        ("c4.json.gz", gzip.compress(C4, mtime=0)),
        ("dolma.json.gz", gzip.compress(DOLMA, mtime=0)),
        ("x.ndjson", C4),
        ("x.jsonl", C4),
        ("part-00000", C4),
        ("x.json", b"\n" + C4),
    ],
)
def test_json_lines_are_recognized_by_their_content(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert documents(tmp_path / name) == [(text, "train") for text in TEXTS]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.txt", C4),  # the name decides
        ("README", b"{not JSON}\n"),
        ("README", b'{"no": "text"}\n'),
        ("README", ARRAY),
    ],
)
def test_any_other_file_is_one_text(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert documents(tmp_path / name) == [(content.decode(), "train")]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (ARRAY, r"x.json is one JSON array: write each .* \(`jq -c '.\[\]'`\), or rename"),
        (
            PRETTY,
            r"x.json is not JSON lines: write each .* \(`jq -c .`\), or rename the file",
        ),
        (b"3\n", "x.json is not JSON lines"),
        (b'{"body": "a"}\n', r'x.json:1: a line needs a string "text"; this one has: body'),
        (C4 + b"[" * 100_000 + b"\n", "x.json:3: not valid JSON .*recursion"),
        (C4 + b'{"text": %s}\n' % (b"9" * 5000), "x.json:3: not valid JSON .*digits"),
    ],
)
def test_json_files_without_one_text_per_line_are_rejected(tmp_path, content, sentence):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        documents(tmp_path / "x.json")


def test_a_folder_search_finds_text_files_and_json_files_that_contain_texts(tmp_path):
    files = {"a.json.gz": gzip.compress(C4), "b.ndjson": C4, "c.txt": b"c", "d.json": ARRAY}
    others = {"package.json": PRETTY.replace(b"text", b"name"), "list.json": b"[1]\n", "x.png": C4}
    for name, content in (files | others).items():
        (tmp_path / name).write_bytes(content)
    assert [path.name for path in find_files([str(tmp_path)])] == list(files)
    assert not is_json_lines(tmp_path / "c.txt")


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.3, 0.9999])
@pytest.mark.parametrize("part", [1, 7, 1000])
def test_the_held_out_part_of_a_single_text_does_not_depend_on_the_part_size(
    tmp_path, monkeypatch, fraction, part
):
    monkeypatch.setattr(corpus, "_BLOCK", part)
    for text in ("line é\nnext\r\n\n last", "no line end", "\nends\n", "", "\n"):
        (tmp_path / "x.txt").write_bytes(text.encode())
        data = text.encode()
        limit = round(len(data) * (1 - fraction))
        boundary = data.rfind(b"\n", 0, limit) + 1 or limit if fraction else len(data)
        expected = [(data[:boundary].decode(), "train"), (data[boundary:].decode(), "validation")]
        assert documents(tmp_path / "x.txt", fraction) == [d for d in expected if d[0]]


@pytest.mark.parametrize("part", [1, 3, 100])
def test_split_lines_skips_only_the_lines_that_are_too_long(part):
    text = "one\n\ntwo three\nfour, which is too long\nfive\n"
    parts = (text[i : i + part] for i in range(0, len(text), part))
    assert list(split_lines(parts, 10)) == ["one", "", "two three", "five", ""]
