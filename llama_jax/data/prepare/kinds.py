"""The kinds of sources: how a raw file of each is read, and the rules of each in their order."""

from collections.abc import Iterator
from types import ModuleType

from llama_jax.config.prepare import SourceEntry
from llama_jax.data.prepare import (
    arxiv,
    books,
    c4,
    commoncrawl,
    github,
    stackexchange,
    wikipedia,
)
from llama_jax.data.prepare.decontamination import decontamination
from llama_jax.data.prepare.document import Document
from llama_jax.data.prepare.grouping import Grouping
from llama_jax.data.prepare.near_duplicates import NearDuplicates, near_duplicates
from llama_jax.data.prepare.rules import Rule
from llama_jax.runtime.storage import AnyPath

# Each module has `read(path)`, which yields the documents of a raw file, and `rules(entry)`, which
# returns rules and grouping steps in their order. They import their libraries inside functions.
_MODULES: dict[str, ModuleType] = {
    "commoncrawl": commoncrawl,
    "c4": c4,
    "github": github,
    "wikipedia": wikipedia,
    "books": books,
    "arxiv": arxiv,
    "stackexchange": stackexchange,
}

_NOT_EMPTY = Rule(
    "not empty",
    "nothing to learn from",
    lambda document: document if document.text.strip() else None,
)


def read_raw(entry: SourceEntry, path: AnyPath) -> Iterator[Document]:
    """Yields the documents of a raw file.

    Raises:
        InputError: the file can't be read, or is damaged.
    """
    return _MODULES[entry.kind].read(path)


def is_raw_folder(entry: SourceEntry, path: AnyPath) -> bool:
    """Returns whether a folder is one raw file of its kind: for `github`, that of a repository."""
    return entry.kind == "github" and github.is_repository(path)


def source_steps(entry: SourceEntry) -> list[Rule | Grouping | NearDuplicates]:
    """Returns the rules and grouping steps of a source in their order.

    Raises:
        InputError: a package or a file that a rule needs is missing.
    """
    steps = [_NOT_EMPTY, *_MODULES[entry.kind].rules(entry)]
    if entry.near_duplicates is not None:
        steps.append(near_duplicates(entry.near_duplicates))
    if entry.decontaminate is not None:
        steps.append(decontamination(entry.decontaminate))
    return steps
