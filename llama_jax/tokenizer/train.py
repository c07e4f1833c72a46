"""Trains the tokenizer of a corpus, as LLaMA's was."""

import io
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece as spm
from sentencepiece.sentencepiece_model_pb2 import (
    ModelProto,  # pyright: ignore[reportAttributeAccessIssue] (made at import)
)

from llama_jax.errors import InputError

# SentencePiece writes a space as U+2581, so on decoding a real U+2581 would come back as a space.
# Escape it with a code point that Unicode reserves for internal use, and escape that with itself.
_ESCAPE = "2581\tFDD0 FDD2\nFDD0\tFDD0 FDD1\n"
_UNESCAPE = "FDD0 FDD2\t2581\nFDD0 FDD1\tFDD0\n"


MAX_LINE_BYTES = 1 << 16  # bytes; longer lines are left out


def train_tokenizer(texts: Iterable[str], path: str | Path, n_vocab: int) -> None:
    """Trains a tokenizer as LLaMA's was (arXiv 2302.13971, section 2.1) and writes it to `path`.

    Byte-pair encoding; numbers are split into digits, unknown characters into UTF-8 bytes, and
    nothing is normalised: decode(encode(text)) is text, for every text that UTF-8 can write.

    Args:
        texts: what to learn from; a line is a training sentence, if it is not too long.
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
                max_sentence_length=MAX_LINE_BYTES,
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
