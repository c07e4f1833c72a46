"""Trains a tokenizer on a corpus, with LLaMA's settings."""

import io
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece as spm
from sentencepiece.sentencepiece_model_pb2 import (
    ModelProto,  # pyright: ignore[reportAttributeAccessIssue] (generated at import)
)

from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath, parse_path, write_file

# SentencePiece writes a space as U+2581, so a U+2581 in the text would decode to a space. These
# rules escape it with U+FDD0, which Unicode reserves for internal use, and U+FDD0 with itself.
_ESCAPE = "2581\tFDD0 FDD2\nFDD0\tFDD0 FDD1\n"
_UNESCAPE = "FDD0 FDD2\t2581\nFDD0 FDD1\tFDD0\n"

MAX_LINE_BYTES = 1 << 16  # longer lines are not used


def train_tokenizer(texts: Iterable[str], path: str | AnyPath, n_vocab: int) -> None:
    """Trains a tokenizer with LLaMA's settings (arXiv 2302.13971, section 2.1), and saves it.

    The tokenizer uses byte-pair encoding and splits numbers into digits and unknown characters into
    UTF-8 bytes. It doesn't normalize: decode(encode(text)) == text for every text that UTF-8 can
    encode.

    Args:
        texts: the corpus; each line of at most MAX_LINE_BYTES is a training sentence.
        path: the `tokenizer.model` to write.
        n_vocab: number of tokens, including 3 control tokens and 256 bytes.

    Raises:
        InputError: the texts are empty, or too short for `n_vocab` tokens.
    """
    errors: list[BaseException] = []

    def lines() -> Iterator[str]:
        try:
            for text in texts:
                yield from (line for line in text.split("\n") if line)
        except BaseException as error:  # SentencePiece would discard it
            errors.append(error)
            raise

    with tempfile.TemporaryDirectory() as folder:
        escape, unescape = Path(folder, "escape.tsv"), Path(folder, "unescape.tsv")
        escape.write_text(_ESCAPE)
        unescape.write_text(_UNESCAPE)
        serialized = io.BytesIO()
        try:
            spm.SentencePieceTrainer.train(
                sentence_iterator=lines(),
                model_writer=serialized,
                model_type="bpe",
                vocab_size=n_vocab,
                split_digits=True,
                byte_fallback=True,
                normalization_rule_tsv=str(escape),
                denormalization_rule_tsv=str(unescape),
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                character_coverage=0.99995,
                max_sentence_length=MAX_LINE_BYTES,
                input_sentence_size=2_000_000,
                shuffle_input_sentence=False,
                minloglevel=2,
            )
        except Exception as error:
            if errors:
                raise errors[0] from None
            raise InputError(
                f"the corpus is too small to train a tokenizer of {n_vocab} tokens: add text or"
                f" choose fewer tokens (SentencePiece: {str(error).strip().splitlines()[-1]})"
            ) from error
    model = ModelProto.FromString(serialized.getvalue())
    # The names of temporary files would make the tokenizers of equal corpora differ.
    model.normalizer_spec.ClearField("normalization_rule_tsv")
    model.denormalizer_spec.ClearField("normalization_rule_tsv")
    write_file(parse_path(path), model.SerializeToString(deterministic=True))
