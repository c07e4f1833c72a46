"""The tokenizer of LLaMA and Llama 2: SentencePiece's tokenizer.model, or llama2.c's."""

import hashlib
import re
import struct
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import sentencepiece as spm
from sentencepiece.sentencepiece_model_pb2 import (
    ModelProto,  # pyright: ignore[reportAttributeAccessIssue] (made at import)
)

from llama_jax.errors import InputError
from llama_jax.tokenizer import chat
from llama_jax.tokenizer.build import BYTE, build_sentencepiece_model, infer_piece_types
from llama_jax.tokenizer.huggingface import TokenizerJson
from llama_jax.tokenizer.settings import check_ids, check_text, folder_files, read_settings
from llama_jax.tokenizer.split_points import ESCAPED, SafeSplit, never_split, safe_split_by_pairs

# SHA-256 of the charsmap that `train_tokenizer` makes: it replaces U+2581 and U+FDD0 alone.
_ESCAPES = "95a5358aa29b833dc99be672ba76631392d46f7db36301c145ab8b0f557cd39a"

_LLAMA2C_START = b"\x00\x00\x00\x00\x05\x00\x00\x00<unk>"  # score, length and text of the first


class SentencePiece:
    """A SentencePiece model and what the JSON files beside it say.

    `end_ids` are the model's own end token and those of generation_config.json. Chats have the
    form of the folder's chat template, or else that of Llama 2 Chat.

    Args:
        path: the file, for messages.
        data: what is in it.
        files: those beside it, by name.
    """

    def __init__(self, path: Path, data: bytes, files: Mapping[str, bytes] | None = None):
        files = files or {}
        self.path = path
        self._processor = _processor(path, data)
        self.n_vocab: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self._settings = read_settings(files, path.parent)
        self.end_ids = frozenset({self.eos_id}) | self._settings.end_ids
        self.add_bos = self._settings.add_bos is not False
        self.template = self._settings.template
        self.files = folder_files("tokenizer.model", data, files, self._settings)
        inst = self._processor.piece_to_id("[INST]")
        self.chats_as_llama2 = not self._processor.is_control(inst)  # as in Mistral's later ones
        self._json = files.get("tokenizer.json")

    def encode(
        self, text: str, *, bos: bool = False, eos: bool = False, continued: bool = False
    ) -> list[int]:
        """Returns the ids of `text`, between <s> and </s> where asked for.

        Raises:
            InputError: the text holds half of a surrogate pair, which UTF-8 can't write.
        """
        check_text(text)
        processor = self._without_prefix if continued else self._processor
        return [self.bos_id] * bos + processor.encode(text) + [self.eos_id] * eos

    def safe_split(self, text: str) -> int:
        """Returns after how many characters a long text may be cut; 0: nowhere."""
        return self._safe_split(text)

    @cached_property
    def _safe_split(self) -> SafeSplit:
        model = ModelProto.FromString(self.files["tokenizer.model"])
        spec, trainer = model.normalizer_spec, model.trainer_spec
        charsmap = spec.precompiled_charsmap
        if (
            trainer.model_type != trainer.BPE
            or not trainer.byte_fallback  # else unknown characters that follow each other are one
            or trainer.treat_whitespace_as_suffix
            or not spec.escape_whitespaces
            or (charsmap and hashlib.sha256(charsmap).hexdigest() != _ESCAPES)
        ):
            return never_split
        # Spaces beside a cut would be removed as those at the ends of a text.
        changed = ESCAPED + " " if spec.remove_extra_whitespaces else ESCAPED
        return safe_split_by_pairs((p.piece for p in model.pieces if p.type != BYTE), changed)

    @cached_property
    def _without_prefix(self) -> spm.SentencePieceProcessor:
        model = ModelProto.FromString(self.files["tokenizer.model"])
        model.normalizer_spec.add_dummy_prefix = False
        return _processor(self.path, model.SerializeToString())

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        return self._processor.decode(check_ids(ids, self.n_vocab, self.path))

    def parse(self, text: str) -> list[int]:
        """Returns the ids of `text`; the text of a control token gives that token.

        The tokenizer.json beside it reads the text, for which chat templates are written; where
        there is none, each stretch between control tokens is a text of its own.

        Raises:
            InputError: the text holds half of a surrogate pair, which UTF-8 can't write.
        """
        check_text(text)
        if self._parser is not None:
            return check_ids(self._parser.parse(text), self.n_vocab, self.path)
        control = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True)))
        ids = []
        for i, part in enumerate(re.split(f"({control})", text)):
            ids += [self.special[part]] if i % 2 else self._processor.encode(part)
        return ids

    def encode_chat(self, messages: Sequence[chat.Message]) -> list[int]:
        """Returns the ids of a chat, up to where the model is to answer.

        Raises:
            InputError: the messages are not a chat that the format knows.
        """
        if self.template is None and not self.chats_as_llama2:
            raise InputError(
                f"{self.path} has control tokens for chats, but the folder doesn't say how they are"
                " used: lay the model's tokenizer_config.json beside it"
            )
        if self.template is None:
            turns = chat.llama2_turns(messages)
            return [i for text, done in turns for i in self.encode(text, bos=True, eos=done)]
        p = self._processor
        tokens = {"bos_token": p.id_to_piece(self.bos_id), "eos_token": p.id_to_piece(self.eos_id)}
        tokens |= self._settings.tokens
        reader = self._parser or self
        ids = chat.template_ids(
            self.template, messages, tokens,
            special=reader.special, encode=reader.encode, parse=reader.parse,
        )  # fmt: skip
        return check_ids(ids, self.n_vocab, self.path)

    @cached_property
    def _parser(self) -> TokenizerJson | None:
        if self._json is None:
            return None
        return TokenizerJson(self.path.with_name("tokenizer.json"), self._json, self.files)

    @cached_property
    def special(self) -> dict[str, int]:
        """The control tokens."""
        p = self._processor
        return {p.id_to_piece(i): i for i in range(self.n_vocab) if p.is_control(i)}


def _processor(path: Path, data: bytes) -> spm.SentencePieceProcessor:
    try:
        processor = spm.SentencePieceProcessor(model_proto=data)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{path} is not a SentencePiece model, nor in tiktoken's format, or is cut short: give"
            " a tokenizer.model"
        ) from error
    if min(processor.bos_id(), processor.eos_id()) < 0:
        raise InputError(
            f"{path} has no begin or no end token: give the tokenizer.model of a LLaMA model"
        )
    return processor


def is_llama2c(data: bytes) -> bool:
    """Tells whether a file begins as llama2.c's tokenizer.bin does."""
    return data[4 : 4 + len(_LLAMA2C_START)] == _LLAMA2C_START


def from_llama2c(data: bytes, path: Path) -> bytes:
    """Returns the SentencePiece model in llama2.c's tokenizer.bin.

    The file holds the length of the longest piece, then of each piece its score, its length and
    its UTF-8 text; spaces stand for U+2581, and the control tokens between line breaks. It doesn't
    say whether extra spaces are removed: they are kept, as llama2.c's run.c does.

    Raises:
        InputError: the file is cut short or damaged.
    """
    pieces: list[str] = []
    scores: list[float] = []
    at = 4
    try:
        while at < len(data):
            score, length = struct.unpack_from("<fi", data, at)
            at += 8 + length
            if length < 0 or at > len(data):
                raise ValueError("a piece that ends outside the file")
            pieces.append(data[at - length : at].decode().replace(" ", "▁"))
            scores.append(score)
    except (struct.error, ValueError) as error:
        raise InputError(
            f"{path} is not a tokenizer.bin of llama2.c, or is cut short ({error}): fetch it again"
        ) from error
    pieces[1:3] = [piece.strip("\n") for piece in pieces[1:3]]
    types = infer_piece_types(pieces, control=range(1, min(3, len(pieces))))
    return build_sentencepiece_model(pieces, scores, types, path)
