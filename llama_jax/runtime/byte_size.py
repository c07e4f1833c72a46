"""Reads sizes such as '4GiB'."""

import re

from llama_jax.errors import InputError


def parse_size(text: str, name: str) -> int:
    """Returns the number of bytes that '4GiB', '800MB' or '123456' stands for.

    Raises:
        InputError: `text` is not a size; the message calls it `name`.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kKMGT]?)(i?)B?", text)
    if not match:
        raise InputError(f"{name} must be a size such as 4GiB or 800MB, not {text!r}")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
