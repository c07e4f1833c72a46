"""Steps that compare the documents of many files: duplicates are removed after the first.

A grouping step splits a document into units (the document itself, its lines, …) and gives each a
key. The units of all files are sorted into partitions by their keys, so that equal keys meet in one
partition, and a task reads one partition: its memory is bounded. Which unit is the first depends on
the order of the inputs only, not on the order in which tasks run.
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from llama_jax.data.prepare.document import Document


def find_later_occurrences(keys: np.ndarray) -> np.ndarray:
    """Returns which units have the key of an earlier unit: bool [n].

    Args:
        keys: uint64 [n, W] in the order of the units.
    """
    rows = np.ascontiguousarray(keys).view([(f"{i}", keys.dtype) for i in range(keys.shape[1])])
    _, first = np.unique(rows if keys.shape[1] > 1 else keys, return_index=True)
    later = np.ones(len(keys), bool)
    later[first] = False
    return later


def remove_document(document: Document, units: np.ndarray) -> Document | None:
    """Returns None: one unit that is a duplicate removes the document."""
    return None


class Grouping(NamedTuple):
    """A step in a source's list of rules that removes duplicates. All functions are pure.

    Attributes:
        name: as a rule's.
        reference: as a rule's.
        keys: returns the keys of a document's units, uint64 [n, W] with one W for all documents.
            The first of the W numbers must be uniformly distributed, as a hash is: it selects the
            partition. n may be 0.
        find: is given all keys of a partition in the order of the inputs, [n, W]; returns which
            units are removed, bool [n].
        remove: is given a document and the numbers of its removed units (at least one); returns
            what remains of the document, or None.
        files: number of consecutive input files that are compared with each other; None: all.
        report: is given the keys of all removed units [n, W] and the number of the document of each
            [n]; returns a value for the funnel, as JSON. None: nothing to report.
    """

    name: str
    reference: str
    keys: Callable[[Document], np.ndarray]
    find: Callable[[np.ndarray], np.ndarray] = find_later_occurrences
    remove: Callable[[Document, np.ndarray], Document | None] = remove_document
    files: int | None = None
    report: Callable[[np.ndarray, np.ndarray], Any] | None = None


def hash_texts(texts: list[str], n_bits: int = 64) -> np.ndarray:
    """Returns the first 64 or 128 bits of the SHA-1 of each text: uint64 [n, 1] or [n, 2]."""
    size = n_bits // 8
    digests = b"".join(
        hashlib.sha1(t.encode(errors="replace"), usedforsecurity=False).digest()[:size]
        for t in texts
    )
    return np.frombuffer(digests, "<u8").reshape(len(texts), n_bits // 64)


def exact_duplicates(reference: str) -> Grouping:
    """Returns the step that removes each document whose text is equal to an earlier one's.

    128 bits of a hash represent a text: among 10^12 documents, the probability of one error is
    10^-15.
    """
    return Grouping("exact duplicates", reference, lambda d: hash_texts([d.text], 128))
