"""What the documents of a corpus file are, however the file is divided into ranges."""

import bz2
import gzip
import json
import lzma
import random
from dataclasses import replace

import pytest
from backports import zstd

from llama_jax.data import bad_records, corpus, corpus_plan
from llama_jax.data.bad_records import BadLimit, BadRecords, parse_bad_limit
from llama_jax.data.corpus import CorpusSettings, FileRange, read_range
from llama_jax.data.corpus_plan import divide, list_ranges
from llama_jax.errors import InputError

FILES = CorpusSettings()


def split_at_spaces(text):
    """A SafeSplit: at the last space, as any tokenizer of words allows."""
    return max(text.rfind(" ", 1, len(text) - 1), 0)


def read(ranges, settings=FILES, bad=None):
    """Returns the documents of ranges in order: a text that continues is joined."""
    documents, bad = [], BadRecords() if bad is None else bad
    for part in ranges:
        for text in read_range(part, settings, split_at_spaces, bad):
            joined = "".join(text.parts)
            if text.first:
                documents.append([joined, text.split])
            else:
                documents[-1][0] += joined
            documents[-1][1:] = [text.split]
    return [text for text, _ in documents]


PROSE = (
    "Ein Satz ist kurz.\nÜber zwei Zeilen\ngeht\tdieser.\n\n\r\n"
    "Noch ein Absatz — 日本語 🙂 am Ende\n\n\nLetzter"
)
ROWS = ["one\ntwo", "three é", "🙂 four", "five" * 40, "six\r\n"]
JSONL = "".join(
    json.dumps({"id": i, "text": t}, ensure_ascii=False) + "\n" for i, t in enumerate(ROWS)
)
PARAGRAPHS = [
    "Ein Satz ist kurz.\nÜber zwei Zeilen\ngeht\tdieser.",
    "Noch ein Absatz — 日本語 🙂 am Ende",
    "Letzter",
]


@pytest.mark.parametrize(
    ("name", "content", "documents", "expected"),
    [
        ("x.txt", PROSE, "file", [PROSE]),
        ("x.txt", PROSE, "paragraph", PARAGRAPHS),
        ("x.txt", PROSE, "line", [line for line in PROSE.split("\n") if line]),
        ("x.txt", "a b<|end|><|en|>c d\n<|end|>\n", "<|end|>", ["a b", "<|en|>c d\n", "\n"]),
        ("x.jsonl", JSONL + "\n \n" + JSONL[:-1], "file", ROWS * 2),
    ],
)
@pytest.mark.parametrize("block", [1, 5, 1 << 20])
def test_ranges_of_any_size_have_each_document_once(
    tmp_path, monkeypatch, name, content, documents, expected, block
):
    monkeypatch.setattr(corpus, "_BLOCK", block)
    monkeypatch.setattr(corpus, "_WINDOW", 12)
    data = content.encode()
    (tmp_path / name).write_bytes(data)
    settings = CorpusSettings(documents)
    file = list_ranges([tmp_path / name], settings)[0]
    assert read([file], settings) == expected
    for step in (*range(1, 30, 1 if len(data) < 300 else 6), len(data) // 2, len(data)):
        starts = range(0, len(data), step)
        ranges = [
            replace(file, start=i, stop=i + step if i + step < len(data) else None, step=step)
            for i in starts
        ]
        assert read(ranges, settings) == expected, step
    for suffix, module in ((".gz", gzip), (".bz2", bz2), (".xz", lzma), (".zst", zstd)):
        path = tmp_path / (name + suffix)
        path.write_bytes(module.compress(data))
        assert read(list_ranges([path], settings), settings) == expected


@pytest.mark.parametrize("module", [gzip, bz2, lzma, zstd])
def test_a_compressed_text_is_read_to_its_end(tmp_path, module):
    suffix = {gzip: ".gz", bz2: ".bz2", lzma: ".xz", zstd: ".zst"}[module]
    text = "the same words, " * 10_000  # a thousand times as long as its file
    (tmp_path / f"x.txt{suffix}").write_bytes(module.compress(text.encode()))
    assert read(list_ranges([tmp_path / f"x.txt{suffix}"], FILES)) == [text]


def test_a_long_text_whose_file_is_truncated_is_named(tmp_path):
    text = random.Random(0).randbytes(3 << 20).hex()  # several blocks
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(text.encode(), 1)[: 2 << 20])
    with pytest.raises(InputError, match=r"x\.txt\.gz is damaged or truncated"):
        read(list_ranges([tmp_path / "x.txt.gz"], FILES))


def test_a_text_is_divided_where_the_tokenizer_allows_it(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_WINDOW", 12)
    (tmp_path / "x.txt").write_text("aaa bbb " + "c" * 100 + " ddd eee")
    settings = CorpusSettings()
    file = list_ranges([tmp_path / "x.txt"], settings)[0]
    parts = []
    for i in range(0, file.size, 10):
        part = replace(file, start=i, stop=i + 10 if i + 10 < file.size else None, step=10)
        texts = read_range(part, settings, split_at_spaces, BadRecords())
        parts += ["".join(text.parts) for text in texts]
    assert len(parts) > 2
    assert all(part.startswith(" ") for part in parts[1:])


def test_datatrove_and_dolma_are_json_lines_with_text_and_id(tmp_path):
    """datatrove's fields are text, id and metadata; Dolma's have more. Both nest metadata."""
    datatrove = {"text": "once", "id": "<urn:uuid:1>", "metadata": {"url": "u", "score": 0.5}}
    dolma = {"id": "7", "text": "twice", "source": "s", "added": "2023", "created": "2020",
             "metadata": {"length": 5}, "attributes": {"lang__en": [[0, 5, 0.9]]}}  # fmt: skip
    (tmp_path / "00000.jsonl.gz").write_bytes(gzip.compress(json.dumps(datatrove).encode()))
    (tmp_path / "c4-0000.json.gz").write_bytes(gzip.compress(json.dumps(dolma).encode()))
    (tmp_path / "part.jsonl.zst").write_bytes(zstd.compress(json.dumps(dolma).encode()))
    files = sorted(tmp_path.iterdir())
    assert read(list_ranges(files, CorpusSettings())) == ["once", "twice", "twice"]


def test_the_text_field_may_have_any_name_and_be_nested(tmp_path):
    rows = [{"doc": {"body": "a"}, "x.y": "b"}, {"doc": {"body": "c"}, "x.y": "d"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, expected in (("doc.body", ["a", "c"]), ("x.y", ["b", "d"])):
        settings = CorpusSettings(text_field=name)
        assert read(list_ranges([tmp_path / "x.jsonl"], settings), settings) == expected


def test_row_groups_of_parquet_are_ranges(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    texts = [f"row {i} " + "x" * 50 for i in range(40)] + [None, ""]
    table = pa.table({"text": texts, "id": [*range(42)], "metadata": [{"url": "u"}] * 42})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=5)
    monkeypatch.setattr(corpus_plan, "MIN_PART_BYTES", 600)
    settings = CorpusSettings()
    files = list_ranges([tmp_path / "x.parquet"], settings)
    parts = divide(files, "text")
    assert len(parts) > 3
    bad = BadRecords()
    assert read([r for part in parts for r in part], settings, bad) == texts[:40]
    assert read(files, settings) == texts[:40]
    path = tmp_path / "x.parquet"
    expected = {"without text": [f"{path}: row 41 (40)"], "empty": [f"{path}: row 42 (41)"]}
    assert bad.first == expected
    with pytest.raises(InputError, match=r"x.parquet has no column 'body' \(it has: text, id, "):
        divide(files, "body")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(InputError, match=r"x.parquet is no Parquet file, or is damaged"):
        divide(files, "text")


BAD_JSONL = (
    b'{"text": "good", "id": 1}\n'
    b'{"text": "caf\xe9"}\n'
    b'{"text": \n'
    b'{"body": "x", "id": "w"}\n'
    b'{"text": ""}\n'
    b'{"text": "\\ud800"}\n' + b'{"text": "' + b"x" * 300 + b'"}\n' + b'{"text": "last"}\n'
)


@pytest.mark.parametrize("start", [0, 30])
def test_bad_records_are_left_out_counted_and_listed_with_their_lines(tmp_path, monkeypatch, start):
    monkeypatch.setattr(corpus, "MAX_RECORD_BYTES", 100)
    monkeypatch.setattr(corpus, "_BLOCK", 64)
    path = tmp_path / "x.jsonl"
    path.write_bytes(BAD_JSONL)
    bad = BadRecords()
    part = FileRange(path, "jsonl", len(BAD_JSONL), start=start)
    assert read([part], bad=bad) == ["good", "last"][start > 0 :]
    expected = {
        "invalid UTF-8": [f"{path}:2", f"{path}:6"], "not JSON": [f"{path}:3"],
        "without text": [f"{path}:4 (w)"], "empty": [f"{path}:5"], "over-long": [f"{path}:7"],
    }  # fmt: skip
    if start:
        expected["invalid UTF-8"] = [f"{path}:6"]
    assert bad.first == expected
    assert bad.counts == {kind: len(listed) for kind, listed in expected.items()}
    assert bad.total == 5 - bool(start)
    assert json.loads(bad.report().decode().splitlines()[0])["kind"] in expected


def test_a_block_of_a_text_that_is_not_utf8_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_BLOCK", 8)
    content = b"line one\nline two\n" + b"\xff\xfe bad\n" + "é the end é".encode()
    (tmp_path / "x.txt").write_bytes(content)
    bad = BadRecords()
    (text,) = read(list_ranges([tmp_path / "x.txt"], CorpusSettings()), bad=bad)
    assert text.startswith("line one\nline tw")
    assert text.endswith("the end é")
    assert bad.first == {"invalid UTF-8": [f"{tmp_path / 'x.txt'}:3"]}


def test_the_limit_of_bad_records_is_a_number_or_a_share(tmp_path):
    assert parse_bad_limit("12") == BadLimit(12)
    assert parse_bad_limit("0.5%") == BadLimit(0, 0.005)
    for text in ("-1", "x", "101%", ""):
        with pytest.raises(InputError, match="write a number or a percentage"):
            parse_bad_limit(text)
    bad = BadRecords(limit=1)
    bad.add("not JSON", "not valid JSON: correct it", lambda: "x:1")
    bad.add(bad_records.EMPTY, "", lambda: "x:2")
    with pytest.raises(
        InputError, match=r"x:3: not valid JSON: correct it \(2 bad records in this"
    ):
        bad.add("not JSON", "not valid JSON: correct it", lambda: "x:3")
    bad.check(BadLimit(2), 100, "report")
    bad.check(BadLimit(0, 0.02), 100, "report")
    for limit in (BadLimit(1), BadLimit(0, 0.0199)):
        with pytest.raises(InputError, match="2 of 100 records of the corpus are bad"):
            bad.check(limit, 100, "report")
