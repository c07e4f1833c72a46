"""Builds tokenizer files: a SentencePiece model, or a tokenizer.json."""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import (
    ModelProto,  # pyright: ignore[reportAttributeAccessIssue] (generated at import)
)

from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath

# SentencePiece's piece types (GGUF uses the same numbers).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# The words into which Llama 3 splits a text before it merges bytes (Meta's llama3, tokenizer.py).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def infer_piece_types(pieces: Sequence[str], control: Collection[int]) -> list[int]:
    """Returns the piece types of a LLaMA vocabulary that doesn't store them.

    Args:
        pieces: by id; the unknown piece has id 0.
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
    path: AnyPath,
    *,
    bos_id: int = 1,
    eos_id: int = 2,
    add_dummy_prefix: bool = True,
    remove_extra_whitespaces: bool = False,
) -> bytes:
    """Returns a SentencePiece `tokenizer.model` like LLaMA's: BPE without normalization.

    Args:
        pieces: by id.
        scores: by id; pieces with higher scores are merged first.
        types: by id: NORMAL, UNKNOWN, ….
        path: source of the pieces, for messages.
        bos_id: begin token.
        eos_id: end token.
        add_dummy_prefix: whether to put a space before each text.
        remove_extra_whitespaces: whether to collapse runs of spaces, and remove spaces at both ends
            of a text.

    Raises:
        InputError: a piece occurs twice, or the arguments don't match in length.
    """
    check_unique_pieces(pieces, path)
    if not len(pieces) == len(scores) == len(types) or not max(bos_id, eos_id) < len(pieces):
        raise InputError(
            f"{path}: its {len(pieces)} pieces, {len(scores)} scores, {len(types)} types, begin"
            f" token {bos_id} and end token {eos_id} don't match: fetch it again"
        )
    model = ModelProto()
    for piece, score, piece_type in zip(pieces, scores, types, strict=True):
        model.pieces.add(piece=piece, score=score, type=piece_type)
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


def check_unique_pieces(pieces: Sequence[str], path: AnyPath) -> None:
    """Checks that no piece occurs twice in the vocabulary of the tokenizer at `path`.

    Raises:
        InputError: a piece occurs twice.
    """
    if len(set(pieces)) != len(pieces):
        duplicate = next(piece for piece, count in Counter(pieces).items() if count > 1)
        raise InputError(
            f"{path} is damaged: the piece {duplicate[:80]!r} occurs twice: fetch it again"
        )


def byte_alphabet() -> list[str]:
    """Returns, for each byte, the character that a byte-level tokenizer.json writes for it.

    Printable Latin-1 characters represent themselves; the other bytes use U+0100 and following
    (GPT-2's encoder.py, `bytes_to_unicode`).
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def derive_merges(pieces: Iterable[str], rank: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Yields the merges that result in `pieces`: all pairs of known pieces, ordered by rank."""
    for piece in pieces:
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs = [(a, b) for a, b in splits if a in rank and b in rank]
        yield from sorted(pairs, key=lambda pair: (rank[pair[0]], rank[pair[1]]))


def build_tokenizer_json(
    vocab: Mapping[str, int],
    merges: Iterable[Sequence[str]],
    added: Mapping[str, bool],
    bos: tuple[str, int] | None,
    components: Mapping[str, Any],
    **model: Any,
) -> bytes:
    """Returns a `tokenizer.json` with a BPE model.

    Args:
        vocab: ids by piece; it may contain the added tokens.
        merges: pairs of pieces, in the order of their rank.
        added: the tokens that are searched for in a text before it is split, in the order of their
            ids; True: a special token, which decodes to no text.
        bos: begin token and its id, if texts start with it.
        components: normalizer, pre_tokenizer and decoder.
        model: more settings of the BPE model.
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
        "normalizer": components.get("normalizer"),
        "pre_tokenizer": components.get("pre_tokenizer"),
        "post_processor": _bos_template(*bos) if bos else None,
        "decoder": components["decoder"],
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


def _bos_template(token: str, token_id: int) -> dict[str, Any]:
    def bos(type_id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": type_id}}

    def text(name: str, type_id: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": type_id}}

    return {
        "type": "TemplateProcessing",
        "single": [bos(0), text("A", 0)],
        "pair": [bos(0), text("A", 0), bos(1), text("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def sequence(key: str, *components: dict[str, Any]) -> dict[str, Any]:
    """Returns a component that applies others in order.

    Args:
        key: `normalizers`, `pretokenizers` or `decoders`.
        components: in the order of application.
    """
    return {"type": "Sequence", key: list(components)}


def replacement(pattern: str, content: str, *, regex: bool = False) -> dict[str, Any]:
    """Returns the component that replaces `pattern` with `content`."""
    return {
        "type": "Replace",
        "pattern": {"Regex" if regex else "String": pattern},
        "content": content,
    }


def byte_level(*, split_words: bool) -> dict[str, Any]:
    """Returns the component that writes each byte as a character; as a decoder, the inverse.

    Args:
        split_words: whether to split the text into GPT-2's words first.
    """
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": split_words,
    }


def llama3_components() -> dict[str, Any]:
    """Returns the pre_tokenizer and the decoder of Llama 3's tokenizer.json."""
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
