"""The tokenizer of LLaMA and Llama 2: SentencePiece's tokenizer.model, or llama2.c's file."""

import hashlib
import struct
from collections.abc import Mapping, Sequence
from functools import cached_property

import sentencepiece as spm
from sentencepiece.sentencepiece_model_pb2 import (
    ModelProto,  # pyright: ignore[reportAttributeAccessIssue] (generated at import)
)

from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath
from llama_jax.tokenizer import chat
from llama_jax.tokenizer.build import BYTE, build_sentencepiece_model, infer_piece_types
from llama_jax.tokenizer.chat_template import ChatTemplate
from llama_jax.tokenizer.huggingface import TokenizerJson
from llama_jax.tokenizer.settings import check_ids, check_text, model_folder_files, read_settings
from llama_jax.tokenizer.special_text import encode_around_special
from llama_jax.tokenizer.split_points import ESCAPED, SafeSplit, never_split, safe_split_by_pairs

# SHA-256 of the charsmap of `train_tokenizer`, which replaces only U+2581 and U+FDD0.
_ESCAPING_CHARSMAP = "95a5358aa29b833dc99be672ba76631392d46f7db36301c145ab8b0f557cd39a"

# Score, length and text of the first piece.
_LLAMA2C_START = b"\x00\x00\x00\x00\x05\x00\x00\x00<unk>"


class SentencePiece(chat.ChatTokenizer):
    """A SentencePiece model with the settings of the files next to it.

    `end_ids` are the model's own end token and the end ids of generation_config.json. The chat
    format is the folder's chat template; without one, the format of Llama 2 Chat.

    Args:
        path: the file, for messages.
        data: its content.
        files: content of the files next to it, by name.
    """

    def __init__(self, path: AnyPath, data: bytes, files: Mapping[str, bytes] | None = None):
        files = files or {}
        self.path = path
        self._processor = _parse_model(path, data)
        self.n_vocab: int = self._processor.vocab_size()
        is_control = self._processor.is_control([*range(self.n_vocab)])
        control = [i for i in range(self.n_vocab) if is_control[i]]
        self.special: dict[str, int] = {self._processor.id_to_piece(i): i for i in control}
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self._settings = read_settings(files, path.parent)
        self.end_ids = frozenset({self.eos_id}) | self._settings.end_ids
        self.add_bos = self._settings.add_bos is not False
        self.template = self._settings.template
        self.files = model_folder_files("tokenizer.model", data, files, self._settings)
        # In later Mistral models [INST] is a control token: their chat format is not Llama 2's.
        inst = self._processor.piece_to_id("[INST]")
        self.has_llama2_chats = not self._processor.is_control(inst)
        self._json = files.get("tokenizer.json")

    def encode(
        self, text: str, *, bos: bool = False, eos: bool = False, continued: bool = False
    ) -> list[int]:
        """Returns the ids of `text`, on request between <s> and </s>.

        Raises:
            InputError: the text contains half of a surrogate pair, which UTF-8 can't encode.
        """
        check_text(text)
        processor = self._without_space_prefix if continued else self._processor
        return [self.bos_id] * bos + processor.encode(text) + [self.eos_id] * eos

    def safe_split(self, text: str) -> int:
        """Returns after how many characters a long text can be split; 0: nowhere."""
        return self._find_safe_split(text)

    @cached_property
    def _find_safe_split(self) -> SafeSplit:
        model = ModelProto.FromString(self.files["tokenizer.model"])
        spec, trainer = model.normalizer_spec, model.trainer_spec
        charsmap = spec.precompiled_charsmap
        if (
            trainer.model_type != trainer.BPE
            or not trainer.byte_fallback  # without it, adjacent unknown characters are one token
            or trainer.treat_whitespace_as_suffix
            or not spec.escape_whitespaces
            or (charsmap and hashlib.sha256(charsmap).hexdigest() != _ESCAPING_CHARSMAP)
        ):
            return never_split
        # Spaces next to a split would be removed, as at the ends of a text.
        altered = ESCAPED + " " if spec.remove_extra_whitespaces else ESCAPED
        return safe_split_by_pairs((p.piece for p in model.pieces if p.type != BYTE), altered)

    @cached_property
    def _without_space_prefix(self) -> spm.SentencePieceProcessor:
        model = ModelProto.FromString(self.files["tokenizer.model"])
        model.normalizer_spec.add_dummy_prefix = False
        return _parse_model(self.path, model.SerializeToString())

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        return self._processor.decode(check_ids(ids, self.n_vocab, self.path))

    def token_bytes(self) -> list[bytes | None]:
        """Returns the bytes that each token adds to a text; None for tokens without text."""
        return [self._piece_bytes(i) for i in range(self.n_vocab)]

    def _piece_bytes(self, token: int) -> bytes | None:
        p, piece = self._processor, self._processor.id_to_piece(token)
        if p.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # <0x0A>
        if p.is_control(token) or p.is_unknown(token) or p.is_unused(token):
            return None
        if any(escaping in piece for escaping in ESCAPED[1:]):
            return None
        return piece.replace(ESCAPED[0], " ").encode()

    def parse(self, text: str) -> list[int]:
        """Returns the ids of `text`; the text of a control token is encoded as that token.

        If there is a tokenizer.json next to the model, it encodes the text: chat templates are
        written for it. Without one, each part between control tokens is encoded as a separate text.

        Raises:
            InputError: the text contains half of a surrogate pair, which UTF-8 can't encode.
        """
        check_text(text)
        if self._parser is not None:
            return check_ids(self._parser.parse(text), self.n_vocab, self.path)
        return encode_around_special(self._processor.encode, self.special, text)

    @cached_property
    def _chat_format(self) -> chat.ChatFormat:
        if self.template is not None:
            return self._template_of(self.template)
        if self.has_llama2_chats:
            return chat.Llama2Chats(self.encode, self._template_of(chat.LLAMA2_TEMPLATE))
        raise InputError(
            f"{self.path} has control tokens for chats, but the folder doesn't define their use:"
            " put the model's tokenizer_config.json next to it"
        )

    def _template_of(self, source: str) -> ChatTemplate:
        p, parser = self._processor, self._parser
        tokens = {"bos_token": p.id_to_piece(self.bos_id), "eos_token": p.id_to_piece(self.eos_id)}

        def encode(text: str) -> list[int]:
            return check_ids((parser or self).encode(text), self.n_vocab, self.path)

        return ChatTemplate(
            source,
            tokens | dict(self._settings.tokens),
            special=(parser or self).special,
            end_ids=self.end_ids,
            encode=encode,
            parse=self.parse,
        )

    @cached_property
    def _parser(self) -> TokenizerJson | None:
        if self._json is None:
            return None
        return TokenizerJson(self.path.with_name("tokenizer.json"), self._json, self.files)


def _parse_model(path: AnyPath, data: bytes) -> spm.SentencePieceProcessor:
    try:
        processor = spm.SentencePieceProcessor(model_proto=data)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{path} is not a SentencePiece model, not in tiktoken's format, or truncated: give a"
            " tokenizer.model"
        ) from error
    if min(processor.bos_id(), processor.eos_id()) < 0:
        raise InputError(
            f"{path} has no begin or no end token: give the tokenizer.model of a LLaMA model"
        )
    return processor


def is_llama2c(data: bytes) -> bool:
    """Returns whether a file starts like llama2.c's tokenizer.bin."""
    return data[4 : 4 + len(_LLAMA2C_START)] == _LLAMA2C_START


def from_llama2c(data: bytes, path: AnyPath) -> bytes:
    """Returns the SentencePiece model in llama2.c's tokenizer.bin.

    The file contains the length of the longest piece, and for each piece its score, its length and
    its UTF-8 text. The text has spaces instead of U+2581; control tokens are between line breaks.
    The file doesn't state whether extra spaces are removed: this tokenizer preserves them, as
    llama2.c's run.c does.

    Raises:
        InputError: the file is truncated or damaged.
    """
    pieces: list[str] = []
    scores: list[float] = []
    position = 4
    try:
        while position < len(data):
            score, length = struct.unpack_from("<fi", data, position)
            position += 8 + length
            if length < 0 or position > len(data):
                raise ValueError("a piece ends outside the file")
            pieces.append(data[position - length : position].decode().replace(" ", "▁"))
            scores.append(score)
    except (struct.error, ValueError) as error:
        raise InputError(
            f"{path} is not a tokenizer.bin of llama2.c, or is truncated ({error}): fetch it again"
        ) from error
    pieces[1:3] = [piece.strip("\n") for piece in pieces[1:3]]
    types = infer_piece_types(pieces, control=range(1, min(3, len(pieces))))
    return build_sentencepiece_model(pieces, scores, types, path)
