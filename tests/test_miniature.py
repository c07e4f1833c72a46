"""docs/miniature_table1.py: the formats of the raw dumps that it makes from packages."""

import gzip
import importlib.util
import io
import struct
import sys
import zlib

import pytest
from conftest import ROOT

from llama_jax.config import yaml_file
from llama_jax.data.prepare import commoncrawl, stackexchange, wikipedia


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        spec = importlib.util.spec_from_file_location("m", ROOT / "docs" / "miniature_table1.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(ROOT / "docs"))


def test_the_configuration_is_valid_and_the_page_shows_it(script, tmp_path):
    path = tmp_path / "mini.yaml"
    path.write_text(script.CONFIG.replace("FOLDER", "mini"))
    config = yaml_file.load(path)
    assert sum(source.weight for source in config.data.mixture.values()) == 100
    assert len(yaml_file.load_prepare(path)) == 8
    page = (ROOT / "docs" / "miniature.md").read_text()
    assert f"# mini.yaml\n{path.read_text()}```" in page


def test_each_package_has_a_source_and_a_licence(script):
    table = (ROOT / "docs" / "miniature_packages.tsv").read_text().splitlines()
    assert all(len(line.split("\t")) == 3 and all(line.split("\t")) for line in table)
    sources = ["crawl", "github", "pypi", "wikipedia", "books", "arxiv", "stackexchange"]
    assert sum(len(script.list_packages(source)) for source in sources) == len(table) - 1


@pytest.mark.parametrize(
    ("kind", "page", "wikitext"),
    [
        ("html", "<head>x</head><h1>A</h1><p>b <b>c</b>\n d</p>", "== A ==\n\nb '''c''' d"),
        ("html", "<ul><li><p>one</p></li><li>two</li></ul><nav>no</nav>", "* one\n* two"),
        ("html", "<page><info><credit/></info><title>A</title><p>{b}</p></page>", "== A ==\n\n(b}"),
        ("man", '.SH "A"\nx \\- a \\fBb\\fP\n.TP\n.B \\-o\nout', "== A ==\n\nx - a b\n\n\n-o\nout"),
    ],
)  # fmt: skip
def test_pages_become_wikitext(script, kind, page, wikitext):
    if kind == "html":
        assert script.html_to_wikitext(page.encode()) == wikitext
    else:
        assert script.man_to_wikitext(gzip.compress(page.encode())) == wikitext


def test_the_dumps_are_read_by_their_kinds(script, tmp_path, monkeypatch):
    script.write_dumps(tmp_path / "w", {"de": [("A & B", "Text <b>")], "fr": []})
    [dump] = (tmp_path / "w").iterdir()
    [page] = wikipedia.read(dump)
    assert (page.text, page.metadata["language"]) == ("Text <b>", "de")
    page = script.File("rust-doc", "a b.html", b"<html><body><p>Some text.</p></body></html>")
    (tmp_path / "a.warc.gz").write_bytes(script.warc_record(page) * 2)
    texts = [(d.id, d.text) for d in commoncrawl.read(tmp_path / "a.warc.gz")]
    assert texts == [("https://rust-doc.example/a%20b.html", "Some text.")] * 2
    pod = b"=head1 N\n\n=head2 Is C<1 E<lt> 2>?\n\nYes.\n\n    code < x\n\n=head2 Next?\n\nNo.\n"
    file = script.File("perl-doc", "pod/perlfaq1.pod", pod)
    monkeypatch.setattr(script, "read_package", lambda *_: iter([file]))
    script.build_answers(tmp_path, tmp_path)
    [posts] = tmp_path.rglob("Posts.xml")
    texts = [stackexchange.remove_tags(d.text) for d in stackexchange.read(posts)]
    assert texts == ["Is 1 < 2?\n\nYes.\n\n    code < x", "Next?\n\nNo."]


def test_novels_are_read_from_vectors_of_r(script, monkeypatch):
    lines = [b"EMMA", b"", b"Caf\xc3\xa9"]
    vector = b"X\n" + struct.pack(">iii", 3, 0, 0) + b"\0\0\0\x10" + struct.pack(">i", 3)
    vector += b"".join(struct.pack(">ii", 0x40009, len(line)) + line for line in lines)
    data = io.BytesIO()
    for _ in range(2):
        data.write(struct.pack(">i", len(vector)) + zlib.compress(vector))
    file = script.File("austen", "Rdata.rdb", data.getvalue())
    monkeypatch.setattr(script, "read_package", lambda *_: iter([file]))
    assert [*script.read_novels(None)] == ["EMMA\n\nCafé\n"] * 2
