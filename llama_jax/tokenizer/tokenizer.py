"""Loads any tokenizer of the LLaMA family; all have the interface `Tokenizer`."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath, open_file, parse_path, read_file
from llama_jax.tokenizer.chat import EncodedChat, Message
from llama_jax.tokenizer.gguf import gguf_tokenizer_files, is_gguf
from llama_jax.tokenizer.huggingface import TokenizerJson
from llama_jax.tokenizer.sentencepiece import SentencePiece, from_llama2c, is_llama2c
from llama_jax.tokenizer.settings import read_config_files
from llama_jax.tokenizer.tiktoken import Tiktoken, is_tiktoken
from llama_jax.tokenizer.tool_format import ToolFormat

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer.bin")


class Tokenizer(Protocol):
    """The interface of all tokenizers.

    >>> ids = tokenizer.encode("Once upon a time", bos=True)
    >>> ids[0] == tokenizer.bos_id
    True
    >>> tokenizer.decode(ids)
    'Once upon a time'
    """

    path: AnyPath
    n_vocab: int
    bos_id: int
    eos_id: int  # encode(…, eos=True) appends it
    end_ids: frozenset[int]  # each of these ends a text
    template: str | None  # for chats, in Jinja; None: the format is Llama's own, or there is none
    add_bos: bool  # whether the model's prompts start with bos_id
    files: dict[str, bytes]  # from which load_tokenizer loads this tokenizer again, by name

    @property
    def special(self) -> Mapping[str, int]:
        """The ids of the special tokens, which `decode` omits, by their text."""
        ...

    def encode(
        self, text: str, *, bos: bool = False, eos: bool = False, continued: bool = False
    ) -> list[int]:
        """Returns the ids of `text`, on request between the begin and the end token.

        The text of a special token is encoded as ordinary text. A `continued` text is the rest of a
        longer text after a safe split: the tokenizer puts no space before it.
        """
        ...

    def safe_split(self, text: str) -> int:
        """Returns after how many characters a long text can be split; 0: nowhere.

        The two parts have the ids of the text, whatever follows the text:

        >>> end = tokenizer.safe_split(text)
        >>> ids = tokenizer.encode(text[:end]) + tokenizer.encode(text[end:], continued=True)
        >>> ids == tokenizer.encode(text)
        True
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; control tokens decode to no text.

        Bytes that are not (yet) a complete UTF-8 character decode to U+FFFD.
        """
        ...

    def token_bytes(self) -> Sequence[bytes | None]:
        """Returns the bytes that each token adds to a text; None for tokens without text.

        Raises:
            InputError: the bytes of this tokenizer are unknown.
        """
        ...

    def tool_format(self) -> ToolFormat:
        """Returns how the model writes its calls of tools.

        Raises:
            InputError: the chat format has no place for tools, or doesn't write calls in JSON.
        """
        ...

    def parse(self, text: str) -> list[int]:
        """Returns the ids of `text`; the text of a special token is encoded as that token."""
        ...

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Returns the ids of a chat, from the begin token up to the position of the model's answer.

        Args:
            messages: the last one is of the user or of a tool.
            tools: that the model may call, in OpenAI's form.

        Raises:
            InputError: the messages don't match the model's chat format, it has no chat format, or
                no place for the tools.
        """
        ...

    def render_chat(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
        """Returns the text of a chat in the model's format, for `parse`.

        Without the generation prompt, the text ends with the last message, to continue it.

        Raises:
            InputError: the messages don't match the chat format, or there is no chat format.
        """
        ...

    def encode_example(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> EncodedChat:
        """Returns the ids of a chat to learn from, and the ranges of the assistant's answers.

        Before each answer, the ids are those that `encode_chat` returns for the same messages.

        Args:
            messages: the last message is the assistant's.
            tools: that the assistant can call, as a chat template lists them.

        Raises:
            InputError: as `encode_chat`; or the format doesn't define where an answer starts and
                ends, or has no place for the tools.
        """
        ...


def load_tokenizer(path: str | AnyPath) -> Tokenizer:
    """Loads the tokenizer of a file or of a model folder; the content decides the kind.

    >>> tokenizer = lj.load_tokenizer("models/tiny")
    >>> tokenizer.n_vocab
    320

    Kinds: SentencePiece's `tokenizer.model` (LLaMA, Llama 2), tiktoken's `tokenizer.model`
    (Llama 3), `tokenizer.json`, llama2.c's `tokenizer.bin`, and any `.gguf` file. In a folder, the
    first of these, in this order, is loaded. The JSON files next to it (tokenizer_config.json,
    generation_config.json, …) add end ids and the chat template.

    Raises:
        InputError: there is no tokenizer, or it can't be loaded.
    """
    path = parse_path(path)
    # By name first: in a bucket, is_dir and glob list all objects of a folder, a run's checkpoints
    # too.
    if named := [path / name for name in TOKENIZER_FILES if (path / name).is_file()]:
        path = named[0]
    elif path.is_dir():
        gguf_files = sorted(path.glob("*.gguf"))
        if not gguf_files:
            raise InputError(
                f"there is no tokenizer in {path}: copy the model's tokenizer.model or"
                " tokenizer.json into it"
            )
        path = gguf_files[0]
    if not path.is_file():
        raise InputError(
            f"there is no tokenizer at {path}: name a tokenizer.model, a tokenizer.json, or the"
            " folder that contains one"
        )
    with open_file(path) as file:
        if is_gguf(file.read(4)):
            return tokenizer_from_files(path, gguf_tokenizer_files(path))
    data = read_file(path)
    files = read_config_files(path.parent)
    if is_llama2c(data):
        return SentencePiece(path, from_llama2c(data, path), files)
    if data.lstrip()[:1] == b"{":
        return tokenizer_from_files(path, files | {"tokenizer.json": data})
    tokenizer_json = path.with_name("tokenizer.json")
    if not is_tiktoken(data) and tokenizer_json.is_file():
        files["tokenizer.json"] = read_file(tokenizer_json)  # encodes rendered chat templates
    return tokenizer_from_files(path, files | {"tokenizer.model": data})


def tokenizer_from_files(path: AnyPath, files: Mapping[str, bytes]) -> Tokenizer:
    """Returns the tokenizer of these files, by name, which come from `path` or its folder."""
    if "tokenizer.model" not in files:
        return TokenizerJson(path, files["tokenizer.json"], files)
    data = files["tokenizer.model"]
    return (Tiktoken if is_tiktoken(data) else SentencePiece)(path, data, files)


def file_hash(path: str | AnyPath) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(read_file(parse_path(path))).hexdigest()
