"""Exports tokenizers to the formats of other programs: Hugging Face's folder, tiktoken's file."""

import base64
import json
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import sentencepiece as spm
from sentencepiece.sentencepiece_model_pb2 import (
    ModelProto,  # pyright: ignore[reportAttributeAccessIssue] (generated at import)
)

from llama_jax.errors import InputError
from llama_jax.tokenizer.build import (
    BYTE,
    CONTROL,
    LLAMA3_PATTERN,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    build_tokenizer_json,
    byte_alphabet,
    derive_merges,
    llama3_components,
    replacement,
    sequence,
)
from llama_jax.tokenizer.chat import LLAMA2_TEMPLATE, LLAMA3_TEMPLATE
from llama_jax.tokenizer.sentencepiece import SentencePiece
from llama_jax.tokenizer.settings import to_json
from llama_jax.tokenizer.tiktoken import SPECIAL_TOKENS, Tiktoken
from llama_jax.tokenizer.tokenizer import Tokenizer

# Special tokens that have these names in every tokenizer.json of Llama 3; others may differ.
_REQUIRED_NAMES = {
    0: "begin_of_text",
    1: "end_of_text",
    6: "start_header_id",
    7: "end_header_id",
    9: "eot_id",
}


def huggingface_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Returns the files from which transformers and other programs load a tokenizer, by name.

    They are `tokenizer.json`, `tokenizer_config.json`, `generation_config.json`, and the
    `tokenizer.model` of a SentencePiece tokenizer. A tokenizer.json with a tokenizer_config.json is
    returned unchanged. Without a chat template, the files get the template of the tokenizer's
    own format (Llama 2 or Llama 3). The tokenizer class is `PreTrainedTokenizerFast`: the
    LlamaTokenizer of transformers 5 would rebuild the tokenizer and lose the space at the start of
    a text.

    Raises:
        InputError: a SentencePiece model is not byte-pair encoding, or it normalizes texts.
    """
    if "tokenizer.json" in tokenizer.files and "tokenizer_config.json" in tokenizer.files:
        return dict(tokenizer.files)
    files: dict[str, bytes] = {}
    config: dict[str, Any] = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}"))
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    template = None
    if isinstance(tokenizer, Tiktoken):
        files["tokenizer.json"] = _tiktoken_to_json(tokenizer)
        names = {i: name for name, i in tokenizer.special.items()}
        config["pad_token"] = "<|finetune_right_pad_id|>"
        template = tokenizer.template or LLAMA3_TEMPLATE
    elif isinstance(tokenizer, SentencePiece):
        files["tokenizer.model"] = tokenizer.files["tokenizer.model"]
        model = ModelProto.FromString(files["tokenizer.model"])
        files["tokenizer.json"] = _sentencepiece_to_json(tokenizer, model)
        names = {i: p.piece for i, p in enumerate(model.pieces)}
        config["unk_token"] = names[model.trainer_spec.unk_id]  # every model has one
        template = tokenizer.template or (LLAMA2_TEMPLATE if tokenizer.has_llama2_chats else None)
    else:
        content = json.loads(tokenizer.files["tokenizer.json"])
        vocab = content["model"]["vocab"]
        if not isinstance(vocab, dict):  # a unigram model has a list of pieces and scores, by id
            vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
        names = {i: piece for piece, i in vocab.items()}
        names |= {token["id"]: token["content"] for token in content.get("added_tokens", [])}
    config |= {"bos_token": names[tokenizer.bos_id], "eos_token": names[tokenizer.eos_id]}
    config |= {"add_bos_token": tokenizer.add_bos, "clean_up_tokenization_spaces": False}
    if template is not None and "chat_template.jinja" not in tokenizer.files:
        config.setdefault("chat_template", template)
    ends = sorted(tokenizer.end_ids)
    files["generation_config.json"] = to_json(
        {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends}
    )
    files |= {k: v for k, v in tokenizer.files.items() if k != "tokenizer.model"}
    return files | {"tokenizer_config.json": to_json(config)}


def _tiktoken_to_json(tokenizer: Tiktoken) -> bytes:
    alphabet = byte_alphabet()

    def escape(piece: bytes) -> str:
        return "".join(alphabet[byte] for byte in piece)

    ranks = {escape(piece): rank for piece, rank in tokenizer.ranks.items()}
    bos = ("<|begin_of_text|>", tokenizer.bos_id)
    return build_tokenizer_json(
        ranks,
        derive_merges(sorted(ranks, key=ranks.__getitem__), ranks),
        dict.fromkeys(SPECIAL_TOKENS, True),
        bos if tokenizer.add_bos else None,
        llama3_components(),
        ignore_merges=True,
    )


def _sentencepiece_to_json(tokenizer: SentencePiece, model: ModelProto) -> bytes:
    spec = model.normalizer_spec
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise InputError(
            f"{tokenizer.path} is a SentencePiece model, but not byte-pair encoding, so it can't"
            " be exported as a tokenizer.json: use its tokenizer.model"
        )
    normalizers = [replacement("\ufdd0", "\ufdd0\ufdd1"), replacement("▁", "\ufdd0\ufdd2")]
    decoders = [replacement("\ufdd0\ufdd2", "▁"), replacement("\ufdd0\ufdd1", "\ufdd0")]
    if not spec.precompiled_charsmap:
        normalizers, decoders = [], []
    elif not _only_escapes_space_marks(model):
        raise InputError(
            f"{tokenizer.path} normalizes texts, which can't be exported as a tokenizer.json: use"
            " its tokenizer.model"
        )
    if spec.remove_extra_whitespaces:
        normalizers.append(replacement(r"\A +| +(?= )", "", regex=True))
    if spec.add_dummy_prefix:
        normalizers.append({"type": "Prepend", "prepend": "▁"})
    n_stripped = 1 << 16 if spec.remove_extra_whitespaces else int(spec.add_dummy_prefix)
    decoders.insert(0, {"type": "Strip", "content": " ", "start": n_stripped, "stop": 0})
    normalizers.append(replacement(" ", "▁"))
    if spec.remove_extra_whitespaces:
        normalizers.append(replacement(r"▁+\z", "", regex=True))
    types = [p.type for p in model.pieces]
    scores = {p.piece: -p.score for p in model.pieces if p.type == NORMAL}
    added = (UNKNOWN, CONTROL, USER_DEFINED)
    bos = (model.pieces[tokenizer.bos_id].piece, tokenizer.bos_id)
    return build_tokenizer_json(
        {p.piece: i for i, p in enumerate(model.pieces)},
        derive_merges(sorted(scores, key=scores.__getitem__), scores),
        {p.piece: p.type != USER_DEFINED for p in model.pieces if p.type in added},
        bos if tokenizer.add_bos else None,
        {
            "normalizer": sequence("normalizers", *normalizers),
            "decoder": sequence(
                "decoders",
                replacement("▁", " "),
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *decoders,
            ),
        },
        unk_token=next((p.piece for p in model.pieces if p.type == UNKNOWN), None),
        fuse_unk=True,
        byte_fallback=BYTE in types,
    )


def _only_escapes_space_marks(model: ModelProto) -> bool:
    """Returns whether the model normalizes as our own tokenizers do: it escapes only U+2581."""
    processor = spm.SentencePieceProcessor(model_proto=model.SerializeToString())
    odd = "x▁\ufdd0ﬁ\u00a0e\u0301２\u3000\ufdd2"
    escaped = odd.replace("\ufdd0", "\ufdd0\ufdd1").replace("▁", "\ufdd0\ufdd2")
    normalized = processor.normalize(odd).removeprefix("▁")
    return normalized == escaped and processor.decode(processor.encode(odd)) == odd


def tiktoken_bytes(data: bytes) -> bytes | None:
    """Returns the tiktoken file (Meta's tokenizer.model) of a Llama 3 tokenizer.json.

    Returns None for any other tokenizer. One of Llama 3 has byte pairs with their ranks as ids,
    splits texts by Llama 3's pattern, and has 256 special tokens after the byte pairs, with Meta's
    names at Meta's ids.

    Args:
        data: content of the tokenizer.json.
    """
    content = json.loads(data)
    model, pre_tokenizer = content["model"], content.get("pre_tokenizer") or {}
    if not isinstance(model["vocab"], dict):
        return None
    special = {token["id"]: token["content"] for token in content.get("added_tokens", [])}
    vocab = {piece: i for piece, i in model["vocab"].items() if i not in special}
    n = len(vocab)
    byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
    components = pre_tokenizer.get("pretokenizers") or [{}]
    if (
        model.get("type") != "BPE"
        or not model.get("ignore_merges")
        or content.get("normalizer") is not None
        or components[0].get("pattern") != {"Regex": LLAMA3_PATTERN}
        or [component.get("type") for component in components] != ["Split", "ByteLevel"]
        or sorted(vocab.values()) != list(range(n))
        or sorted(special) != list(range(n, n + len(SPECIAL_TOKENS)))
        or any(special[n + i] != f"<|{name}|>" for i, name in _REQUIRED_NAMES.items())
        or any(character not in byte_of for piece in vocab for character in piece)
    ):
        return None
    pieces = sorted(vocab, key=vocab.__getitem__)
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]

    def group_by_piece(merges: Iterable[Any]) -> list[set[Any]]:
        return [set(group) for _, group in groupby(merges, key=lambda merge: merge[0] + merge[1])]

    expected = list(derive_merges(pieces, vocab))
    if merges != expected and group_by_piece(merges) != group_by_piece(expected):
        return None
    encoded = (base64.b64encode(bytes(map(byte_of.__getitem__, piece))) for piece in pieces)
    return b"".join(b"%s %d\n" % (piece, rank) for rank, piece in enumerate(encoded))
