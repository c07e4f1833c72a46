"""Source code: repositories in archives, folders and JSON lines, and each rule on them."""

import io
import json
import random
import tarfile
import zipfile

import license_texts as texts
import pytest

from llama_jax.config.prepare import GitHubEntry
from llama_jax.data.prepare import github
from llama_jax.data.prepare.document import Document
from llama_jax.data.prepare.rules import Funnel, Rule, apply_rules
from llama_jax.errors import InputError

ENTRY = GitHubEntry(kind="github", inputs=("x",))
CODE = "def add(first, second):\n    return first + second\n"


def write_tar(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            data = text.encode() if isinstance(text, str) else text
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def prepare(*paths, entry=ENTRY):
    """Returns the documents that remain, and the number that each rule removed."""
    funnel = Funnel()
    rules = [step for step in github.rules(entry) if isinstance(step, Rule)]
    documents = [d for path in paths for d in apply_rules(rules, github.read(path), funnel)]
    return documents, {
        name: count.removed_documents
        for name, count in funnel.counts.items()
        if count.removed_documents
    }


def test_a_repository_becomes_its_source_files_with_their_metadata(tmp_path):
    write_tar(tmp_path / "pkg-1.0.tar.gz", {
        "./pkg-1.0/LICENSE": texts.MIT,
        "./pkg-1.0/src/a.py": f"# {CODE}",
        "./pkg-1.0/logo.png": b"\x89PNG\0\xff",
        "./pkg-1.0/data.json": "{}",
    })  # fmt: skip
    documents, removed = prepare(tmp_path / "pkg-1.0.tar.gz")
    metadata = {
        "repository": "pkg-1.0", "path": "src/a.py", "license": "MIT", "language": "Python"
    }  # fmt: skip
    assert documents == [Document("pkg-1.0/src/a.py", f"# {CODE}", metadata)]
    assert removed == {"language": 3}


@pytest.mark.parametrize(
    ("license_name", "text", "remain"),
    [
        ("LICENSE", texts.MIT, 2),
        ("COPYING", texts.LINUX, 0),
        ("vendor/LICENSE", texts.MIT, 0),  # of another project
        ("NOTICE", "", 0),
    ],
)
def test_a_repository_with_another_licence_is_removed_as_a_whole(
    license_name, text, remain, tmp_path
):
    files = {"linux/a.c": "int a;\n", "linux/b/b.c": "int b;\n", f"linux/{license_name}": text}
    write_tar(tmp_path / "linux.tar.xz", files, "w:xz")
    documents, removed = prepare(tmp_path / "linux.tar.xz")
    assert len(documents) == remain
    assert removed.get("licence", 0) == (0 if remain else 3)


def test_zip_files_and_folders_are_read_as_archives_of_tar(tmp_path):
    files = {"COPYING": texts.BSD_2, "cmd/main.go": "package main\n"}
    with zipfile.ZipFile(tmp_path / "repo.zip", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
            (tmp_path / "repo" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "repo" / name).write_text(text)
    (tmp_path / "repo" / ".git").mkdir()
    (tmp_path / "repo" / ".git" / "config").write_text("[core]\n")
    write_tar(tmp_path / "repo.tar", files, "w")
    expected = [*github.read(tmp_path / "repo.tar")]
    assert [d.metadata["license"] for d in expected] == ["BSD-2-Clause"] * 2
    assert [*github.read(tmp_path / "repo.zip")] == expected
    assert [*github.read(tmp_path / "repo")] == expected


def test_a_package_of_debian_has_the_licence_of_its_copyright_file(tmp_path):
    files = {
        "./usr/share/go/src/fmt/print.go": "package fmt\n",
        "./usr/share/doc/golang-src/copyright": texts.DEBIAN,
    }
    write_tar(tmp_path / "golang.tar", files, "w")
    documents, _ = prepare(tmp_path / "golang.tar")
    assert [(d.id, d.metadata["license"]) for d in documents] == [
        ("golang/share/go/src/fmt/print.go", "BSD-3-clause")
    ]


def test_the_entry_may_state_the_licence_of_inputs_without_one(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.py": CODE}, "w")
    write_tar(tmp_path / "b.tar", {"b.py": CODE, "COPYING": texts.GPL}, "w")
    entry = GitHubEntry(kind="github", inputs=("x",), license="BSD-3-Clause")
    documents, _ = prepare(tmp_path / "a.tar", tmp_path / "b.tar", entry=entry)
    assert [d.id for d in documents] == ["a/a.py"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_tables_of_bigquery_and_the_stack_are_read(suffix, tmp_path):
    records = [
        {"content": CODE, "path": "a.py", "repo_name": "x/y", "license": "mit"},
        {"content": CODE, "max_stars_repo_path": "b.py", "max_stars_repo_name": "x/z",
         "max_stars_repo_licenses": ["MIT", "GPL-3.0"]},
        {"content": CODE, "path": "c.py"},
    ]  # fmt: skip
    path = tmp_path / f"code.{suffix}"
    if suffix == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        # A table has the columns of all rows: the first row names them.
        columns = dict.fromkeys(name for record in records for name in record)
        rows = [{name: record.get(name) for name in columns} for record in records]
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    documents, removed = prepare(path)
    assert [d.id for d in documents] == ["x/y/a.py"]
    assert removed == {"licence": 2}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"path": "a.py"}\n', 'a file needs a string of "content" or'),
        ("a.jsonl", b"[1]\n", "is not a JSON object"),
        ("a.py", b"x = 1\n", "is no source of code"),
        ("a.tar.gz", b"\x1f\x8b\x08\0\0\0\0\0", "is damaged or truncated"),
        ("a.tar", b"no archive at all", "is damaged or truncated"),
        ("a.zip", b"no archive at all", "is damaged or truncated"),
    ],
)
def test_a_bad_input_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}.*{message}"):
        [*github.read(tmp_path / name)]


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tar.bz2", "a.tar.xz"])
def test_an_archive_with_a_damaged_file_is_named(name, tmp_path):
    rng = random.Random(0)
    files = {f"x/{i}.py": "".join(rng.choices("abcdefgh \n", k=30_000)) for i in range(9)}
    path = tmp_path / name
    if name == "a.zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for inner, text in files.items():
                archive.writestr(inner, text)
    else:
        write_tar(path, files, f"w:{path.suffix[1:]}")
    assert len([*github.read(path)]) == 9
    data = bytearray(path.read_bytes())
    data[60_000:60_050] = bytes(50)
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"{name} is damaged or truncated .*: fetch it again"):
        [*github.read(path)]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("x = 1\n" * 174_762 + "x=1", None),  # 2**20 - 1 bytes
        ("x = 1\n" * 174_763, "size"),
        ("é = 1\n" * 149_797, "size"),  # two bytes a letter
        ("x = '\0'\n", "binary"),
        ("x = '\ufffd'\n", "binary"),
        ("# Generated by the protocol buffer compiler.\nx = 1\n", "generated"),
        ("a\nb\nc\nd\ne\n# Generated by hand\n", None),  # in line 6
        ("x = 1\n" * 20 + "// Code generated by stringer. DO NOT EDIT.\n", "generated"),
        ("x" * 1000 + "\n" + "x\n" * 99, None),
        ("x" * 1001 + "\n" + "x\n" * 99, "longest line"),
        (("x" * 100 + "\n") * 9, None),
        (("x" * 100 + "\n") * 8 + "x" * 101, "mean line"),
        ("xyz" + "-" * 9, None),  # a quarter
        ("xyz" + "-" * 10, "alphanumeric share"),
    ],
)
def test_each_rule_removes_a_file_from_its_threshold_on(text, rule):
    metadata = {"license": "MIT", "language": "Python"}
    funnel = Funnel()
    rules = [step for step in github.rules(ENTRY) if isinstance(step, Rule)]
    [*apply_rules(rules, [Document("a", text, metadata)], funnel)]
    assert [name for name, c in funnel.counts.items() if c.removed_documents] == (
        [rule] if rule else []
    )


@pytest.mark.parametrize(
    ("text", "remains"),
    [
        ("/* Copyright 2020 A */\nint a;\n", "int a;\n"),
        ("/* Adds. */\nint a;\n", "/* Adds. */\nint a;\n"),
        ("// SPDX-License-Identifier: MIT\n/*\n * (C) 1991 B\n */\n\nint a;\n", "int a;\n"),
        ("// Copyright 2009 A.\n// Licensed under B.\n\n// Package fmt …\npackage fmt\n",
         "// Package fmt …\npackage fmt\n"),
        ("#!/bin/sh\n# Copyright A\n# All rights reserved.\necho 1\n", "#!/bin/sh\necho 1\n"),
        ("# -*- coding: utf-8 -*-\n# Copyright A\n\nx = 1\n", "# -*- coding: utf-8 -*-\nx = 1\n"),
        ("<?php\n/* Copyright A */\necho 1;\n", "<?php\necho 1;\n"),
        ("<!-- Copyright A -->\n<p>b</p>\n", "<p>b</p>\n"),
        ("-- Copyright A\nmodule B where\n", "module B where\n"),
        ("#include <a.h>\n// Copyright B\n", "#include <a.h>\n// Copyright B\n"),
        ("x = 1  # Copyright A\n", "x = 1  # Copyright A\n"),
        ("/* Copyright, and never closed\nint a;\n", "/* Copyright, and never closed\nint a;\n"),
    ],
)  # fmt: skip
def test_comments_about_the_licence_at_the_beginning_are_removed(text, remains):
    assert github.remove_license_header(text) == remains
