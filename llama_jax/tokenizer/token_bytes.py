"""The bytes of each token in a tokenizer.json."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers

from llama_jax.errors import InputError
from llama_jax.tokenizer.build import byte_alphabet

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def json_token_bytes(
    content: Mapping[str, Any], tokenizer: tokenizers.Tokenizer
) -> list[bytes | None]:
    """Returns the bytes that each token adds to a text; None for special tokens.

    Args:
        content: of tokenizer.json.
        tokenizer: of that content.

    Raises:
        InputError: the decoder is neither that of GPT-2 nor that of SentencePiece's models.
    """
    decoders = {part["type"]: part for part in _parts(content.get("decoder") or {})}
    if "ByteLevel" in decoders:
        alphabet = {character: byte for byte, character in enumerate(byte_alphabet())}

        def piece_bytes(piece: str) -> bytes | None:
            known = all(character in alphabet for character in piece)
            return bytes(alphabet[character] for character in piece) if known else None

    elif {"ByteFallback", "Metaspace", "Replace"} & decoders.keys():

        def piece_bytes(piece: str) -> bytes | None:
            if byte := _BYTE.fullmatch(piece):
                return bytes([int(byte[1], 16)])
            return piece.replace("▁", " ").encode()

    else:
        raise InputError(
            "the bytes of the model's tokens are unknown, because tokenizer.json has the decoder"
            f" {content.get('decoder')}: use a model with a decoder ByteLevel or ByteFallback"
        )
    unknown = (content.get("model") or {}).get("unk_token")
    added = tokenizer.get_added_tokens_decoder()
    result = list[bytes | None]()
    for token in range(tokenizer.get_vocab_size()):
        piece = tokenizer.id_to_token(token)
        if token in added:
            result.append(None if added[token].special else added[token].content.encode())
        else:
            result.append(None if piece is None or piece == unknown else piece_bytes(piece))
    return result


def _parts(decoder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yields a decoder, or the parts of a sequence of decoders."""
    if decoder.get("type") == "Sequence":
        for part in decoder["decoders"]:
            yield from _parts(part)
    elif decoder:
        yield decoder
