"""The tokenizer inside a GGUF file, as the files that a model folder holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.errors import InputError
from llama_jax.tokenizer.build import (
    CONTROL,
    USER_DEFINED,
    build_sentencepiece_model,
    byte_level,
    check_pieces,
    infer_piece_types,
    llama3_parts,
    sequence,
    tokenizer_json,
)
from llama_jax.tokenizer.gguf_header import MAGIC, read_header
from llama_jax.tokenizer.settings import to_json

# The names of Llama 3's way to split a text; llama.cpp begins its texts with the begin token.
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")


def is_gguf(data: bytes) -> bool:
    """Tells whether a file begins as a GGUF file does."""
    return data.startswith(MAGIC)


def has_tokenizer(path: Path) -> bool:
    """Tells whether a GGUF file holds a tokenizer, of whatever kind.

    Raises:
        InputError: the file is damaged.
    """
    return "tokenizer.ggml.model" in read_header(path, "tokenizer.ggml.model").metadata


def gguf_tokenizer_files(path: str | Path) -> dict[str, bytes]:
    """Returns the files that a model folder with the tokenizer of a GGUF file holds.

    `tokenizer.model` (the kind "llama") or `tokenizer.json` (the kind "gpt2": byte pairs),
    `tokenizer_config.json` (begin and end tokens, chat template) and `generation_config.json`
    (the ids that end a text).

    Raises:
        InputError: the file is damaged, has no tokenizer, or one of a kind that is not LLaMA's.
    """
    path = Path(path)
    said = read_header(path, "tokenizer.").metadata
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
    types = said.get("tokenizer.ggml.token_type") or infer_piece_types(pieces, control=(bos, eos))
    model = build_sentencepiece_model(
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
