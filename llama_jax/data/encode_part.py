"""The task that encodes a part of a corpus: ranges of files become a part of the token shards."""

import dataclasses
import functools
import itertools
import json
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_jax.data.bad_records import BadRecords
from llama_jax.data.corpus import CorpusSettings, FileRange, SplitText, read_range
from llama_jax.data.shard_writer import EncodedSpan, SplitWriter
from llama_jax.data.text_files import SPLITS
from llama_jax.runtime.manifest import hash_bytes, write_manifest
from llama_jax.runtime.storage import AnyPath, write_many
from llama_jax.tokenizer.special_text import (
    encode_around_special,
    special_pattern,
    split_around_special,
)
from llama_jax.tokenizer.split_points import SafeSplit, split_text
from llama_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer

PART_SHARD_TOKENS = 1 << 21  # in a file of a part: a worker holds a few times this in memory
_FEW = 8  # starts of special tokens that are searched one by one
_COUNTS = "counts"  # of each token of the vocabulary, in the folder of a split

_load_tokenizer_once = functools.lru_cache(maxsize=1)(load_tokenizer)


@dataclass(frozen=True)
class EncodePart:
    """Encodes ranges of files into the folder of a part, and writes its record last."""

    work: AnyPath  # folder of the intermediate files
    ranges: tuple[FileRange, ...]
    settings: CorpusSettings
    tokenizer: AnyPath
    tokenizer_hash: str
    parse_special: bool = False
    bad_limit: int | None = None  # of a single part

    @functools.cached_property
    def name(self) -> str:
        """A hash of everything that determines the content of the part."""
        ranges = [
            (str(r.path), r.kind, r.size, r.start, r.stop, r.step) for r in self.ranges
        ]  # fmt: skip
        settings = dataclasses.asdict(self.settings)
        content = [ranges, settings, self.tokenizer_hash, self.parse_special]
        return hash_bytes(json.dumps(content).encode())[:32]

    @property
    def output(self) -> AnyPath:
        """The record of the part."""
        return self.work / "done" / "records" / f"{self.name}.json"

    def run(self) -> None:
        """Writes the part into a folder of this attempt, and its record last."""
        # A killed attempt may have left an incomplete folder, and Beam may run two at once.
        folder = self.work / "parts" / f"{self.name}-{secrets.token_hex(4)}"
        tokenizer = _load_tokenizer_once(self.tokenizer)
        safe_split = tokenizer.safe_split
        encode = _encode
        if self.parse_special:
            safe_split = split_around_special(safe_split, tokenizer.special)
            encode = _encode_with_special
        found, bad, records = Counter[str](), BadRecords(self.bad_limit), 0
        count_special = _special_counter(tokenizer)
        writers = {
            split: SplitWriter(folder / split, tokenizer.n_vocab, shard_tokens=PART_SHARD_TOKENS)
            for split in SPLITS
        }
        texts = itertools.chain.from_iterable(
            read_range(part, self.settings, safe_split, bad) for part in self.ranges
        )
        for text in texts:
            records += text.last
            for span in _spans(text, safe_split):
                found.update(count_special(span.text))
                ids = np.array(encode(tokenizer, span), np.uint32)
                n_bytes = len(span.text) if span.text.isascii() else len(span.text.encode())
                writers[text.split].append(
                    EncodedSpan(ids, n_bytes, text.split, span.first, span.last)
                )
        splits = {split: self._finish(writer) for split, writer in writers.items()}
        record = {
            "folder": folder.name,
            "splits": splits,
            "records": records + sum(bad.counts.values()),
            "special": dict(found),
            "bad": bad.as_dict(),
        }
        write_manifest(self.output.parent, record, self.output.name)

    def _finish(self, writer: SplitWriter) -> dict[str, Any]:
        entry = writer.finish()
        write_many(writer.folder, {_COUNTS: writer.counts_V.astype("<i8").tobytes()})
        return {name: entry[name] for name in ("tokens", "documents", "bytes")}


def read_counts(folder: AnyPath) -> np.ndarray:
    """Returns how often each token of the vocabulary is predicted in the split of a part."""
    return np.frombuffer((folder / _COUNTS).read_bytes(), "<i8")


@dataclass
class _Span:
    """A part of a document that one call of `encode` takes."""

    text: str
    first: bool  # whether the document starts with this span
    last: bool  # whether the document ends with this span


def _spans(text: SplitText, safe_split: SafeSplit) -> Iterator[_Span]:
    spans = split_text(text.parts, safe_split)
    span = _Span(next(spans), text.first, last=False)
    for following in spans:
        yield span
        span = _Span(following, first=False, last=False)
    span.last = text.last
    yield span


def _encode(tokenizer: Tokenizer, span: _Span) -> list[int]:
    return tokenizer.encode(span.text, bos=span.first, eos=span.last, continued=not span.first)


def _encode_with_special(tokenizer: Tokenizer, span: _Span) -> list[int]:
    """Returns the ids of a span; a begin or end token that the text contains is not added twice."""
    continued = not span.first

    def encode_part(text: str) -> list[int]:
        nonlocal continued
        ids = tokenizer.encode(text, continued=continued)
        continued = False  # the rest of the span follows a special token
        return ids

    ids = encode_around_special(encode_part, tokenizer.special, span.text)
    bos = span.first and ids[:1] != [tokenizer.bos_id]
    eos = span.last and ids[-1:] != [tokenizer.eos_id]
    return [tokenizer.bos_id] * bos + ids + [tokenizer.eos_id] * eos


def _special_counter(tokenizer: Tokenizer) -> Callable[[str], list[str]]:
    """Returns the function that finds the texts of special tokens in a text."""
    pattern = special_pattern(tokenizer.special)
    # A search for two fixed characters takes a tenth of the time of the pattern.
    starts = {text[:2] for text in tokenizer.special}
    starts = starts if len(starts) <= _FEW else {""}

    def find(text: str) -> list[str]:
        return pattern.findall(text) if pattern and any(s in text for s in starts) else []

    return find
