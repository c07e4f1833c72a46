"""The receipt of a conversion: names, shapes, types and hashes of the tensors on both sides.

The written tensors of an identical weight have no hash: those of the source prove it.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from llama_jax import __version__
from llama_jax.config.model import ModelConfig
from llama_jax.convert.layout import Layout, Weight
from llama_jax.convert.row_major import row_major_blocks
from llama_jax.convert.source import Source, read_json
from llama_jax.errors import InputError
from llama_jax.runtime.manifest import hash_bytes
from llama_jax.runtime.storage import AnyPath

if TYPE_CHECKING:  # it imports JAX, which `llama-jax info` does not need
    from llama_jax.checkpoint.lora_pairs import Pair, StoredPairs

FILE = "receipt.json"


def read_receipt(folder: AnyPath) -> dict[str, Any]:
    """Returns the receipt in a folder that a conversion wrote.

    Raises:
        InputError: there is no receipt, or it is damaged.
    """
    if not (folder / FILE).exists():
        raise InputError(
            f"{folder} has no {FILE}: give a folder that `llama-jax convert` has written"
        )
    return read_json(folder / FILE)


def damaged_receipt(folder: AnyPath) -> InputError:
    """Returns the error about the receipt in a folder that lacks a field or has a wrong one."""
    return InputError(f"{folder / FILE} is damaged: convert again")


def tensor_hash(array: np.ndarray) -> str:
    """Returns the BLAKE3 hash of an array's bytes in row-major order, in hexadecimal.

    It is a cryptographic hash like SHA-256, and 2.6 times as fast.
    """
    digest = blake3()
    for block in row_major_blocks(array):
        digest.update(block.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def tensor_record(name: str, shard: int, array: np.ndarray, exact: bool = True) -> dict[str, Any]:
    """Returns the record of a tensor: its name, shape, type and shard.

    Args:
        name: its name in the file.
        shard: the index of its file.
        array: its numbers.
        exact: whether they are stored in the file; False if computed from quantized blocks.
    """
    record: dict[str, Any] = {"name": name, "shape": list(array.shape), "dtype": array.dtype.name}
    return record | ({"shard": shard} if shard else {}) | ({} if exact else {"quantized": True})


def hashed_record(name: str, shard: int, array: np.ndarray, exact: bool = True) -> dict[str, Any]:
    """Returns `tensor_record` with the tensor's hash."""
    return tensor_record(name, shard, array, exact) | {"blake3": tensor_hash(array)}


def rotary_order(layout: Layout) -> str:
    """Returns the name of a layout's order of rotary pairs."""
    return "interleaved" if layout.interleaved else "half-split"


def layout_record(layout: Layout) -> dict[str, Any]:
    """Returns the fields of a layout, with which `source_layout` restores it."""
    record = dataclasses.asdict(layout)
    del record["names"]
    record["head_kept"] = record.pop("stores_tied_head")
    return record


def source_layout(receipt: Mapping[str, Any]) -> Layout:
    """Returns the layout of the source that a receipt describes: `layout_record` inverted.

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
    """Returns the receipt of a conversion, without the result of its verification.

    Args:
        source: the source.
        layout: layout of the output.
        config: configuration of the output.
        end_ids: tokens that end a text.
        files: the small files of the output by name.
        weights: for each weight its name and the records of its tensors in source and output.
        notes: warnings.
    """
    return {
        "converter": f"llama_jax {__version__}",
        "source": {
            "kind": source.kind,
            "name": source.path.resolve().name,
            "rotary": rotary_order(source.layout),
            "layout": layout_record(source.layout),
            "names": dict(source.layout.names),
        },
        **({"lora": pairs_record(source.pairs)} if source.pairs else {}),
        "output": {"rotary": rotary_order(layout)},
        "config": dataclasses.asdict(config),
        "end_ids": sorted(end_ids),
        "files": {name: hash_bytes(data) for name, data in files.items()},
        "dropped": dict(source.dropped),
        "notes": list(notes),
        "weights": list(weights),
    }


def is_identical(record: Mapping[str, Any]) -> bool:
    """Returns whether a weight was written with exactly the numbers stored in the source."""
    if is_merged(record):
        return False
    types = {tensor["dtype"] for side in ("source", "written") for tensor in record[side]}
    return len(types) == 1 and not any("quantized" in tensor for tensor in record["source"])


def is_merged(record: Mapping[str, Any]) -> bool:
    """Returns whether a weight was written with a low-rank pair merged into it."""
    return "pair" in record


def pairs_record(pairs: "StoredPairs") -> dict[str, Any]:
    """Returns the fields that describe the low-rank pairs of a folder."""
    lora = dataclasses.asdict(pairs.lora)
    name = pairs.folder.resolve().name
    return {"name": name, "base": pairs.base, **lora, "scale": pairs.lora.scale}


def pair_records(weight: Weight, pair: "Pair") -> list[dict[str, Any]]:
    """Returns the records of a weight's low-rank pair, in our axes."""
    return [hashed_record(f"{weight}.{side}", 0, getattr(pair, side)) for side in ("a", "b")]


def check_restores_source(
    record: Mapping[str, Any],
    layout: Layout,
    config: ModelConfig,
    weight: Weight,
    ours: np.ndarray,
) -> None:
    """Checks that a weight, as read from the output, restores the bits of the source's tensors.

    Args:
        record: the weight's record in the receipt.
        layout: layout of the source.
        config: configuration of the model.
        weight: the weight.
        ours: its numbers, as read from the output, in our layout.

    Raises:
        InputError: a tensor differs from the source's.
    """
    restored = layout.from_ours(config, weight, ours)
    for array, tensor in zip(restored, record["source"], strict=True):
        if tensor_hash(array) != tensor["blake3"]:
            raise InputError(
                f"{weight}: the output does not restore the source's {tensor['name']}: it is"
                " damaged, convert again"
            )
