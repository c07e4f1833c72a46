"""Code, encyclopedias and books through all stages: what remains, and where it is counted."""

import io
import json
import tarfile

import license_texts as texts
import pytest
from conftest import peer
from object_store import store_of_this_process

from llama_jax.config.prepare import BooksEntry, GitHubEntry, WikipediaEntry
from llama_jax.data.prepare.document import read_documents
from llama_jax.data.prepare.prepare import find_raw_files, prepare_sources
from llama_jax.runtime.storage import list_files, parse_path, read_many, write_file


def removed_by(folder, rule):
    rows = json.loads((folder / "funnel.json").read_text())["rules"]
    return next(row["removed_documents"] for row in rows if row["rule"] == rule)


def remaining(folder):
    return [d.id for path in sorted(folder.glob("part-*")) for d in read_documents(path)]


def test_books_that_share_nine_tenths_with_an_earlier_one_are_removed(tmp_path):
    words = [f"w{i}" for i in range(2000)]
    edition = [*words[:1000], "another", *words[1000:]]
    for name, book in {"a": words, "b": edition, "c": words[:900]}.items():
        (tmp_path / f"{name}.txt").write_text(" ".join(book))
    entry = BooksEntry(kind="books", inputs=(f"{tmp_path}/*.txt",))
    prepare_sources({"docs/books": entry}, tmp_path / "docs", workers=1, progress=False)
    folder = tmp_path / "docs" / "books"
    assert remaining(folder) == [str(tmp_path / "a.txt"), str(tmp_path / "c.txt")]
    assert removed_by(folder, "overlapping books") == 1
    assert not (tmp_path / "docs" / "books.work").exists()


def test_any_source_can_remove_near_duplicates(tmp_path):
    words = [f"w{i}" for i in range(200)]
    texts = [words, [*words[:100], "x", *words[101:]], [*words[:100], *("x" * 100)]]
    lines = [json.dumps({"text": " ".join(text), "language": "en"}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:2]))
    (tmp_path / "b.jsonl").write_text("\n".join(lines[2:] + lines[:1]))
    inputs = (f"{tmp_path}/*.jsonl",)
    entry = WikipediaEntry(
        kind="wikipedia", inputs=inputs, near_duplicates=0.8, min_language_share=0
    )
    prepare_sources({"docs/wiki": entry}, tmp_path / "docs", workers=1, progress=False)
    ids = [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b.jsonl:1"]
    assert remaining(tmp_path / "docs" / "wiki") == ids
    assert removed_by(tmp_path / "docs" / "wiki", "near-duplicates") == 2


def test_raw_files_and_documents_in_a_bucket_are_those_of_a_local_folder(tmp_path):
    peer("moto")
    words = [f"w{i}" for i in range(200)]
    books = [words, [*words, "end"], words[::-1]]
    lines = [json.dumps({"id": str(i), "text": " ".join(b)}) for i, b in enumerate(books)]
    with store_of_this_process("s3") as store:
        found = []
        for folder in (tmp_path / "here", parse_path(store.url("there"))):
            for i, line in enumerate(lines):
                write_file(folder / "raw" / f"{i}.jsonl", line.encode())
            entry = BooksEntry(kind="books", inputs=(f"{folder}/raw/*.jsonl",), near_duplicates=0.8)
            counts = prepare_sources({"books": entry}, folder, workers=1, progress=False)["books"]
            out = folder / "books"
            files = read_many(out, [path.name for path in list_files(out)])
            del files["plan.json"], counts["entry"], files["funnel.json"]  # name the folders
            found.append((counts, files))
            assert not list_files(folder / "books.work")
        assert counts["documents"] == 2
        assert len(files) == 3
        assert found[0] == found[1]


@pytest.fixture
def repositories(tmp_path):
    """Two folders of repositories and an archive; one file is in all of them."""
    for name in ("a", "b"):
        (tmp_path / name / "src").mkdir(parents=True)
        (tmp_path / name / "LICENSE").write_text(texts.MIT)
        (tmp_path / name / "src" / "same.py").write_text("print(1)\n")
        (tmp_path / name / "src" / f"{name}.py").write_text(f"{name} = 1\n")
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as archive:
        for name, text in {"c/COPYING": texts.GPL, "c/c.py": "c = 1\n"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return tmp_path


def test_equal_files_of_repositories_remain_once(repositories):
    entry = GitHubEntry(kind="github", inputs=(f"{repositories}/[abc]*",))
    assert [path.name for path in find_raw_files(entry)] == ["a", "b", "c.tar.gz"]
    prepare_sources({"docs/code": entry}, repositories / "docs", workers=1, progress=False)
    folder = repositories / "docs" / "code"
    assert remaining(folder) == ["a/src/a.py", "a/src/same.py", "b/src/b.py"]
    assert removed_by(folder, "exact duplicates") == 1
    assert removed_by(folder, "licence") == 2
    assert removed_by(folder, "language") == 2


def test_a_folder_without_a_licence_is_one_of_archives(repositories):
    (repositories / "archives").mkdir()
    (repositories / "c.tar.gz").rename(repositories / "archives" / "c.tar.gz")
    entry = GitHubEntry(kind="github", inputs=(f"{repositories}/archives", f"{repositories}/a"))
    assert [path.name for path in find_raw_files(entry)] == ["c.tar.gz", "a"]
