"""The tokenizer inside a GGUF file, as the files that a model folder holds."""

import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.data.tokenizer_build import (
    CONTROL,
    USER_DEFINED,
    byte_level,
    check_pieces,
    llama3_parts,
    piece_types,
    sentencepiece_model,
    sequence,
    tokenizer_json,
)
from llama_jax.data.tokenizer_settings import to_json
from llama_jax.errors import InputError

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_NUMBERS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8",
    11: "<i8", 12: "<f8",
}  # fmt: skip

# The names of Llama 3's way to split a text; llama.cpp begins its texts with the begin token.
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")


def is_gguf(data: bytes) -> bool:
    """Tells whether a file begins as a GGUF file does."""
    return data.startswith(_MAGIC)


def has_tokenizer(path: Path) -> bool:
    """Tells whether a GGUF file holds a tokenizer, of whatever kind.

    Raises:
        InputError: the file is damaged.
    """
    return "tokenizer.ggml.model" in _metadata(path, "tokenizer.ggml.model")


def gguf_tokenizer_files(path: str | Path) -> dict[str, bytes]:
    """Returns the files that a model folder with the tokenizer of a GGUF file holds.

    `tokenizer.model` (the kind "llama") or `tokenizer.json` (the kind "gpt2": byte pairs),
    `tokenizer_config.json` (begin and end tokens, chat template) and `generation_config.json`
    (the ids that end a text).

    Raises:
        InputError: the file is damaged, has no tokenizer, or one of a kind that is not LLaMA's.
    """
    path = Path(path)
    said = _metadata(path, "tokenizer.")
    kind = said.get("tokenizer.ggml.model")
    try:
        if kind == "llama":
            return _sentencepiece_files(path, said)
        if kind == "gpt2":
            return _byte_pair_files(path, said)
    except KeyError as error:
        raise InputError(
            f"{path} has no {error.args[0]}: its tokenizer is not complete, fetch it again"
        ) from error
    except (TypeError, IndexError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: its tokenizer is damaged ({error}): fetch it again") from error
    raise InputError(
        f"{path} has a tokenizer of the kind {str(kind)[:80]!a}, but only llama and gpt2 are of the"
        " LLaMA family: give the file of a LLaMA"
    )


def _sentencepiece_files(path: Path, said: Mapping[str, Any]) -> dict[str, bytes]:
    pieces = said["tokenizer.ggml.tokens"]
    bos, eos = (
        said.get("tokenizer.ggml.bos_token_id", 1),
        said.get("tokenizer.ggml.eos_token_id", 2),
    )
    types = said.get("tokenizer.ggml.token_type") or piece_types(pieces, control=(bos, eos))
    model = sentencepiece_model(
        pieces,
        said["tokenizer.ggml.scores"],
        types,
        path,
        bos_id=bos,
        eos_id=eos,
        add_dummy_prefix=said.get("tokenizer.ggml.add_space_prefix", True),
        remove_extra_whitespaces=said.get("tokenizer.ggml.remove_extra_whitespaces", False),
    )
    add_bos = said.get("tokenizer.ggml.add_bos_token", True)
    side = _side_files(said, bos, eos, add_bos, {"tokenizer_class": "LlamaTokenizer"})
    return {"tokenizer.model": model, **side}


def _byte_pair_files(path: Path, said: Mapping[str, Any]) -> dict[str, bytes]:
    pre = said.get("tokenizer.ggml.pre", "default")
    pieces = said["tokenizer.ggml.tokens"]
    check_pieces(pieces, path)
    bos = said.get("tokenizer.ggml.bos_token_id")
    eos = said["tokenizer.ggml.eos_token_id"]
    bos = eos if bos is None else bos
    add_bos = said.get("tokenizer.ggml.add_bos_token", pre in _LLAMA3)
    if pre in _LLAMA3:
        parts = llama3_parts()
    elif pre == "smollm":
        digits = {"type": "Digits", "individual_digits": True}
        parts = {"pre_tokenizer": sequence("pretokenizers", digits, byte_level(split_words=True))}
    elif pre in ("gpt-2", "default"):
        parts = {"pre_tokenizer": byte_level(split_words=True)}
    else:
        raise InputError(
            f"{path} splits texts in the way {pre!r}, which is not of the LLaMA family: give the"
            " model's own tokenizer.json"
        )
    types = said["tokenizer.ggml.token_type"]
    kinds = zip(pieces, types, strict=True)
    content = tokenizer_json(
        {piece: i for i, piece in enumerate(pieces)},
        [merge.split(" ", 1) for merge in said["tokenizer.ggml.merges"]],
        {piece: kind == CONTROL for piece, kind in kinds if kind in (CONTROL, USER_DEFINED)},
        (pieces[bos], bos) if add_bos else None,
        {"decoder": byte_level(split_words=True), **parts},
        ignore_merges=pre in _LLAMA3,
    )
    side = _side_files(said, bos, eos, add_bos, {"tokenizer_class": "PreTrainedTokenizerFast"})
    return {"tokenizer.json": content, **side}


def _side_files(
    said: Mapping[str, Any], bos: int, eos: int, add_bos: bool, config: dict[str, Any]
) -> dict[str, bytes]:
    pieces = said["tokenizer.ggml.tokens"]
    config |= {"bos_token": pieces[bos], "eos_token": pieces[eos]}
    for name, key in (("unk_token", "unknown_token_id"), ("pad_token", "padding_token_id")):
        if (i := said.get(f"tokenizer.ggml.{key}")) is not None:
            config[name] = pieces[i]
    config |= {"add_bos_token": bool(add_bos), "clean_up_tokenization_spaces": False}
    if "tokenizer.chat_template" in said:
        config["chat_template"] = said["tokenizer.chat_template"]
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eot", "eom"))
    ends = sorted({eos} | {said[key] for key in keys if key in said})
    generation = {"bos_token_id": bos, "eos_token_id": ends}
    return {
        "tokenizer_config.json": to_json(config),
        "generation_config.json": to_json(generation),
    }


def _metadata(path: Path, wanted: str) -> dict[str, Any]:
    """Returns what a GGUF file says under the keys that begin with `wanted`.

    Nothing after the metadata is read, and the arrays of other keys are passed over: the whole of
    a Llama 3 file's metadata takes half a second.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            version, _, count = struct.unpack_from("<IQQ", data, 4)
            if not is_gguf(data[:4]) or version not in (2, 3):
                raise InputError(
                    f"{path} is no GGUF file of version 2 or 3 (little-endian): convert it anew"
                )
            values = _Values(data, 24)
            said: dict[str, Any] = {}
            for _ in range(count):
                key, kind = values.string(), values.number("<u4")
                value = values.of(kind, key.startswith(wanted))
                if value is not None:
                    said[key] = value
            return said
    except (struct.error, ValueError, KeyError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged or cut short ({error}): fetch it again") from error


class _Values:
    """Reads the values of GGUF metadata one after another."""

    def __init__(self, data: mmap.mmap, at: int):
        self.data, self.at = data, at

    def take(self, size: int) -> bytes:
        part = self.data[self.at : self.at + size]
        if len(part) != size:
            raise ValueError(f"it ends at byte {len(self.data)}, within its metadata")
        self.at += size
        return part

    def number(self, kind: str) -> Any:
        return np.frombuffer(self.take(np.dtype(kind).itemsize), kind)[0].item()

    def string(self) -> str:
        (size,) = struct.unpack_from("<Q", self.data, self.at)
        self.at += 8
        return self.take(size).decode()

    def of(self, kind: int, wanted: bool) -> Any:
        """Returns the next value, None where it is an array that is not wanted."""
        if kind == _STRING:
            value = self.string()
        elif kind == _ARRAY:
            inner, size = self.number("<u4"), self.number("<u8")
            if inner in _NUMBERS:
                array = np.dtype(_NUMBERS[inner])
                value = np.frombuffer(self.take(array.itemsize * size), array).tolist()
            else:
                value = list(self._each(inner, size, wanted))
        else:
            value = self.number(_NUMBERS[kind])
        return value if wanted else None

    def _each(self, kind: int, size: int, wanted: bool) -> Iterator[Any]:
        for _ in range(size):
            value = self.of(kind, wanted)
            if wanted:
                yield value
