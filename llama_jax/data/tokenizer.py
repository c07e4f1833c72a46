"""Text to token ids and back, behind one interface for every tokenizer of the family."""

import hashlib
import io
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece as spm
from sentencepiece.sentencepiece_model_pb2 import (
    ModelProto,  # pyright: ignore[reportAttributeAccessIssue] (made at import)
)

from llama_jax.errors import InputError


class Tokenizer(Protocol):
    """What the rest of the program asks of a tokenizer."""

    path: Path
    n_vocab: int
    bos_id: int
    end_ids: frozenset[int]  # any of these ends a text

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Returns the ids of `text`, between the begin and the end token where asked for."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; control tokens have none."""
        ...


class SentencePiece:
    """The tokenizer of LLaMA and Llama 2: a SentencePiece `tokenizer.model`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._processor = _processor(self.path)
        self.n_vocab: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.end_ids = frozenset({self.eos_id})

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Returns the ids of `text`, between <s> and </s> where asked for.

        Raises:
            InputError: the text holds half of a surrogate pair, which UTF-8 can't write.
        """
        try:
            ids = self._processor.encode(text)
        except RuntimeError as error:  # SentencePiece's for a text that UTF-8 can't write
            raise InputError(
                "the text holds half of a surrogate pair, which UTF-8 can't write: remove it"
            ) from error
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        strange = [i for i in ids if not 0 <= i < self.n_vocab]
        if strange:
            raise InputError(
                f"token {strange[0]} is outside the {self.n_vocab} tokens of {self.path}: the model"
                " and the tokenizer don't belong together"
            )
        return self._processor.decode(ids)


def _processor(path: Path) -> spm.SentencePieceProcessor:
    if not path.is_file():
        raise InputError(f"there is no tokenizer at {path}: name a SentencePiece tokenizer.model")
    try:
        return spm.SentencePieceProcessor(model_proto=path.read_bytes())
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{path} is not a SentencePiece model (or is cut short): give a tokenizer.model file"
        ) from error


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Returns the tokenizer in the file `path`, or in the folder's `tokenizer.model`.

    Raises:
        InputError: there is none, or it can't be read.
    """
    path = Path(path)
    return SentencePiece(path / "tokenizer.model" if path.is_dir() else path)


def file_hash(path: str | Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# SentencePiece writes a space as U+2581, so on decoding a real U+2581 would come back as a space.
# Escape it with a code point that Unicode reserves for internal use, and escape that with itself.
_ESCAPE = "2581\tFDD0 FDD2\nFDD0\tFDD0 FDD1\n"
_UNESCAPE = "FDD0 FDD2\t2581\nFDD0 FDD1\tFDD0\n"


def train_tokenizer(texts: Iterable[str], path: str | Path, n_vocab: int) -> None:
    """Trains a tokenizer as LLaMA's was (arXiv 2302.13971, section 2.1) and writes it to `path`.

    Byte-pair encoding; numbers are split into digits, unknown characters into UTF-8 bytes, and
    nothing is normalised: decode(encode(text)) is text, for every text that UTF-8 can write.

    Args:
        texts: what to learn from; a line is a training sentence.
        path: the `tokenizer.model` to write.
        n_vocab: number of tokens, with 3 control tokens and 256 bytes among them.

    Raises:
        InputError: the texts are empty, or hold too little for so many tokens.
    """
    failed: list[BaseException] = []

    def lines() -> Iterator[str]:
        try:
            for text in texts:
                yield from (line for line in text.split("\n") if line)
        except BaseException as error:  # SentencePiece would lose it
            failed.append(error)
            raise

    with tempfile.TemporaryDirectory() as folder:
        escape, unescape = Path(folder, "escape.tsv"), Path(folder, "unescape.tsv")
        escape.write_text(_ESCAPE)
        unescape.write_text(_UNESCAPE)
        trained = io.BytesIO()
        try:
            spm.SentencePieceTrainer.train(
                sentence_iterator=lines(),
                model_writer=trained,
                model_type="bpe",
                vocab_size=n_vocab,
                split_digits=True,
                byte_fallback=True,
                normalization_rule_tsv=str(escape),
                denormalization_rule_tsv=str(unescape),
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                character_coverage=0.99995,
                max_sentence_length=1 << 16,
                input_sentence_size=2_000_000,
                shuffle_input_sentence=False,
                minloglevel=2,
            )
        except Exception as error:
            if failed:
                raise failed[0] from None
            raise InputError(
                f"the corpus is too small to train a tokenizer of {n_vocab} tokens: add text or"
                f" ask for fewer (SentencePiece: {str(error).strip().splitlines()[-1]})"
            ) from error
    model = ModelProto.FromString(trained.getvalue())
    # Without the names of temporary files, equal corpora give equal tokenizers.
    model.normalizer_spec.ClearField("normalization_rule_tsv")
    model.denormalizer_spec.ClearField("normalization_rule_tsv")
    Path(path).write_bytes(model.SerializeToString(deterministic=True))
