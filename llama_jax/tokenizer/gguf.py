"""Converts the tokenizer of a GGUF file to the files of a model folder."""

from collections.abc import Mapping
from typing import Any

from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath, parse_path
from llama_jax.tokenizer.build import (
    CONTROL,
    USER_DEFINED,
    build_sentencepiece_model,
    build_tokenizer_json,
    byte_level,
    check_unique_pieces,
    infer_piece_types,
    llama3_components,
    sequence,
)
from llama_jax.tokenizer.gguf_header import MAGIC, read_header
from llama_jax.tokenizer.settings import to_json

# The names of Llama 3's pre-tokenizer. With these, llama.cpp puts the begin token before a text.
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")


def is_gguf(data: bytes) -> bool:
    """Returns whether a file starts with the magic bytes of GGUF."""
    return data.startswith(MAGIC)


def has_tokenizer(path: AnyPath) -> bool:
    """Returns whether a GGUF file contains a tokenizer of any kind.

    Raises:
        InputError: the file is damaged.
    """
    return "tokenizer.ggml.model" in read_header(path, "tokenizer.ggml.model").metadata


def gguf_tokenizer_files(path: str | AnyPath) -> dict[str, bytes]:
    """Returns the files of a model folder with the tokenizer of a GGUF file, by name.

    They are `tokenizer.model` (kind "llama") or `tokenizer.json` (kind "gpt2": byte pairs),
    `tokenizer_config.json` (begin and end tokens, chat template) and `generation_config.json` (end
    ids).

    Raises:
        InputError: the file is damaged, or has no tokenizer of the LLaMA family.
    """
    path = parse_path(path)
    metadata = read_header(path, "tokenizer.").metadata
    kind = metadata.get("tokenizer.ggml.model")
    try:
        if kind == "llama":
            return _sentencepiece_files(path, metadata)
        if kind == "gpt2":
            return _byte_pair_files(path, metadata)
    except KeyError as error:
        raise InputError(
            f"{path} has no {error.args[0]}: its tokenizer is incomplete: fetch it again"
        ) from error
    except (TypeError, IndexError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: its tokenizer is damaged ({error}): fetch it again") from error
    raise InputError(
        f"{path} has a tokenizer of the kind {str(kind)[:80]!a}, but the LLaMA family uses only"
        " llama and gpt2: give the file of a LLaMA model"
    )


def _sentencepiece_files(path: AnyPath, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    pieces = metadata["tokenizer.ggml.tokens"]
    bos = metadata.get("tokenizer.ggml.bos_token_id", 1)
    eos = metadata.get("tokenizer.ggml.eos_token_id", 2)
    types = metadata.get("tokenizer.ggml.token_type") or infer_piece_types(pieces, (bos, eos))
    model = build_sentencepiece_model(
        pieces,
        metadata["tokenizer.ggml.scores"],
        types,
        path,
        bos_id=bos,
        eos_id=eos,
        add_dummy_prefix=metadata.get("tokenizer.ggml.add_space_prefix", True),
        remove_extra_whitespaces=metadata.get("tokenizer.ggml.remove_extra_whitespaces", False),
    )
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", True)
    configs = _config_files(metadata, bos, eos, add_bos, {"tokenizer_class": "LlamaTokenizer"})
    return {"tokenizer.model": model, **configs}


def _byte_pair_files(path: AnyPath, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    pieces = metadata["tokenizer.ggml.tokens"]
    check_unique_pieces(pieces, path)
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    eos = metadata["tokenizer.ggml.eos_token_id"]
    bos = eos if bos is None else bos
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", pre in _LLAMA3)
    if pre in _LLAMA3:
        components = llama3_components()
    elif pre == "smollm":
        digits = {"type": "Digits", "individual_digits": True}
        pre_tokenizer = sequence("pretokenizers", digits, byte_level(split_words=True))
        components = {"pre_tokenizer": pre_tokenizer}
    elif pre in ("gpt-2", "default"):
        components = {"pre_tokenizer": byte_level(split_words=True)}
    else:
        raise InputError(
            f"{path} has the pre-tokenizer {pre!r}, which is not one of the LLaMA family: give the"
            " model's own tokenizer.json"
        )
    types = metadata["tokenizer.ggml.token_type"]
    typed_pieces = zip(pieces, types, strict=True)
    content = build_tokenizer_json(
        {piece: i for i, piece in enumerate(pieces)},
        [merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"]],
        {piece: t == CONTROL for piece, t in typed_pieces if t in (CONTROL, USER_DEFINED)},
        (pieces[bos], bos) if add_bos else None,
        {"decoder": byte_level(split_words=True), **components},
        ignore_merges=pre in _LLAMA3,
    )
    tokenizer_class = {"tokenizer_class": "PreTrainedTokenizerFast"}
    configs = _config_files(metadata, bos, eos, add_bos, tokenizer_class)
    return {"tokenizer.json": content, **configs}


def _config_files(
    metadata: Mapping[str, Any], bos: int, eos: int, add_bos: bool, config: dict[str, Any]
) -> dict[str, bytes]:
    pieces = metadata["tokenizer.ggml.tokens"]
    config |= {"bos_token": pieces[bos], "eos_token": pieces[eos]}
    for name, key in (("unk_token", "unknown_token_id"), ("pad_token", "padding_token_id")):
        if (i := metadata.get(f"tokenizer.ggml.{key}")) is not None:
            config[name] = pieces[i]
    config |= {"add_bos_token": bool(add_bos), "clean_up_tokenization_spaces": False}
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eot", "eom"))
    ends = sorted({eos} | {metadata[key] for key in keys if key in metadata})
    generation = {"bos_token_id": bos, "eos_token_id": ends}
    return {
        "tokenizer_config.json": to_json(config),
        "generation_config.json": to_json(generation),
    }
