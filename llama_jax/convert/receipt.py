"""What a conversion did, tensor by tensor, and the proof that it can be undone."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax import __version__
from llama_jax.config.model import ModelConfig
from llama_jax.convert.layout import Layout, Weight
from llama_jax.convert.source import Source, read_json
from llama_jax.errors import InputError

FILE = "receipt.json"


def read_receipt(folder: Path) -> dict[str, Any]:
    """Returns the receipt in a folder that a conversion wrote.

    Raises:
        InputError: there is none, or it is damaged.
    """
    if not (folder / FILE).exists():
        raise InputError(f"{folder} has no {FILE}: only what llama-jax convert wrote has one")
    return read_json(folder / FILE)


def tensor_hash(array: np.ndarray) -> str:
    """Returns the SHA-256 of an array's bytes in order of its axes, in hexadecimal."""
    return bytes_hash(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def bytes_hash(data: bytes | memoryview) -> str:
    """Returns the SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def tensor_record(name: str, shard: int, array: np.ndarray, exact: bool = True) -> dict[str, Any]:
    """Returns a line about a tensor; the hash is of the numbers, computed or not."""
    about: dict[str, Any] = {"name": name, "shape": list(array.shape), "dtype": array.dtype.name}
    about |= ({"shard": shard} if shard else {}) | ({} if exact else {"quantized": True})
    return about | {"sha256": tensor_hash(array)}


def rotary_order(layout: Layout) -> str:
    """Names the order of the numbers that turn together."""
    return "interleaved" if layout.interleaved else "half-split"


def layout_record(layout: Layout) -> dict[str, Any]:
    """Returns what is needed to bring weights back into a layout."""
    record = dataclasses.asdict(layout)
    del record["names"]
    record["head_kept"] = record.pop("stores_tied_head")
    return record


def source_layout(receipt: Mapping[str, Any]) -> Layout:
    """Returns the layout of the source that a receipt describes: `layout_record` undone.

    Raises:
        AttributeError, KeyError or TypeError: the receipt is damaged.
    """
    record = dict(receipt["source"]["layout"].items())
    stores_tied_head = record.pop("head_kept", False)
    return Layout(receipt["source"]["names"], stores_tied_head=stores_tied_head, **record)


def make_receipt(
    source: Source,
    layout: Layout,
    config: ModelConfig,
    end_ids: Iterable[int],
    files: Mapping[str, bytes],
    weights: Sequence[dict[str, Any]],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Returns the receipt of a conversion that is not verified yet."""
    return {
        "converter": f"llama_jax {__version__}",
        "source": {
            "kind": source.kind,
            "name": source.path.resolve().name,
            "rotary": rotary_order(source.layout),
            "layout": layout_record(source.layout),
            "names": dict(source.layout.names),
        },
        "output": {"rotary": rotary_order(layout)},
        "config": dataclasses.asdict(config),
        "end_ids": sorted(end_ids),
        "files": {name: bytes_hash(data) for name, data in files.items()},
        "dropped": dict(source.dropped),
        "notes": list(notes),
        "weights": list(weights),
    }


def is_identical(record: Mapping[str, Any]) -> bool:
    """Tells whether a weight was written with the very numbers that the source holds."""
    types = {tensor["dtype"] for side in ("source", "written") for tensor in record[side]}
    return len(types) == 1 and not any("quantized" in tensor for tensor in record["source"])


def check_restores_source(
    record: Mapping[str, Any],
    layout: Layout,
    config: ModelConfig,
    weight: Weight,
    ours: np.ndarray,
) -> None:
    """Turns a weight that was read back into the source's tensors again, whose bits must be equal.

    Raises:
        InputError: they are not.
    """
    back = layout.from_ours(config, weight, ours)
    for piece, tensor in zip(back, record["source"], strict=True):
        if tensor_hash(piece) != tensor["sha256"]:
            raise InputError(
                f"{weight}: what was written does not give back the source's {tensor['name']}: the"
                " output is damaged, convert again"
            )
