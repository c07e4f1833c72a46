"""The tokenizer of Hugging Face's tokenizer.json."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property

import tokenizers

from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath
from llama_jax.tokenizer import chat
from llama_jax.tokenizer.chat_template import ChatTemplate
from llama_jax.tokenizer.llama3_chat import Llama3Chats
from llama_jax.tokenizer.settings import (
    check_ids,
    check_text,
    model_folder_files,
    read_settings,
)
from llama_jax.tokenizer.split_points import SafeSplit, remove_space_prefix, safe_split_of_json
from llama_jax.tokenizer.tiktoken import END_TOKENS
from llama_jax.tokenizer.token_bytes import json_token_bytes

# Candidates for the begin and the end token of a folder that doesn't name them.
_BEGIN = ("<|begin_of_text|>", "<s>", "<|endoftext|>")
_END = ("<|end_of_text|>", "</s>", "<|endoftext|>")
# Tokens by which a vocabulary of Llama 3 is recognized.
_LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_LLAMA3_TOOLS = ("<|eom_id|>", "<|python_tag|>")  # Llama 3.1 and later


class TokenizerJson(chat.ChatTokenizer):
    """A tokenizer.json with the settings of the files next to it.

    `end_ids` are the end ids of generation_config.json (or, if it has none, of config.json) and the
    end token of the tokenizer. For a vocabulary of Llama 3 they include <|end_of_text|>, <|eom_id|>
    and <|eot_id|>, as for Meta's own file; a base model never generates the last two. The chat
    format is the folder's chat template; without one, Llama 3's format for a vocabulary of Llama 3,
    and no format for other models.

    Args:
        path: the file, for messages.
        data: its content.
        files: content of the files next to it, by name.
    """

    def __init__(self, path: AnyPath, data: bytes, files: Mapping[str, bytes] | None = None):
        files = files or {}
        self.path = path
        self._data = data
        self._tokenizer = _parse_tokenizer(path, data)
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.n_vocab = max(ids.values(), default=-1) + 1
        if not len(ids) == len(set(ids.values())) == self.n_vocab:
            raise InputError(
                f"{path} is damaged: one of its ids up to {self.n_vocab - 1} is missing or occurs"
                " twice: fetch it again"
            )
        added = self._tokenizer.get_added_tokens_decoder().items()
        self.special = {token.content: i for i, token in added if token.special}
        self._settings = read_settings(files, path.parent)
        prefix = self._tokenizer.encode("").ids[:1]
        begin = self._special_id("bos_token", _BEGIN, [*prefix, *self._settings.bos_ids])
        end = self._special_id("eos_token", _END, sorted(self._settings.end_ids))
        if end is None:
            raise InputError(f"{path} names no end token: put its tokenizer_config.json next to it")
        self.eos_id = end
        # Without a known begin token, the end token separates texts.
        self.bos_id = end if begin is None else begin
        ends = {end} | self._settings.end_ids
        self._llama3 = {token: ids[token] for token in _LLAMA3 + _LLAMA3_TOOLS if token in ids}
        self._is_llama3 = self._llama3.keys() >= {*_LLAMA3}
        if self._is_llama3:
            ends |= {ids[token] for token in END_TOKENS if token in ids}
        self.end_ids = frozenset(ends)
        add_bos = self._settings.add_bos
        self.add_bos = prefix == [self.bos_id] if add_bos is None else add_bos
        self.template = self._settings.template
        self.files = model_folder_files("tokenizer.json", data, files, self._settings)

    def _special_id(self, name: str, usual: Sequence[str], ids: Sequence[int]) -> int | None:
        """Returns the id of the token that the settings name, or the first of `ids` or `usual`."""
        find = self._tokenizer.token_to_id
        token = self._settings.tokens.get(name)
        if token is not None and find(token) is None:
            raise InputError(
                f"{self.path} has no {token!r}, but the tokenizer_config.json next to it names this"
                f" as {name}: give files of the same model"
            )
        candidates = [find(token)] if token is not None else [*ids, *map(find, usual)]
        return next((i for i in candidates if i is not None), None)

    def encode(
        self, text: str, *, bos: bool = False, eos: bool = False, continued: bool = False
    ) -> list[int]:
        """Returns the ids of `text`, on request between the begin and the end token.

        Raises:
            InputError: the text contains half of a surrogate pair, which UTF-8 can't encode.
        """
        check_text(text)
        tokenizer = self._without_space_prefix if continued else self._tokenizer
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def safe_split(self, text: str) -> int:
        """Returns after how many characters a long text can be split; 0: nowhere."""
        return self._find_safe_split(text)

    @cached_property
    def _find_safe_split(self) -> SafeSplit:
        return safe_split_of_json(json.loads(self._data))

    @cached_property
    def _without_space_prefix(self) -> tokenizers.Tokenizer:
        content = remove_space_prefix(json.loads(self._data))
        tokenizer = _parse_tokenizer(self.path, json.dumps(content).encode())
        tokenizer.encode_special_tokens = True
        return tokenizer

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; special tokens decode to no text.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        return self._tokenizer.decode(check_ids(ids, self.n_vocab, self.path))

    def token_bytes(self) -> list[bytes | None]:
        """Returns the bytes that each token adds to a text; None for tokens without text."""
        return json_token_bytes(json.loads(self._data), self._tokenizer)

    def parse(self, text: str) -> list[int]:
        """Returns the ids of `text`; the text of a special token is encoded as that token.

        Raises:
            InputError: the text contains half of a surrogate pair, which UTF-8 can't encode.
        """
        check_text(text)
        return self._parser.encode(text, add_special_tokens=False).ids

    @cached_property
    def _chat_format(self) -> chat.ChatFormat:
        if self.template is not None:
            return self._template_of(self.template)
        if self._is_llama3:
            template = self._template_of(chat.LLAMA3_TEMPLATE)
            return Llama3Chats(self.encode, self._llama3, template)
        raise InputError(
            f"{self.path} has no chat format, so this is a base model: use a chat model, or put a"
            " chat_template.jinja next to it"
        )

    def _template_of(self, source: str) -> ChatTemplate:
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        texts = {name: self._tokenizer.id_to_token(i) or "" for name, i in ids.items()}
        return ChatTemplate(
            source,
            self._settings.tokens or texts,
            special=self.special,
            end_ids=self.end_ids,
            encode=self.encode,
            parse=self.parse,
        )

    @cached_property
    def _parser(self) -> tokenizers.Tokenizer:
        return _parse_tokenizer(self.path, self._data)


def _parse_tokenizer(path: AnyPath, data: bytes) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(data.decode())
    except Exception as error:  # the package defines no exception type
        raise InputError(
            f"{path} is not a tokenizer.json, or is truncated ({error}): fetch it again"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
