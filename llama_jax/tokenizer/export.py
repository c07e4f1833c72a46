"""Tokenizers as the files of other programs: Hugging Face's folder, tiktoken's format."""

import base64
import json
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import sentencepiece as spm
from sentencepiece.sentencepiece_model_pb2 import (
    ModelProto,  # pyright: ignore[reportAttributeAccessIssue] (made at import)
)

from llama_jax.errors import InputError
from llama_jax.tokenizer.build import (
    BYTE,
    CONTROL,
    LLAMA3_PATTERN,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    byte_alphabet,
    llama3_parts,
    merges_of,
    replace,
    sequence,
    tokenizer_json,
)
from llama_jax.tokenizer.chat import LLAMA2_TEMPLATE, LLAMA3_TEMPLATE
from llama_jax.tokenizer.sentencepiece import SentencePiece
from llama_jax.tokenizer.settings import to_json
from llama_jax.tokenizer.tiktoken import SPECIAL_TOKENS, Tiktoken
from llama_jax.tokenizer.tokenizer import Tokenizer

# What a tokenizer.json of Llama 3 calls at least these, whatever it calls the others.
_FIXED = {
    0: "begin_of_text",
    1: "end_of_text",
    6: "start_header_id",
    7: "end_header_id",
    9: "eot_id",
}


def huggingface_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Returns the files by which transformers and other programs read a tokenizer.

    `tokenizer.json`, `tokenizer_config.json`, `generation_config.json`, and SentencePiece's own
    `tokenizer.model`; a tokenizer.json with its configuration stays as it came. Where there is no
    chat template, the one of the tokenizer's format (Llama 2 or Llama 3) goes with it. The class
    is the plain `PreTrainedTokenizerFast`: transformers' LlamaTokenizer of version 5 would rebuild
    the tokenizer and lose the space before a text that begins with one.

    Raises:
        InputError: a SentencePiece model is not byte pairs, or normalises texts.
    """
    if "tokenizer.json" in tokenizer.files and "tokenizer_config.json" in tokenizer.files:
        return dict(tokenizer.files)
    made: dict[str, bytes] = {}
    config: dict[str, Any] = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}"))
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    template = None
    if isinstance(tokenizer, Tiktoken):
        made["tokenizer.json"] = _from_tiktoken(tokenizer)
        names = {i: name for name, i in tokenizer.special.items()}
        config["pad_token"] = "<|finetune_right_pad_id|>"
        template = tokenizer.template or LLAMA3_TEMPLATE
    elif isinstance(tokenizer, SentencePiece):
        made["tokenizer.model"] = tokenizer.files["tokenizer.model"]
        model = ModelProto.FromString(made["tokenizer.model"])
        made["tokenizer.json"] = _from_sentencepiece(tokenizer, model)
        names = {i: p.piece for i, p in enumerate(model.pieces)}
        config["unk_token"] = names[model.trainer_spec.unk_id]  # no model is without
        template = tokenizer.template or (LLAMA2_TEMPLATE if tokenizer.chats_as_llama2 else None)
    else:
        content = json.loads(tokenizer.files["tokenizer.json"])
        vocab = content["model"]["vocab"]
        if not isinstance(vocab, dict):  # as of a unigram model: pieces and scores, by id
            vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
        names = {i: piece for piece, i in vocab.items()}
        names |= {token["id"]: token["content"] for token in content.get("added_tokens", [])}
    config |= {"bos_token": names[tokenizer.bos_id], "eos_token": names[tokenizer.eos_id]}
    config |= {"add_bos_token": tokenizer.add_bos, "clean_up_tokenization_spaces": False}
    if template is not None and "chat_template.jinja" not in tokenizer.files:
        config.setdefault("chat_template", template)
    ends = sorted(tokenizer.end_ids)
    made["generation_config.json"] = to_json(
        {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends}
    )
    kept = {k: v for k, v in tokenizer.files.items() if k != "tokenizer.model"}
    return made | kept | {"tokenizer_config.json": to_json(config)}


def _from_tiktoken(tokenizer: Tiktoken) -> bytes:
    letters = byte_alphabet()

    def written(piece: bytes) -> str:
        return "".join(letters[byte] for byte in piece)

    ranks = {written(piece): rank for piece, rank in tokenizer.ranks.items()}
    bos = ("<|begin_of_text|>", tokenizer.bos_id)
    return tokenizer_json(
        ranks,
        merges_of(sorted(ranks, key=ranks.__getitem__), ranks),
        dict.fromkeys(SPECIAL_TOKENS, True),
        bos if tokenizer.add_bos else None,
        llama3_parts(),
        ignore_merges=True,
    )


def _from_sentencepiece(tokenizer: SentencePiece, model: ModelProto) -> bytes:
    spec = model.normalizer_spec
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise InputError(
            f"{tokenizer.path} is a SentencePiece model, but not of byte pairs: only those can be"
            " written as a tokenizer.json here"
        )
    before = [replace("\ufdd0", "\ufdd0\ufdd1"), replace("▁", "\ufdd0\ufdd2")]
    after = [replace("\ufdd0\ufdd2", "▁"), replace("\ufdd0\ufdd1", "\ufdd0")]
    if not spec.precompiled_charsmap:
        before, after = [], []
    elif not _only_escapes(model):
        raise InputError(
            f"{tokenizer.path} normalises texts, which can't be written as a tokenizer.json here:"
            " use its tokenizer.model"
        )
    if spec.remove_extra_whitespaces:
        before.append(replace(r"\A +| +(?= )", "", regex=True))
    if spec.add_dummy_prefix:
        before.append({"type": "Prepend", "prepend": "▁"})
    stripped = 1 << 16 if spec.remove_extra_whitespaces else int(spec.add_dummy_prefix)
    after.insert(0, {"type": "Strip", "content": " ", "start": stripped, "stop": 0})
    before.append(replace(" ", "▁"))
    if spec.remove_extra_whitespaces:
        before.append(replace(r"▁+\z", "", regex=True))
    types = [p.type for p in model.pieces]
    scores = {p.piece: -p.score for p in model.pieces if p.type == NORMAL}
    added = (UNKNOWN, CONTROL, USER_DEFINED)
    bos = (model.pieces[tokenizer.bos_id].piece, tokenizer.bos_id)
    return tokenizer_json(
        {p.piece: i for i, p in enumerate(model.pieces)},
        merges_of(sorted(scores, key=scores.__getitem__), scores),
        {p.piece: p.type != USER_DEFINED for p in model.pieces if p.type in added},
        bos if tokenizer.add_bos else None,
        {
            "normalizer": sequence("normalizers", *before),
            "decoder": sequence(
                "decoders", replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}, *after
            ),
        },
        unk_token=next((p.piece for p in model.pieces if p.type == UNKNOWN), None),
        fuse_unk=True,
        byte_fallback=BYTE in types,
    )


def _only_escapes(model: ModelProto) -> bool:
    """Tells whether the model's normalisation is that of our own tokenizers."""
    own = spm.SentencePieceProcessor(model_proto=model.SerializeToString())
    odd = "x▁\ufdd0ﬁ\u00a0e\u0301２\u3000\ufdd2"
    escaped = odd.replace("\ufdd0", "\ufdd0\ufdd1").replace("▁", "\ufdd0\ufdd2")
    return own.normalize(odd).removeprefix("▁") == escaped and own.decode(own.encode(odd)) == odd


def tiktoken_bytes(data: bytes) -> bytes | None:
    """Returns the tiktoken file (Meta's tokenizer.model) of a Llama 3 tokenizer.json.

    Returns None where the tokenizer is not Llama 3's kind: byte pairs whose ids are their ranks,
    split by Llama 3's pattern, followed by 256 special tokens with Meta's names in their places.

    Args:
        data: what is in the tokenizer.json.
    """
    content = json.loads(data)
    model, split = content["model"], content.get("pre_tokenizer") or {}
    if not isinstance(model["vocab"], dict):
        return None
    special = {token["id"]: token["content"] for token in content.get("added_tokens", [])}
    vocab = {piece: i for piece, i in model["vocab"].items() if i not in special}
    n = len(vocab)
    values = {letter: byte for byte, letter in enumerate(byte_alphabet())}
    parts = split.get("pretokenizers") or [{}]
    if (
        model.get("type") != "BPE"
        or not model.get("ignore_merges")
        or content.get("normalizer") is not None
        or parts[0].get("pattern") != {"Regex": LLAMA3_PATTERN}
        or [part.get("type") for part in parts] != ["Split", "ByteLevel"]
        or sorted(vocab.values()) != list(range(n))
        or sorted(special) != list(range(n, n + len(SPECIAL_TOKENS)))
        or any(special[n + i] != f"<|{name}|>" for i, name in _FIXED.items())
        or any(letter not in values for piece in vocab for letter in piece)
    ):
        return None
    pieces = sorted(vocab, key=vocab.__getitem__)
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]

    def of_each_piece(merges: Iterable[Any]) -> list[set[Any]]:
        return [set(group) for _, group in groupby(merges, key=lambda merge: merge[0] + merge[1])]

    expected = list(merges_of(pieces, vocab))
    if merges != expected and of_each_piece(merges) != of_each_piece(expected):
        return None
    encoded = (base64.b64encode(bytes(values[letter] for letter in piece)) for piece in pieces)
    return b"".join(b"%s %d\n" % (piece, rank) for rank, piece in enumerate(encoded))
