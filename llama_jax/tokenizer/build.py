"""Builds the files of tokenizers: a SentencePiece model, or a tokenizer.json."""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import (
    ModelProto,  # pyright: ignore[reportAttributeAccessIssue] (made at import)
)

from llama_jax.errors import InputError

# SentencePiece's types of pieces (GGUF's have the same numbers).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# How Llama 3 splits a text before it merges bytes (Meta's llama3, tokenizer.py).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def infer_piece_types(pieces: Sequence[str], control: Collection[int]) -> list[int]:
    """Returns the types of the pieces of a LLaMA vocabulary that doesn't tell them.

    Args:
        pieces: by id; the unknown piece is number 0.
        control: ids of the begin and the end token.
    """
    types = [BYTE if re.fullmatch("<0x[0-9A-F]{2}>", piece) else NORMAL for piece in pieces]
    for i in control:
        types[i] = CONTROL
    types[0] = UNKNOWN
    return types


def build_sentencepiece_model(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    path: Path,
    *,
    bos_id: int = 1,
    eos_id: int = 2,
    add_dummy_prefix: bool = True,
    remove_extra_whitespaces: bool = False,
) -> bytes:
    """Returns a SentencePiece `tokenizer.model` (BPE, nothing normalised), as LLaMA's is.

    Args:
        pieces: by id.
        scores: the higher, the earlier merged.
        types: NORMAL, UNKNOWN, ….
        path: where they are from, for messages.
        bos_id: begin token.
        eos_id: end token.
        add_dummy_prefix: texts get a space in front.
        remove_extra_whitespaces: runs of spaces become one, and those at the ends none.

    Raises:
        InputError: the pieces are not a vocabulary.
    """
    check_pieces(pieces, path)
    if not len(pieces) == len(scores) == len(types) or not max(bos_id, eos_id) < len(pieces):
        raise InputError(
            f"{path}: its {len(pieces)} pieces, {len(scores)} scores, {len(types)} types, begin"
            f" token {bos_id} and end token {eos_id} don't fit together: fetch it again"
        )
    model = ModelProto()
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = BYTE in types
    trainer.unk_id = types.index(UNKNOWN) if UNKNOWN in types else 0
    trainer.bos_id, trainer.eos_id, trainer.pad_id = bos_id, eos_id, -1
    trainer.unk_piece, trainer.bos_piece = pieces[trainer.unk_id], pieces[bos_id]
    trainer.eos_piece = pieces[eos_id]
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = add_dummy_prefix
    model.normalizer_spec.remove_extra_whitespaces = remove_extra_whitespaces
    return model.SerializeToString(deterministic=True)


def check_pieces(pieces: Sequence[str], path: Path) -> None:
    """Checks that no piece stands twice in the vocabulary of the tokenizer at `path`.

    Raises:
        InputError: one does.
    """
    if len(set(pieces)) != len(pieces):
        seen: set[str] = set()
        twice = next(piece for piece in pieces if piece in seen or seen.add(piece))
        raise InputError(
            f"{path} is damaged, fetch it again: {twice[:80]!r} stands twice among its pieces"
        )


def byte_alphabet() -> list[str]:
    """Returns the character that a byte-level tokenizer.json writes for each byte.

    Printable characters of Latin-1 stand for themselves, the others follow from U+0100 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def merges_of(pieces: Iterable[str], rank: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Yields the merges that lead to `pieces`: every pair of known pieces, in the order of rank."""
    for piece in pieces:
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs = [(a, b) for a, b in cuts if a in rank and b in rank]
        yield from sorted(pairs, key=lambda pair: (rank[pair[0]], rank[pair[1]]))


def tokenizer_json(
    vocab: Mapping[str, int],
    merges: Iterable[Sequence[str]],
    added: Mapping[str, bool],
    bos: tuple[str, int] | None,
    parts: Mapping[str, Any],
    **model: Any,
) -> bytes:
    """Returns a `tokenizer.json` with a BPE model.

    Args:
        vocab: ids of the pieces, without or with those added.
        merges: in order.
        added: the pieces that text is searched for as they stand, by id; True: has no text.
        bos: begin token and its id, where texts begin with it.
        parts: normalizer, pre_tokenizer and decoder.
        model: further settings of the BPE model.
    """
    base = len(vocab)
    added_tokens = [
        {
            "id": vocab.get(token, base + i),
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": special,
        }
        for i, (token, special) in enumerate(added.items())
    ]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": parts.get("normalizer"),
        "pre_tokenizer": parts.get("pre_tokenizer"),
        "post_processor": _begin_with(*bos) if bos else None,
        "decoder": parts["decoder"],
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            **model,
            "vocab": vocab,
            "merges": list(merges),
        },
    }
    return (json.dumps(content, ensure_ascii=False) + "\n").encode()


def _begin_with(token: str, number: int) -> dict[str, Any]:
    def begin(kind: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": kind}}

    def text(name: str, kind: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": kind}}

    return {
        "type": "TemplateProcessing",
        "single": [begin(0), text("A", 0)],
        "pair": [begin(0), text("A", 0), begin(1), text("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def sequence(kind: str, *parts: dict[str, Any]) -> dict[str, Any]:
    """Returns normalizers, pretokenizers or decoders as one."""
    return {"type": "Sequence", kind: list(parts)}


def replace(pattern: str, content: str, *, regex: bool = False) -> dict[str, Any]:
    """Returns the part of a tokenizer.json that replaces one text by another."""
    how = "Regex" if regex else "String"
    return {"type": "Replace", "pattern": {how: pattern}, "content": content}


def byte_level(*, split_words: bool) -> dict[str, Any]:
    """Returns the part of a tokenizer.json that writes bytes as characters, or reads them.

    Args:
        split_words: first split the text as GPT-2 does.
    """
    how = {"add_prefix_space": False, "trim_offsets": True, "use_regex": split_words}
    return {"type": "ByteLevel", **how}


def llama3_parts() -> dict[str, Any]:
    """Returns how Llama 3's tokenizer.json splits a text and puts it together."""
    split: dict[str, Any] = {
        "type": "Split",
        "pattern": {"Regex": LLAMA3_PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "pre_tokenizer": sequence("pretokenizers", split, byte_level(split_words=False)),
        "decoder": byte_level(split_words=True),
    }
