"""What the JSON files beside a tokenizer say: begin and end tokens, the chat template."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_jax.errors import InputError
from llama_jax.runtime.regular_file import read_regular

SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class TokenizerSettings:
    """What a model folder says about its tokenizer, as far as it says it."""

    tokens: Mapping[str, str]  # texts of the special tokens: bos_token, eos_token, …
    bos_ids: frozenset[int]  # at most one
    end_ids: frozenset[int]  # of the model: generation_config.json, or else config.json
    add_bos: bool | None  # whether texts begin with the begin token
    template: str | None  # of chats, in Jinja


def side_files(folder: Path) -> dict[str, bytes]:
    """Returns the files in `folder` that settings are read from, by name."""
    paths = [folder / name for name in (*SIDE_FILES, "config.json")]
    return {path.name: read_regular(path) for path in paths if path.is_file()}


def read_settings(files: Mapping[str, bytes], folder: Path) -> TokenizerSettings:
    """Returns what `files`, which lie in `folder`, say.

    Raises:
        InputError: one of them is not the JSON it should be.
    """
    config = _read(files, "tokenizer_config.json", folder)
    named = _read(files, "special_tokens_map.json", folder) | config
    tokens = {}
    for name, token in named.items():
        if name.endswith("_token"):
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                tokens[name] = text
    ids: dict[str, frozenset[int]] = {}
    for name in ("config.json", "generation_config.json"):
        said = _read(files, name, folder)
        for key in ("bos_token_id", "eos_token_id"):
            ids[key] = _ids(said.get(key), f"{key} of {folder / name}") or ids.get(key, frozenset())
    return TokenizerSettings(
        tokens=tokens,
        bos_ids=ids["bos_token_id"],
        end_ids=ids["eos_token_id"],
        add_bos=None if config.get("add_bos_token") is None else bool(config["add_bos_token"]),
        template=_template(files, config, folder),
    )


def _read(files: Mapping[str, bytes], name: str, folder: Path) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        content = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder / name} is not valid JSON ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{folder / name} is not a JSON object: fetch it again")
    return content


def _ids(value: Any, place: str) -> frozenset[int]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int for i in values):
        raise InputError(f"{place} is {value!r}: give a token's id, or a list of them")
    return frozenset(i for i in values if i >= 0)  # -1 says that there is none


def _template(files: Mapping[str, bytes], config: dict[str, Any], folder: Path) -> str | None:
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{folder / 'chat_template.jinja'} is not UTF-8 text") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        try:
            templates = {entry["name"]: entry["template"] for entry in template}
            template = (
                templates["default"] if len(templates) > 1 else next(iter(templates.values()))
            )
        except (TypeError, KeyError, StopIteration) as error:
            raise InputError(
                f"chat_template of {folder / 'tokenizer_config.json'} is a list without a template"
                ' of the name "default": give one'
            ) from error
    if template is not None and not isinstance(template, str):
        raise InputError(
            f"chat_template of {folder / 'tokenizer_config.json'} is no text: give a Jinja template"
        )
    return template


def check_text(text: str) -> None:
    """Checks that UTF-8 can write `text`.

    Raises:
        InputError: it holds half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            "the text holds half of a surrogate pair, which UTF-8 can't write: remove it"
        ) from error


def check_ids(ids: Iterable[int], n_vocab: int, path: Path) -> list[int]:
    """Returns `ids` as integers of Python.

    Raises:
        InputError: one is outside the vocabulary of the tokenizer at `path`.
    """
    ids = [int(i) for i in ids]
    strange = [i for i in ids if not 0 <= i < n_vocab]
    if strange:
        raise InputError(
            f"token {strange[0]} is outside the {n_vocab} tokens of {path}: the model and the"
            " tokenizer don't belong together"
        )
    return ids


def folder_files(
    name: str, data: bytes, files: Mapping[str, bytes], s: TokenizerSettings
) -> dict[str, bytes]:
    """Returns the files of a folder that holds a tokenizer with its settings and no model.

    Args:
        name: of the tokenizer's own file.
        data: what is in it.
        files: those beside it.
        s: what they say.
    """
    kept = {key: files[key] for key in (*SIDE_FILES, "tokenizer.json") if key in files}
    if s.end_ids and "generation_config.json" not in files:  # config.json, which is the model's
        said: dict[str, Any] = {"eos_token_id": sorted(s.end_ids)}
        said |= {"bos_token_id": next(iter(s.bos_ids))} if s.bos_ids else {}
        kept["generation_config.json"] = to_json(said)
    return kept | {name: data}


def to_json(content: Any) -> bytes:
    """Returns `content` as the bytes of a JSON file that people can read."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
