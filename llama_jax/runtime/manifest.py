"""The manifest of a checkpoint, a model folder or token shards: the file that is written last.

A folder without a manifest is incomplete. The manifest contains the SHA-256 of every small file
(names, shapes, tokenizer) and of itself. The chunks of arrays have checksums of their own (CRC-32C,
verified by TensorStore on every read). So every byte of a folder is covered.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from llama_jax.runtime.damage import Damaged, classify_errors
from llama_jax.runtime.storage import AnyPath, read_many, write_file

NAME = "manifest.json"
_SEAL = b'"sha256": "%b"\n}\n'
_SEALED = re.compile(rb'(.*)"sha256": "([0-9a-f]{64})"\n}\n', re.DOTALL)


def hash_bytes(data: bytes | memoryview) -> str:
    """Returns the SHA-256 of `data`, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def seal(content: Mapping[str, Any]) -> bytes:
    """Returns `content` as JSON that ends with the SHA-256 of all bytes before it."""
    text = json.dumps(content, indent=1).encode().removesuffix(b"\n}") + b",\n "
    return text + _SEAL % hashlib.sha256(text).hexdigest().encode()


def read_manifest(folder: AnyPath, name: str = NAME) -> dict[str, Any] | None:
    """Returns the manifest of a folder; None if there is none, so that the folder is incomplete.

    Raises:
        Damaged: its bytes are not those that were written.
        OSError: it can't be read.
    """
    data = read_many(folder, [name])[name]
    if data is None:
        return None
    sealed = _SEALED.fullmatch(data)
    if not sealed or hashlib.sha256(sealed[1]).hexdigest().encode() != sealed[2]:
        raise Damaged(folder, f"the checksum of {name} differs")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(folder, f"{name} is not JSON") from error
    return content


def write_manifest(folder: AnyPath, content: Mapping[str, Any], name: str = NAME) -> None:
    """Writes the manifest of a folder whose other files are all written. It appears at once."""
    write_file(folder / name, seal(content))


def check_files(folder: AnyPath, files: Mapping[str, str]) -> None:
    """Compares files with their hashes in a manifest.

    Args:
        folder: the folder of the manifest.
        files: SHA-256 by relative name.

    Raises:
        Damaged: a file is missing or has changed.
    """
    for name, data in read_many(folder, files).items():
        if data is None:
            raise Damaged(folder, f"{name} is missing")
        if hash_bytes(data) != files[name]:
            raise Damaged(folder, f"the checksum of {name} differs")


def verified_manifest(folder: AnyPath) -> dict[str, Any]:
    """Returns the manifest of a folder whose small files are those that were written.

    Raises:
        Damaged: they are not, or the manifest is missing.
        Fault: the machine could not read them.
    """
    with classify_errors(folder):
        found = read_manifest(folder)
        if found is None:
            raise Damaged(folder, f"{NAME} is missing, which is written last")
        check_files(folder, found["files"])
    return found


def find_damage(folder: AnyPath) -> str | None:
    """Returns how a folder's small files differ from those that were written; None if they don't.

    Raises:
        Fault: as `verified_manifest`.
    """
    try:
        verified_manifest(folder)
    except Damaged as error:
        return error.reason
    return None
