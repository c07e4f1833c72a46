"""The task that trains a tokenizer on a corpus."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from llama_jax.data.bad_records import BadRecords
from llama_jax.data.corpus import CorpusSettings, FileRange, read_range
from llama_jax.data.corpus_plan import text_size
from llama_jax.data.text_files import split_lines
from llama_jax.runtime.manifest import hash_bytes
from llama_jax.runtime.storage import AnyPath
from llama_jax.tokenizer.split_points import never_split
from llama_jax.tokenizer.train import MAX_LINE_BYTES, train_tokenizer

# A tokenizer is trained on at most this much of the corpus, on lines at equal distances:
# SentencePiece needs four times the text in memory.
_TRAINING_BYTES = 1 << 26


@dataclass(frozen=True)
class TrainTokenizer:
    """Trains a tokenizer on the lines of the texts that are not held out."""

    work: AnyPath
    files: tuple[FileRange, ...] = field(repr=False)
    settings: CorpusSettings
    n_vocab: int
    bad_limit: int | None

    @property
    def output(self) -> AnyPath:
        """The tokenizer's file, in a folder whose name depends on the corpus."""
        files = [(str(file.path), file.kind, file.size) for file in self.files]
        content = json.dumps([files, asdict(self.settings), self.n_vocab])
        return self.work / f"tokenizer-{hash_bytes(content.encode())[:32]}" / "tokenizer.model"

    def run(self) -> None:
        """Writes the tokenizer's file."""
        every = max(1, -(-sum(map(text_size, self.files)) // _TRAINING_BYTES))
        train_tokenizer(itertools.islice(self._lines(), 0, None, every), self.output, self.n_vocab)

    def _lines(self) -> Iterator[str]:
        bad = BadRecords(self.bad_limit)
        for file in self.files:
            for text in read_range(file, self.settings, never_split, bad):
                if text.split == "train":
                    yield from split_lines(text.parts, MAX_LINE_BYTES)
