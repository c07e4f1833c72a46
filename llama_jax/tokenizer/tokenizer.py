"""Text to token ids and back, behind one interface for every tokenizer of the family."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from llama_jax.errors import InputError
from llama_jax.runtime.regular_file import open_regular, read_regular
from llama_jax.tokenizer.chat import Message
from llama_jax.tokenizer.gguf import gguf_tokenizer_files, is_gguf
from llama_jax.tokenizer.huggingface import TokenizerJson
from llama_jax.tokenizer.sentencepiece import SentencePiece, from_llama2c, is_llama2c
from llama_jax.tokenizer.settings import side_files
from llama_jax.tokenizer.tiktoken import Tiktoken, is_tiktoken

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer.bin")


class Tokenizer(Protocol):
    """What the rest of the program asks of a tokenizer.

    >>> ids = tokenizer.encode("Once upon a time", bos=True)
    >>> ids[0] == tokenizer.bos_id
    True
    >>> tokenizer.decode(ids)
    'Once upon a time'
    """

    path: Path
    n_vocab: int
    bos_id: int
    eos_id: int  # what encode(…, eos=True) puts at the end
    end_ids: frozenset[int]  # any of these ends a text
    template: str | None  # of chats, in Jinja; None where the format is Llama's own, or none
    add_bos: bool  # whether the model's prompts begin with bos_id
    files: dict[str, bytes]  # what a model folder holds so that load_tokenizer gives this again

    def encode(
        self, text: str, *, bos: bool = False, eos: bool = False, continued: bool = False
    ) -> list[int]:
        """Returns the ids of `text`, between the begin and the end token where asked for.

        The text of a special token is a text like any other. A `continued` text is the part of a
        longer one that follows an exact cut: it gets no space in front.
        """
        ...

    def safe_split(self, text: str) -> int:
        """Returns after how many characters the beginning of a long text may be cut; 0: nowhere.

        >>> cut = tokenizer.safe_split(text)
        >>> ids = tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:], continued=True)
        >>> ids == tokenizer.encode(text)
        True
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; control tokens have none.

        Bytes that are not (yet) a character of UTF-8 come as U+FFFD.
        """
        ...

    def parse(self, text: str) -> list[int]:
        """Returns the ids of `text`; the text of a special token gives that token."""
        ...

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids of a chat, from the begin token up to where the model is to answer.

        Raises:
            InputError: the messages are not a chat that the model's format knows, or there is no
                format.
        """
        ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Returns the tokenizer in a file, or in a model folder; its content tells the kind.

    >>> tokenizer = lj.load_tokenizer("models/tiny")
    >>> tokenizer.n_vocab
    320

    Kinds: SentencePiece's `tokenizer.model` (LLaMA, Llama 2), tiktoken's `tokenizer.model`
    (Llama 3), `tokenizer.json`, llama2.c's `tokenizer.bin`, and any `.gguf` file. A folder's first
    of these in that order is taken. The JSON files beside it (tokenizer_config.json,
    generation_config.json, …) add end ids and the chat template.

    Raises:
        InputError: there is none, or it can't be read.
    """
    path = Path(path)
    if path.is_dir():
        named = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
        path = next(iter([*named, *sorted(path.glob("*.gguf"))]), path / TOKENIZER_FILES[0])
    if not path.is_file():
        raise InputError(
            f"there is no tokenizer at {path}: name a tokenizer.model, a tokenizer.json, or the"
            " folder that holds one"
        )
    with open_regular(path) as file:
        if is_gguf(file.read(4)):
            return _of_files(path, gguf_tokenizer_files(path))
    data = read_regular(path)
    files = side_files(path.parent)
    if is_llama2c(data):
        return SentencePiece(path, from_llama2c(data, path), files)
    if data.lstrip()[:1] == b"{":
        return _of_files(path, files | {"tokenizer.json": data})
    beside = path.with_name("tokenizer.json")
    if not is_tiktoken(data) and beside.is_file():
        files["tokenizer.json"] = read_regular(beside)  # reads what a chat template makes
    return _of_files(path, files | {"tokenizer.model": data})


def _of_files(path: Path, files: Mapping[str, bytes]) -> Tokenizer:
    if "tokenizer.model" not in files:
        return TokenizerJson(path, files["tokenizer.json"], files)
    data = files["tokenizer.model"]
    return (Tiktoken if is_tiktoken(data) else SentencePiece)(path, data, files)


def file_hash(path: str | Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
