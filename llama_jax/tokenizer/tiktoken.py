"""The tokenizer of Llama 3: byte pairs in tiktoken's format."""

import base64
import binascii
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import tiktoken

from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath
from llama_jax.tokenizer import chat
from llama_jax.tokenizer.build import LLAMA3_PATTERN
from llama_jax.tokenizer.chat_template import ChatTemplate
from llama_jax.tokenizer.llama3_chat import Llama3Chats
from llama_jax.tokenizer.settings import check_ids, check_text, model_folder_files, read_settings

# The special tokens follow the ranks, in this order (Meta's llama-models, llama3/tokenizer.py).
_NAMED = (
    "begin_of_text",
    "end_of_text",
    "reserved_special_token_0",
    "reserved_special_token_1",
    "finetune_right_pad_id",
    "step_id",
    "start_header_id",
    "end_header_id",
    "eom_id",
    "eot_id",
    "python_tag",
    "image",
)
_RESERVED = (f"reserved_special_token_{i}" for i in range(2, 2 + 256 - len(_NAMED)))
SPECIAL_TOKENS = tuple(f"<|{name}|>" for name in (*_NAMED, *_RESERVED))
END_TOKENS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")

# Meta's tokenizer splits a text into parts of this many characters, and then splits a run of
# white space, or of other characters, that is longer than _MAX_RUN.
_MAX_PART = 400_000
_MAX_RUN = 25_000
_RUN = re.compile(r"\s+|\S+")
_LONG_RUN = re.compile(rf"(?<!\s)\s{{{_MAX_RUN + 1},}}|(?<!\S)\S{{{_MAX_RUN + 1},}}")


class Tiktoken(chat.ChatTokenizer):
    """Llama 3's tokenizer.model with the settings of the files next to it.

    `end_ids` are <|end_of_text|>, <|eom_id|>, <|eot_id|> and the end ids of generation_config.json.
    The chat format is the folder's chat template; without one, the format of Llama 3 Instruct.

    Args:
        path: the file, for messages.
        data: its content.
        files: content of the files next to it, by name.
    """

    def __init__(self, path: AnyPath, data: bytes, files: Mapping[str, bytes] | None = None):
        files = files or {}
        self.path = path
        self.ranks = read_ranks(data, path)
        self.special = {name: len(self.ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            path.name,
            pat_str=LLAMA3_PATTERN,
            mergeable_ranks=self.ranks,
            special_tokens=self.special,
        )
        self.n_vocab = len(self.ranks) + len(self.special)
        self.bos_id = self.special["<|begin_of_text|>"]
        self.eos_id = self.special["<|end_of_text|>"]
        self._settings = read_settings(files, path.parent)
        self.end_ids = frozenset(map(self.special.__getitem__, END_TOKENS)) | self._settings.end_ids
        self.add_bos = self._settings.add_bos is not False
        self.template = self._settings.template
        self.files = model_folder_files("tokenizer.model", data, files, self._settings)

    def encode(
        self, text: str, *, bos: bool = False, eos: bool = False, continued: bool = False
    ) -> list[int]:
        """Returns the ids of `text`, on request between the begin and the end token.

        Raises:
            InputError: the text contains half of a surrogate pair, which UTF-8 can't encode.
        """
        check_text(text)
        parts = map(self._encoding.encode_ordinary, split_long(text))
        ids = list(itertools.chain.from_iterable(parts))
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def safe_split(self, text: str) -> int:
        """Returns after how many characters Meta's tokenizer splits the text itself; 0: nowhere."""
        return (len(text) - 1) // _MAX_PART * _MAX_PART

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; special tokens decode to no text.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        ids = check_ids(ids, self.n_vocab, self.path)
        text = self._encoding.decode_bytes([i for i in ids if i < len(self.ranks)])
        return text.decode(errors="replace")

    def token_bytes(self) -> list[bytes | None]:
        """Returns the bytes that each token adds to a text; None for tokens without text."""
        pieces = {rank: piece for piece, rank in self.ranks.items()}
        return [pieces.get(i) for i in range(self.n_vocab)]

    def parse(self, text: str) -> list[int]:
        """Returns the ids of `text`; the text of a special token is encoded as that token.

        Raises:
            InputError: the text contains half of a surrogate pair, which UTF-8 can't encode.
        """
        check_text(text)
        encode = self._encoding.encode
        return [i for part in split_long(text) for i in encode(part, allowed_special="all")]

    @cached_property
    def _chat_format(self) -> chat.ChatFormat:
        if self.template is not None:
            return self._template_of(self.template)
        template = self._template_of(chat.LLAMA3_TEMPLATE)
        return Llama3Chats(self.encode, self.special, template)

    def _template_of(self, source: str) -> ChatTemplate:
        tokens = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
        return ChatTemplate(
            source,
            tokens | dict(self._settings.tokens),
            special=self.special,
            end_ids=self.end_ids,
            encode=self.encode,
            parse=self.parse,
        )


def split_long(text: str) -> Iterator[str]:
    """Yields the parts into which Meta's tokenizer splits a text; it encodes each separately."""
    for start in range(0, len(text), _MAX_PART):
        part = text[start : start + _MAX_PART]
        position = 0
        for run in _LONG_RUN.finditer(part) if _has_long_run(part) else ():
            for end in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
                yield part[position:end]
                position = end
        yield part[position:]


def _has_long_run(text: str) -> bool:
    """Returns False only if no run is too long; reads a few characters of a usual text.

    A run that is too long covers one of the blocks of _MAX_RUN // 2 characters completely.
    """
    block = _MAX_RUN // 2
    for start in range(0, len(text) - block + 1, block):
        run = _RUN.match(text, start, start + block)
        if run and run.end() == start + block:
            return True
    return False


def is_tiktoken(data: bytes) -> bool:
    """Returns whether a file starts like a file in tiktoken's format."""
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?(\n|$)", data) is not None


def read_ranks(data: bytes, path: AnyPath) -> dict[bytes, int]:
    """Returns the ranks of the pieces in a file of tiktoken's format; the lowest rank is 0.

    Raises:
        InputError: a line is not a base64 piece and a rank, a piece occurs twice, or a rank or a
            single byte is missing.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            encoded, rank = line.split()
            piece = base64.b64decode(encoded, validate=True)
            if not piece or ranks.setdefault(piece, int(rank)) != int(rank):
                raise ValueError("the piece is empty or occurs twice")
        except (ValueError, binascii.Error) as error:
            raise InputError(
                f"{path}:{number}: not a new piece in base64 and its rank: the tokenizer is"
                " damaged or truncated: fetch it again"
            ) from error
    missing = set(range(len(ranks))).difference(ranks.values())
    if missing:
        raise InputError(
            f"{path}: no piece has the rank {min(missing)}: the file is damaged, fetch it again"
        )
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise InputError(
            f"{path}: a single byte is missing: the tokenizer is truncated or damaged: fetch it"
            " again"
        )
    return ranks
