"""Source code of repositories (LLaMA's paper, arXiv 2302.13971, section 2.1).

A raw input is an archive of a repository or of a source package (.tar, also with .gz .bz2 .xz .zst,
or .zip), the folder of a repository, or JSON lines or Parquet with content, path, repository and
licence, as BigQuery's tables of GitHub and The Stack have them.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from llama_jax.config.prepare import GitHubEntry
from llama_jax.data.parquet_files import read_rows
from llama_jax.data.prepare.archive_files import is_archive, read_archive
from llama_jax.data.prepare.code_languages import code_language
from llama_jax.data.prepare.document import Document
from llama_jax.data.prepare.grouping import Grouping, exact_duplicates
from llama_jax.data.prepare.licenses import (
    is_allowed,
    is_license_file,
    join_licenses,
    license_of_files,
)
from llama_jax.data.prepare.rules import Rule
from llama_jax.data.text_files import PARQUET, is_json_lines, parse_json_line, read_lines
from llama_jax.errors import InputError
from llama_jax.runtime.bucket_path import BucketPath
from llama_jax.runtime.storage import AnyPath

PAPER = "arXiv 2302.13971, section 2.1, GitHub"
_FILTERS = "https://github.com/bigcode-project/bigcode-dataset/tree/main/preprocessing"  # The Stack
_GITHUB_CODE = "https://huggingface.co/datasets/codeparrot/github-code"
_CLEAN = "https://huggingface.co/datasets/codeparrot/github-code-clean"
_CODEPARROT = "https://huggingface.co/datasets/transformersbook/codeparrot"
LONGEST_FILE = (1 << 20) - 1  # bytes
LONGEST_LINE = 1000  # characters
LONGEST_MEAN_LINE = 100  # characters
LOWEST_ALPHANUMERIC_SHARE = 0.25

# Field names of BigQuery's tables, of github-code and of The Stack, in this order.
_CONTENT = ("content", "text", "code")
_PATH = ("path", "max_stars_repo_path")
_REPOSITORY = ("repo_name", "repository", "max_stars_repo_name")
_LICENSE = ("license", "licenses", "detected_licenses", "max_stars_repo_licenses")


def read(path: AnyPath) -> Iterator[Document]:
    """Yields every file of a repository, or the file of each JSON line or row.

    The metadata are `repository`, `path`, `license` (an SPDX expression; "" if unknown) and
    `language`. Bytes that are not UTF-8 become U+FFFD. A file above the limit is cut one
    byte above it, so that the rule `size` removes it.

    Raises:
        InputError: the input can't be read, is damaged, or a line has no content or path.
    """
    if not is_archive(path) and not path.is_dir():
        yield from _read_files_of_records(path)
        return
    name = re.sub(r"\.(tar(\.\w+)?|t[gbx]z2?|zip)$", "", path.name)
    root, license_name = _find_license(path)
    for file in read_archive(path):
        inner = file.name.removeprefix(root)
        text = file.read(LONGEST_FILE + 1).decode(errors="replace")
        yield Document(f"{name}/{inner}", text, _metadata(name, inner, license_name))


def is_repository(path: AnyPath) -> bool:
    """Returns whether a path is a folder on this machine with a licence file."""
    if isinstance(path, BucketPath) or not path.is_dir():
        return False
    return any(is_license_file(inner.name) for inner in path.iterdir() if inner.is_file())


def _metadata(repository: str, path: str, license_name: str) -> dict[str, str]:
    return {
        "repository": repository,
        "path": path,
        "license": license_name,
        "language": code_language(path),
    }


def _find_license(path: AnyPath) -> tuple[str, str]:
    """Returns the folder that contains all files ("" or "NAME/"), and the repository's licence."""
    top_folders, texts = set[str](), dict[str, str]()
    for file in read_archive(path):
        top, _, inner = file.name.partition("/")
        top_folders.add(top if inner else "")
        if is_license_file(file.name) or is_license_file(inner):
            texts[file.name] = file.read(LONGEST_FILE).decode(errors="replace")
    root = f"{top}/" if len(top_folders) == 1 and (top := top_folders.pop()) else ""
    return root, license_of_files(
        {
            name: text
            for name, text in texts.items()
            if is_license_file(name) or is_license_file(name.removeprefix(root))
        }
    )


def _read_records(path: AnyPath) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the location and the fields of each row of Parquet, or of each JSON line."""
    if path.suffix == PARQUET:
        fields = (*_CONTENT, *_PATH, *_REPOSITORY, *_LICENSE)
        for number, row in read_rows(path, 0, None, *fields):
            yield f"{path}: row {number}", row
        return
    if not is_json_lines(path):
        raise InputError(
            f"{path} is no source of code: give an archive (.tar.gz, .tar.xz, .zip …), the folder"
            " of a repository, JSON lines, or Parquet"
        )
    for location, line in read_lines(path):
        record = parse_json_line(line, location)
        if not isinstance(record, dict):
            raise InputError(f"{location} is not a JSON object: correct or remove it")
        yield location, record


def _read_files_of_records(path: AnyPath) -> Iterator[Document]:
    for location, record in _read_records(path):
        text, name = _field(record, _CONTENT), _field(record, _PATH)
        if not isinstance(text, str) or not isinstance(name, str):
            raise InputError(
                f"{location}: a file needs a string of {_alternatives(_CONTENT)} and of"
                f" {_alternatives(_PATH)}; this one has: {', '.join(record)}"
            )
        repository, licenses = _field(record, _REPOSITORY), _field(record, _LICENSE)
        names = licenses if isinstance(licenses, list) else [licenses or ""]
        repository = repository if isinstance(repository, str) else ""
        metadata = _metadata(repository, name, join_licenses(map(str, names)))
        yield Document(f"{repository}/{name}".lstrip("/"), text[: LONGEST_FILE + 1], metadata)


def _field(record: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((record[name] for name in names if record.get(name)), None)


def _alternatives(names: tuple[str, ...]) -> str:
    return " or ".join(f'"{name}"' for name in names)


def rules(settings: GitHubEntry) -> list[Rule | Grouping]:
    """Returns the steps for source code, in the order in which they apply."""
    return [
        Rule("licence", PAPER, _keep_if(lambda d: has_license(d, settings))),
        Rule("language", _GITHUB_CODE, _keep_if(lambda d: d.metadata["language"] != "")),
        Rule(
            "size",
            _CODEPARROT,
            _keep_if(lambda d: len(d.text.encode(errors="replace")) <= LONGEST_FILE),
        ),
        Rule("binary", _CODEPARROT, _keep_if(lambda d: is_text(d.text))),
        Rule("generated", _CLEAN, _keep_if(lambda d: not is_generated(d.text))),
        Rule("licence header", PAPER, lambda d: d._replace(text=remove_license_header(d.text))),
        Rule("longest line", _FILTERS, _keep_if(lambda d: longest_line(d.text) <= LONGEST_LINE)),
        Rule("mean line", _FILTERS, _keep_if(lambda d: mean_line(d.text) <= LONGEST_MEAN_LINE)),
        Rule(
            "alphanumeric share",
            _FILTERS,
            _keep_if(lambda d: alphanumeric_share(d.text) >= LOWEST_ALPHANUMERIC_SHARE),
        ),
        exact_duplicates(PAPER),
    ]


def _keep_if(condition: Callable[[Document], bool]) -> Callable[[Document], Document | None]:
    return lambda document: document if condition(document) else None


def has_license(document: Document, settings: GitHubEntry) -> bool:
    """Returns whether the licence of a document's repository is in the list of the settings."""
    expression = document.metadata["license"] or settings.license or ""
    return is_allowed(expression, settings.licenses)


def is_text(text: str) -> bool:
    """Returns whether a file was UTF-8 text without NUL."""
    return "\0" not in text and "\ufffd" not in text


_GENERATED = re.compile(
    r"(?i)auto[- ]?generated|automatically[ -]generated|generated (?:automatically )?(?:by|from)\b"
    r"|do not (?:edit|modify)"
)
_GO_GENERATED = re.compile(r"(?m)^// Code generated .* DO NOT EDIT\.$")


def is_generated(text: str) -> bool:
    """Returns whether a file says in its first 5 lines, or in Go's line, that a program wrote it.

    Source: CodeParrot searches the first 5 lines; Go's line: https://go.dev/s/generatedcode
    """
    first = "\n".join(text[:5000].split("\n", 5)[:5])
    return bool(_GENERATED.search(first) or _GO_GENERATED.search(text))


_FIRST_LINES = re.compile(  # a shebang, an encoding, an opening tag: they stay
    r"(?:\ufeff?#!.*\n|#.*coding[:=].*\n|<\?(?:php|xml).*\n|<!DOCTYPE.*\n|[ \t]*\n)*"
)
_COMMENT = re.compile(
    r"(?s:/\*.*?\*/|<!--.*?-->|\(\*.*?\*\)|\{-.*?-\})[ \t]*\n?"
    # '#' begins no comment in '#include' and Rust's '#![…]'.
    r"|(?:[ \t]*(?://|#(?![ \t]*(?:include|define|if|pragma)|!?\[)|--|;|%|!|(?i:rem)\b).*(?:\n|$))+"
)
_ABOUT_LICENSE = re.compile(
    r"(?i)copyright|\(c\) ?\d{4}|SPDX-License-Identifier|all rights reserved|licen[sc]ed under"
)


def remove_license_header(text: str) -> str:
    """Returns a file without the comments about copyright and licence above its code.

    Other comments stay, as do a shebang, the encoding, and the first line of PHP, XML and HTML.
    """
    first = _FIRST_LINES.match(text)
    head = first[0] if first else ""
    rest = text[len(head) :]
    while (comment := _COMMENT.match(rest)) and _ABOUT_LICENSE.search(comment[0]):
        rest = rest[comment.end() :].lstrip("\n")
    return head + rest


def longest_line(text: str) -> int:
    """Returns the length of the longest line [characters]."""
    return max(map(len, text.split("\n")))


def mean_line(text: str) -> float:
    """Returns the mean length of the lines [characters]; a last line break begins no line."""
    lines = text.removesuffix("\n").split("\n")
    return sum(map(len, lines)) / len(lines)


def alphanumeric_share(text: str) -> float:
    """Returns the share of letters and digits among all characters; 0 of an empty text."""
    return sum(map(str.isalnum, text)) / max(1, len(text))
