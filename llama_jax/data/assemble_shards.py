"""The tasks after the encoding of a corpus: sum up the parts, assemble the shards, publish them."""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llama_jax.data.bad_records import BadRecords
from llama_jax.data.encode_part import PART_SHARD_TOKENS, EncodePart, read_counts
from llama_jax.data.shard_writer import (
    hash_shards,
    split_metadata,
    token_dtype,
    unigram_entropy,
)
from llama_jax.data.shards import is_token_folder, write_meta_of_splits
from llama_jax.data.text_files import SPLITS
from llama_jax.errors import Fault
from llama_jax.runtime import zarr_arrays
from llama_jax.runtime.atomic_write import Unfinished
from llama_jax.runtime.damage import classify_errors
from llama_jax.runtime.manifest import hash_bytes, read_manifest, write_manifest
from llama_jax.runtime.storage import AnyPath, read_file, write_file, write_many

BAD_RECORDS = "bad_records.log"  # beside the shards; JSON, but not the name of a corpus file


@dataclass(frozen=True)
class SumParts:
    """Checks that all parts are written, and sums up their records."""

    parts: tuple[EncodePart, ...] = field(repr=False)

    @property
    def output(self) -> AnyPath:
        """The summary, whose name depends on all parts."""
        names = hash_bytes("".join(part.name for part in self.parts).encode())
        return self.parts[0].work / "done" / f"summary-{names[:32]}.json"

    def run(self) -> None:
        """Writes the summary."""
        tokens, special, bad = {split: [] for split in SPLITS}, Counter[str](), BadRecords()
        totals = {split: Counter[str]() for split in SPLITS}
        counts_V: dict[str, np.ndarray | int] = dict.fromkeys(SPLITS, 0)
        folders, records = list[str](), 0
        for part in self.parts:
            with classify_errors(part.work):
                record = read_manifest(part.output.parent, part.output.name)
            if record is None:
                raise Fault(f"{part.output} has disappeared: run the same command again")
            folders.append(record["folder"])
            records += record["records"]
            special.update(record["special"])
            bad.merge(record["bad"])
            for split, entry in record["splits"].items():
                tokens[split].append(entry["tokens"])
                totals[split].update(entry)
                if entry["tokens"]:
                    folder = part.work / "parts" / record["folder"] / split
                    counts_V[split] = counts_V[split] + read_counts(folder)
        summary = {
            "folders": folders,  # of the parts
            "tokens": tokens,  # of each part, by split
            "totals": {split: dict(total) for split, total in totals.items()},
            "entropy": {split: unigram_entropy(np.asarray(counts_V[split])) for split in SPLITS},
            "records": records,
            "special": dict(special.most_common()),
            "bad": bad.as_dict(),
        }
        write_manifest(self.output.parent, summary, self.output.name)


def read_summary(task: SumParts) -> dict[str, Any] | None:
    """Returns what `task` wrote; None if another process has removed it meanwhile.

    Raises:
        Fault, Damaged: it can't be read.
    """
    with classify_errors(task.output.parent):
        return read_manifest(task.output.parent, task.output.name)


@dataclass(frozen=True)
class AssembleShard:
    """Writes one file of each array of a split, from the parts that it overlaps."""

    work: AnyPath
    folder: AnyPath  # of the split
    index: int  # of the shard
    length: int  # of the complete split [tokens]
    n_vocab: int
    shard_tokens: int
    chunk_tokens: int
    slices: tuple[tuple[AnyPath, int, int], ...]  # folder, first token and end of each part

    @property
    def output(self) -> AnyPath:
        """The hashes of the contents of the two files."""
        return self.work / "done" / "shards" / f"{self.folder.name}-{self.index}.json"

    def run(self) -> None:
        """Writes the files, and their hashes last."""
        first = self.index * self.shard_tokens
        n = min(self.shard_tokens, self.length - first)
        dtype = token_dtype(self.n_vocab)
        tokens, starts = np.empty(n, dtype), np.empty(n, bool)
        position = 0
        for folder, start, stop in self.slices:
            with classify_errors(folder):
                arrays = zarr_arrays.open_for_reading(folder, ("tokens", "starts"))
                for low in range(start, stop, PART_SHARD_TOKENS):  # bounds the memory
                    high = min(low + PART_SHARD_TOKENS, stop)
                    end = position + high - low
                    tokens[position:end] = arrays["tokens"][low:high].read().result()
                    bits = arrays["starts"][low // 8 : -(-high // 8)].read().result()
                    starts[position:end] = np.unpackbits(bits)[low % 8 :][: high - low]
                    position = end
        assert position == n, (position, n)
        packed = np.packbits(starts)
        del starts
        metadata = split_metadata(self.length, dtype, self.shard_tokens, self.chunk_tokens)
        stores = zarr_arrays.open_for_writing(self.folder, metadata)
        contents = {"tokens": (tokens, first), "starts": (packed, first // 8)}
        for name, (array, offset) in contents.items():
            stores[name][offset : offset + len(array)].write(array).result()
        hashes = {name: hash_bytes(array.data) for name, (array, _) in contents.items()}
        write_file(self.output, json.dumps(hashes).encode())


def plan_shards(
    work: AnyPath,
    summary: dict[str, Any],
    final: AnyPath,
    n_vocab: int,
    shard_tokens: int,
    chunk_tokens: int,
) -> list[AssembleShard]:
    """Returns the tasks that assemble the shards of all splits."""
    tasks = list[AssembleShard]()
    for split in SPLITS:
        counts = summary["tokens"][split]
        ends = np.cumsum(counts, dtype=np.int64)
        length = int(ends[-1])
        for index, first in enumerate(range(0, length, shard_tokens)):
            stop = min(first + shard_tokens, length)
            slices = list[tuple[AnyPath, int, int]]()
            number = int(np.searchsorted(ends, first, "right"))
            while number < len(counts) and (begin := int(ends[number]) - counts[number]) < stop:
                low, high = max(first - begin, 0), min(stop - begin, counts[number])
                if low < high:
                    folder = work / "parts" / summary["folders"][number] / split
                    slices.append((folder, low, high))
                number += 1
            tasks.append(
                AssembleShard(
                    work, final / split, index, length, n_vocab, shard_tokens,
                    chunk_tokens, tuple(slices),
                )
            )  # fmt: skip
    return tasks


@dataclass(frozen=True)
class Publish:
    """Writes the metadata of the shards, and publishes their folder."""

    folder: Unfinished
    shards: tuple[AssembleShard, ...] = field(repr=False)
    summary: dict[str, Any] = field(repr=False, hash=False)
    sources: tuple[str, ...]
    tokenizer: AnyPath
    n_vocab: int
    shard_tokens: int
    chunk_tokens: int

    @property
    def output(self) -> AnyPath:
        """The complete folder."""
        return self.folder.path

    def run(self) -> None:
        """Writes `meta.json` last, and removes the intermediate files."""
        final = self.folder.final
        if not is_token_folder(final):  # a killed process may have got this far
            bad = BadRecords(**self.summary["bad"])
            if bad.counts:
                write_file(final / BAD_RECORDS, bad.report())
            splits = {split: self._write_split(split) for split in SPLITS}
            write_meta_of_splits(
                final, sources=self.sources, tokenizer=self.tokenizer, n_vocab=self.n_vocab,
                splits=splits, shard_tokens=self.shard_tokens,
                details={"bad_records": bad.counts} if bad.counts else {},
            )  # fmt: skip
        self.folder.publish()

    def _write_split(self, split: str) -> dict[str, Any]:
        """Writes the metadata of the arrays of a split; returns its entry in `meta.json`."""
        final, totals = self.folder.final, self.summary["totals"][split]
        arrays = split_metadata(
            totals["tokens"], token_dtype(self.n_vocab), self.shard_tokens, self.chunk_tokens
        )
        files = zarr_arrays.metadata_files(arrays)
        write_many(final / split, files)
        hashes = [
            json.loads(read_file(shard.output))
            for shard in self.shards
            if shard.folder.name == split
        ]
        return {
            **totals,
            "unigram_entropy": self.summary["entropy"][split],
            "sha256": [hash_shards([shard[name] for shard in hashes]) for name in arrays],
            "files": {f"{split}/{name}": hash_bytes(data) for name, data in files.items()},
        }
