"""Hugging Face's tokenizer.json."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from llama_jax.errors import InputError
from llama_jax.tokenizer import chat
from llama_jax.tokenizer.settings import check_ids, check_text, folder_files, read_settings
from llama_jax.tokenizer.split_points import SafeSplit, remove_space_prefix, safe_split_of_json
from llama_jax.tokenizer.tiktoken import END_TOKENS

# Of a folder that doesn't name its begin and end tokens.
_BEGIN = ("<|begin_of_text|>", "<s>", "<|endoftext|>")
_END = ("<|end_of_text|>", "</s>", "<|endoftext|>")
# What a vocabulary of Llama 3 has.
_LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


class TokenizerJson:
    """A tokenizer.json and what the JSON files beside it say.

    `end_ids` are the end ids of generation_config.json (of config.json where that has none), the
    end token that the tokenizer names, and, in a vocabulary of Llama 3, <|end_of_text|>,
    <|eom_id|> and <|eot_id|>, as with Meta's own file: a base model never says the last two.
    Chats have the form of the folder's chat template, or of Llama 3 in its vocabulary; other
    models without a template have no chat format.

    Args:
        path: the file, for messages.
        data: what is in it.
        files: those beside it, by name.
    """

    def __init__(self, path: Path, data: bytes, files: Mapping[str, bytes] | None = None):
        files = files or {}
        self.path = path
        self._data = data
        self._tokenizer = _read(path, data)
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.n_vocab = max(ids.values(), default=-1) + 1
        if not len(ids) == len(set(ids.values())) == self.n_vocab:
            raise InputError(
                f"{path} is damaged: among its ids up to {self.n_vocab - 1} one is missing, or"
                " stands twice: fetch it again"
            )
        added = self._tokenizer.get_added_tokens_decoder().items()
        self.special = {token.content: i for i, token in added if token.special}
        self._settings = read_settings(files, path.parent)
        begun = self._tokenizer.encode("").ids[:1]
        begin = self._named("bos_token", _BEGIN, [*begun, *self._settings.bos_ids])
        end = self._named("eos_token", _END, sorted(self._settings.end_ids))
        if end is None:
            raise InputError(f"{path} names no end token: lay its tokenizer_config.json beside it")
        self.eos_id = end
        # Where no begin token is known, the end token stands between texts.
        self.bos_id = end if begin is None else begin
        ends = {end} | self._settings.end_ids
        self._llama3 = {token: ids[token] for token in _LLAMA3 if token in ids}
        if len(self._llama3) == len(_LLAMA3):
            ends |= {ids[token] for token in END_TOKENS if token in ids}
        self.end_ids = frozenset(ends)
        says = self._settings.add_bos
        self.add_bos = begun == [self.bos_id] if says is None else says
        self.template = self._settings.template
        self.files = folder_files("tokenizer.json", data, files, self._settings)

    def _named(self, name: str, usual: Sequence[str], given: Sequence[int]) -> int | None:
        """Returns the id of the token that the settings name, else one of `given` or `usual`."""
        find = self._tokenizer.token_to_id
        token = self._settings.tokens.get(name)
        if token is not None and find(token) is None:
            raise InputError(
                f"{self.path} has no {token!r}, which tokenizer_config.json beside it names as"
                f" {name}: they don't belong together"
            )
        ids = [find(token)] if token is not None else [*given, *map(find, usual)]
        return next((i for i in ids if i is not None), None)

    def encode(
        self, text: str, *, bos: bool = False, eos: bool = False, continued: bool = False
    ) -> list[int]:
        """Returns the ids of `text`, between the begin and the end token where asked for.

        Raises:
            InputError: the text holds half of a surrogate pair, which UTF-8 can't write.
        """
        check_text(text)
        tokenizer = self._without_prefix if continued else self._tokenizer
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def safe_split(self, text: str) -> int:
        """Returns after how many characters a long text may be cut; 0: nowhere."""
        return self._safe_split(text)

    @cached_property
    def _safe_split(self) -> SafeSplit:
        return safe_split_of_json(json.loads(self._data))

    @cached_property
    def _without_prefix(self) -> tokenizers.Tokenizer:
        tokenizer = _read(
            self.path, json.dumps(remove_space_prefix(json.loads(self._data))).encode()
        )
        tokenizer.encode_special_tokens = True
        return tokenizer

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; special tokens have none.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        return self._tokenizer.decode(check_ids(ids, self.n_vocab, self.path))

    def parse(self, text: str) -> list[int]:
        """Returns the ids of `text`; the text of a special token gives that token.

        Raises:
            InputError: the text holds half of a surrogate pair, which UTF-8 can't write.
        """
        check_text(text)
        return self._parser.encode(text, add_special_tokens=False).ids

    def encode_chat(self, messages: Sequence[chat.Message]) -> list[int]:
        """Returns the ids of a chat, up to where the model is to answer.

        Raises:
            InputError: the messages are not a chat that the format knows, or there is no format.
        """
        if self.template is not None:
            names = {"bos_token": self.bos_id, "eos_token": self.eos_id}
            usual = {name: self._tokenizer.id_to_token(i) or "" for name, i in names.items()}
            tokens = self._settings.tokens or usual
            return chat.template_ids(
                self.template, messages, tokens,
                special=self.special, encode=self.encode, parse=self.parse,
            )  # fmt: skip
        if len(self._llama3) < len(_LLAMA3):
            raise InputError(
                f"{self.path} has no chat format, so this is a base model: take one that was made"
                " for chats, or lay a chat_template.jinja beside it"
            )
        return chat.llama3_ids(self.encode, self._llama3.__getitem__, messages)

    @cached_property
    def _parser(self) -> tokenizers.Tokenizer:
        return _read(self.path, self._data)


def _read(path: Path, data: bytes) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(data.decode())
    except Exception as error:  # the package has no exception of its own
        raise InputError(
            f"{path} is not a tokenizer.json, or is cut short ({error}): fetch it again"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
