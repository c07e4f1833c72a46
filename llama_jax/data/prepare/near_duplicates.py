"""Near-duplicates: of documents that share most of their word sequences, the first one remains.

Four stages of tasks, each of bounded memory:

1. `Signatures` of each file of documents: the set of its word sequences, and its hashes of bands.
2. `Candidates` of each partition of the hashes: pairs of documents with an equal hash.
3. `SimilarPairs`: the candidates whose sets are similar enough.
4. `Duplicates`: connected documents form a group, of which all but the first are duplicates.

What remains depends on the documents and on their order only, not on how tasks are run. A document
is identified by `file << 32 | row`: its file's number, and its number in the file.
"""

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llama_jax.data.prepare.document import read_documents
from llama_jax.data.prepare.minhash import check_minhash_package, hash_bands, hash_shingles, jaccard
from llama_jax.data.prepare.number_files import NumberFile, write_numbers
from llama_jax.data.tasks import Task
from llama_jax.runtime.storage import AnyPath

# The hashes of this many files of documents are sorted by one task: about 10 million hashes if a
# file has 64 MB and a document 1 kB.
FILES_PER_PARTITION = 8
# Documents with an equal hash are compared with the first 8 of them, not all with all: the number
# of pairs grows linearly with the number of copies.
_LEADERS = 8
_BATCH = 1 << 22  # characters of the documents whose signatures are computed together


class NearDuplicates(NamedTuple):
    """A step in a source's list of rules that removes near-duplicates.

    Attributes:
        name: as a rule's.
        reference: as a rule's.
        similarity: a function of the sizes (shared, first, second) of two sets of word sequences.
        threshold: lowest similarity of near-duplicates; MinHash finds 99.8 % of the pairs with
            Jaccard similarity 0.8.
        n_words: length of a sequence [words].
    """

    name: str
    reference: str
    similarity: Callable[[int, int, int], float]
    threshold: float
    n_words: int = 5


def near_duplicates(threshold: float) -> NearDuplicates:
    """Returns the step that removes documents whose Jaccard similarity to an earlier one is high.

    Raises:
        InputError: the package that finds near-duplicates is not installed.
    """
    check_minhash_package()
    reference = "Lee et al., arXiv 2107.06499, section 4.2"
    return NearDuplicates("near-duplicates", reference, jaccard, threshold)


def near_duplicate_stages(
    step: NearDuplicates, files: Sequence[AnyPath], folder: AnyPath
) -> list[list[Task]]:
    """Returns the tasks of each stage; `read_duplicates` then reads their result.

    Args:
        step: the step.
        files: the files of documents, in order.
        folder: where the outputs of the tasks go.
    """
    n = len(files)
    n_partitions = math.ceil(n / FILES_PER_PARTITION)
    partitions = range(n_partitions)
    return [
        [Signatures(folder, i, n_partitions, file, step.n_words) for i, file in enumerate(files)],
        [Candidates(folder, i, n) for i in partitions],
        [
            SimilarPairs(folder, i, n_partitions, step.similarity, step.threshold)
            for i in partitions
        ],
        [Duplicates(folder, n_partitions, n)],
    ]


def read_duplicates(folder: AnyPath, file: int) -> np.ndarray:
    """Returns the rows of the duplicates in the documents of a file, ascending: int64 [n]."""
    with contextlib.closing(NumberFile(folder / _DUPLICATES)) as found:
        return (found.read_range(0, 1, file) & np.uint64(0xFFFFFFFF)).astype(np.int64)


_DUPLICATES = "duplicates"


def _signatures(folder: AnyPath, file: int) -> AnyPath:
    return folder / f"signatures-{file:05d}"


def _candidates(folder: AnyPath, partition: int) -> AnyPath:
    return folder / f"candidates-{partition:05d}"


def _similar_pairs(folder: AnyPath, partition: int) -> AnyPath:
    return folder / f"similar-{partition:05d}"


def _bounds(numbers: np.ndarray, n_ranges: int) -> np.ndarray:
    """Returns the bounds of the ranges of equal numbers 0 to n_ranges - 1 in a sorted array."""
    return np.searchsorted(numbers, np.arange(n_ranges + 1, dtype=numbers.dtype))


@dataclasses.dataclass(frozen=True)
class Signatures:
    """Hashes the documents of a file.

    The sections of the output: the sets of all documents; their bounds [n + 1]; rows of a band's
    hash and a document [k, 2], sorted; the bounds of the partitions in them [n_partitions + 1].
    """

    folder: AnyPath
    file: int
    n_partitions: int
    documents: AnyPath
    n_words: int

    @property
    def output(self) -> AnyPath:
        """The file of signatures."""
        return _signatures(self.folder, self.file)

    def run(self) -> None:
        """Writes the output."""
        sizes, hashes = [np.zeros(1, np.uint64)], [np.empty((0, 2), np.uint64)]

        def read_sets() -> Iterator[np.ndarray]:
            texts = (document.text for document in read_documents(self.documents))
            first = self.file << 32
            for batch in _batches(texts):
                sets = [hash_shingles(text, self.n_words) for text in batch]
                yield from sets
                sizes.append(np.array([*map(len, sets)], np.uint64))
                documents = np.arange(first, first + len(sets), dtype=np.uint64)[:, None]
                pairs = np.stack(np.broadcast_arrays(hash_bands(sets), documents), 2)
                hashes.append(pairs[sizes[-1] > 0].reshape(-1, 2))
                first += len(sets)

        def sort_hashes() -> Iterator[np.ndarray]:
            yield np.cumsum(np.concatenate(sizes))
            hashes[:] = [_sorted_rows(np.concatenate(hashes))]

        # `write_numbers` takes the sections in order: the hashes are sorted once all sets are read.
        write_numbers(
            self.output,
            read_sets(),
            sort_hashes(),
            hashes,
            map(self._partition_bounds, hashes),
        )

    def _partition_bounds(self, hashes: np.ndarray) -> np.ndarray:
        top = hashes[:, 0] >> np.uint64(32)
        return 2 * _bounds(top * np.uint64(self.n_partitions) >> np.uint64(32), self.n_partitions)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yields consecutive texts of about _BATCH characters, at least one."""
    batch, size = list[str](), 0
    for text in texts:
        batch.append(text)
        size += len(text) + 1000  # a short text has a signature, too
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _sorted_rows(rows: np.ndarray) -> np.ndarray:
    """Returns rows of two numbers in lexicographic order."""
    return rows[np.lexsort((rows[:, 1], rows[:, 0]))]


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Pairs the documents that have equal hashes in a partition.

    The sections of the output: pairs of documents [k, 2] with the first one in front, sorted; the
    bounds of the partitions of `SimilarPairs` in them [n_partitions + 1].
    """

    folder: AnyPath
    partition: int
    n_files: int

    @property
    def output(self) -> AnyPath:
        """The file of pairs."""
        return _candidates(self.folder, self.partition)

    def run(self) -> None:
        """Writes the output."""
        parts = [np.empty(0, np.uint64)]
        for file in range(self.n_files):
            with contextlib.closing(NumberFile(_signatures(self.folder, file))) as signatures:
                parts.append(signatures.read_range(2, 3, self.partition))
        pairs = _pair_equal_hashes(_sorted_rows(np.concatenate(parts).reshape(-1, 2)))
        n_partitions = math.ceil(self.n_files / FILES_PER_PARTITION)
        partitions = (pairs[:, 0] >> np.uint64(32)) // np.uint64(FILES_PER_PARTITION)
        write_numbers(self.output, [pairs], [2 * _bounds(partitions, n_partitions)])


def _pair_equal_hashes(rows: np.ndarray) -> np.ndarray:
    """Returns sorted, different pairs of documents [k, 2] with equal hashes.

    Args:
        rows: sorted rows of hash and document.
    """
    hashes, documents = rows[:, 0], rows[:, 1]
    positions = np.arange(len(rows))
    is_first = np.ones(len(rows), bool)
    is_first[1:] = hashes[1:] != hashes[:-1]
    starts = np.maximum.accumulate(np.where(is_first, positions, 0))
    pairs = [np.empty((0, 2), np.uint64)]
    for leader in range(_LEADERS):
        later = positions[positions - starts > leader]
        pairs.append(np.stack([documents[starts[later] + leader], documents[later]], 1))
    return np.unique(np.concatenate(pairs), axis=0)


@dataclasses.dataclass(frozen=True)
class SimilarPairs:
    """Compares the sets of the candidates whose first document is in FILES_PER_PARTITION files.

    The section of the output: the similar pairs of documents [k, 2], sorted.
    """

    folder: AnyPath
    partition: int
    n_partitions: int
    similarity: Callable[[int, int, int], float]
    threshold: float

    @property
    def output(self) -> AnyPath:
        """The file of pairs."""
        return _similar_pairs(self.folder, self.partition)

    def run(self) -> None:
        """Writes the output."""
        parts = [np.empty(0, np.uint64)]
        for partition in range(self.n_partitions):
            with contextlib.closing(NumberFile(_candidates(self.folder, partition))) as candidates:
                parts.append(candidates.read_range(0, 1, self.partition))
        pairs = np.unique(np.concatenate(parts).reshape(-1, 2), axis=0)
        with _SetReader(self.folder) as reader:
            similar = [self._are_similar(reader, *pair) for pair in pairs.tolist()]
        write_numbers(self.output, [pairs[np.array(similar, bool)]])

    def _are_similar(self, reader: "_SetReader", first: int, second: int) -> bool:
        a, b = reader.read(first), reader.read(second)
        shared = len(np.intersect1d(a, b, assume_unique=True))
        return self.similarity(shared, len(a), len(b)) >= self.threshold


class _SetReader(contextlib.ExitStack):
    """Reads the sets of documents, with few of them in memory and few files open."""

    def __init__(self, folder: AnyPath) -> None:
        super().__init__()
        self._folder = folder
        self._files = collections.OrderedDict[int, NumberFile]()
        self.read = functools.lru_cache(maxsize=16)(self._read)

    def _read(self, document: int) -> np.ndarray:
        file, row = document >> 32, document & 0xFFFFFFFF
        if file not in self._files:
            if len(self._files) == 64:
                self._files.popitem(last=False)[1].close()
            self._files[file] = NumberFile(_signatures(self._folder, file))
            self.callback(self._files[file].close)
        self._files.move_to_end(file)
        return self._files[file].read_range(0, 1, row)


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """Groups connected documents. Memory grows with the number of similar documents.

    The sections of the output: all documents of a group except the first one, sorted; the bounds of
    the files in them [n_files + 1].
    """

    folder: AnyPath
    n_partitions: int
    n_files: int

    @property
    def output(self) -> AnyPath:
        """The file of documents to remove."""
        return self.folder / _DUPLICATES

    def run(self) -> None:
        """Writes the output."""
        groups = _Groups()
        for partition in range(self.n_partitions):
            with contextlib.closing(NumberFile(_similar_pairs(self.folder, partition))) as similar:
                for first, second in similar.read(0).reshape(-1, 2).tolist():
                    groups.join(first, second)
        duplicates = np.array(groups.later_members(), np.uint64)
        write_numbers(
            self.output, [duplicates], [_bounds(duplicates >> np.uint64(32), self.n_files)]
        )


class _Groups:
    """Disjoint sets of documents (union-find); the first document represents a set."""

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}

    def _find(self, document: int) -> int:
        parent = self._parents.setdefault(document, document)
        while parent != document:
            grandparent = self._parents[parent]
            self._parents[document] = grandparent  # halves the path
            document, parent = parent, grandparent
        return document

    def join(self, first: int, second: int) -> None:
        """Joins the sets of two documents."""
        first, second = self._find(first), self._find(second)
        self._parents[max(first, second)] = min(first, second)

    def later_members(self) -> list[int]:
        """Returns all documents that are not the first of their set, ascending."""
        return sorted(d for d in self._parents if self._find(d) != d)
