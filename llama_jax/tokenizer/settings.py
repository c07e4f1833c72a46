"""Reads the settings of a tokenizer from the files next to it: special tokens, chat template."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath, read_file

CONFIG_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class TokenizerSettings:
    """The settings of a tokenizer; each may be missing in a model folder."""

    tokens: Mapping[str, str]  # texts of the special tokens: bos_token, eos_token, …
    bos_ids: frozenset[int]  # at most one
    end_ids: frozenset[int]  # from generation_config.json, or else config.json
    add_bos: bool | None  # whether texts start with the begin token
    template: str | None  # for chats, in Jinja


def read_config_files(folder: AnyPath) -> dict[str, bytes]:
    """Returns the content of the files in `folder` that contain settings, by name."""
    paths = [folder / name for name in (*CONFIG_FILES, "config.json")]
    return {path.name: read_file(path) for path in paths if path.is_file()}


def read_settings(files: Mapping[str, bytes], folder: AnyPath) -> TokenizerSettings:
    """Returns the settings in `files`, which come from `folder`.

    Raises:
        InputError: a file is not JSON, or a setting has a wrong type.
    """
    config = _read_json(files, "tokenizer_config.json", folder)
    named = _read_json(files, "special_tokens_map.json", folder) | config
    tokens = {}
    for name, token in named.items():
        if name.endswith("_token"):
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                tokens[name] = text
    ids: dict[str, frozenset[int]] = {}
    for name in ("config.json", "generation_config.json"):
        content = _read_json(files, name, folder)
        for key in ("bos_token_id", "eos_token_id"):
            ids[key] = _token_ids(content.get(key), f"{key} of {folder / name}") or ids.get(
                key, frozenset()
            )
    return TokenizerSettings(
        tokens=tokens,
        bos_ids=ids["bos_token_id"],
        end_ids=ids["eos_token_id"],
        add_bos=None if config.get("add_bos_token") is None else bool(config["add_bos_token"]),
        template=_template(files, config, folder),
    )


def _read_json(files: Mapping[str, bytes], name: str, folder: AnyPath) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        content = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder / name} is not valid JSON ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{folder / name} is not a JSON object: fetch it again")
    return content


def _token_ids(value: Any, location: str) -> frozenset[int]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int for i in values):
        raise InputError(f"{location} is {value!r}: give a token id, or a list of token ids")
    return frozenset(i for i in values if i >= 0)  # -1 means none


def _template(files: Mapping[str, bytes], config: dict[str, Any], folder: AnyPath) -> str | None:
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
                ' named "default": add one'
            ) from error
    if template is not None and not isinstance(template, str):
        raise InputError(
            f"chat_template of {folder / 'tokenizer_config.json'} is not a string: give a"
            " Jinja template"
        )
    return template


def check_text(text: str) -> None:
    """Checks that UTF-8 can encode `text`.

    Raises:
        InputError: the text contains half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            "the text contains half of a surrogate pair, which UTF-8 can't encode: remove it"
        ) from error


def check_ids(ids: Iterable[int], n_vocab: int, path: AnyPath) -> list[int]:
    """Returns `ids` as Python integers.

    Raises:
        InputError: an id is outside the vocabulary of the tokenizer at `path`.
    """
    ids = [int(i) for i in ids]
    outside = [i for i in ids if not 0 <= i < n_vocab]
    if outside:
        raise InputError(
            f"token {outside[0]} is outside the {n_vocab} tokens of {path}: the model and the"
            " tokenizer don't belong together"
        )
    return ids


def model_folder_files(
    name: str, data: bytes, files: Mapping[str, bytes], settings: TokenizerSettings
) -> dict[str, bytes]:
    """Returns the files that a model folder needs for a tokenizer and its settings, by name.

    Args:
        name: name of the tokenizer's own file.
        data: its content.
        files: content of the files next to it, by name.
        settings: read from `files`.
    """
    result = {key: files[key] for key in (*CONFIG_FILES, "tokenizer.json") if key in files}
    # The end ids can come from config.json, which belongs to the model and isn't returned.
    if settings.end_ids and "generation_config.json" not in files:
        generation: dict[str, Any] = {"eos_token_id": sorted(settings.end_ids)}
        if settings.bos_ids:
            generation["bos_token_id"] = next(iter(settings.bos_ids))
        result["generation_config.json"] = to_json(generation)
    return result | {name: data}


def to_json(content: Any) -> bytes:
    """Returns `content` as an indented JSON file."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
