"""Reading an output back, and turning it into the source's tensors again."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.convert import receipt
from llama_jax.convert.detect import open_source
from llama_jax.convert.files.tensor_file import quote
from llama_jax.convert.layout import Layout, Weight, same_bits, weights
from llama_jax.convert.source import Source
from llama_jax.convert.stream import map_in_order
from llama_jax.errors import InputError
from llama_jax.runtime.console import byte_progress
from llama_jax.runtime.process_memory import check_memory
from llama_jax.runtime.regular_file import read_regular

_KNOWN = ("name", "dtype", "sha256")


def verify(folder: Path, source: Path | None = None, *, progress: bool = True) -> dict[str, int]:
    """Proves once more that a converted folder gives back its source, and returns the counts.

    Args:
        folder: what a conversion wrote.
        source: the source, to be hashed again; default: the hashes in the receipt stand for it.
        progress: whether to show it on standard error.

    Raises:
        InputError: the folder has no receipt, it or the source is damaged, or a bit differs.
    """
    made = receipt.read_receipt(folder)
    output = open_source(folder)
    if not isinstance(made.get("files"), dict):
        raise _damaged(folder)
    here = {path.name for path in folder.iterdir() if path.is_file()}
    for name, digest in made["files"].items():
        path = folder / name
        if name not in here or receipt.bytes_hash(read_regular(path)) != digest:
            raise InputError(
                f"{folder}: {quote(name)} is not the file that the conversion wrote: convert again"
            )
    again = source and open_source(source)
    sides = [side for side in (output, again) if side]
    largest = max(side.nbytes(weight) for side in sides for weight in weights(side.config))
    check_memory(3 * largest, f"the largest weight of {folder}")
    return verify_output(made, output, again, progress=progress)


def verify_output(
    made: Mapping[str, Any],
    output: Source,
    source: Source | None,
    budget: int = 1 << 30,
    progress: bool = True,
) -> dict[str, int]:
    """Compares `output`, as read back, with the receipt `made`, and with `source` where given.

    Returns:
        identical: weights turned back into the source's very bits; converted: those that equal
        the source's after the change of type (to int8 too) or from quantized blocks.

    Raises:
        InputError: something differs.
    """
    try:
        config = ModelConfig(**made["config"])
        layout = receipt.source_layout(made)
        records = {record["weight"]: record for record in made["weights"]}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(output.path) from error
    # Meta's format doesn't tell the context, and a tied head only by two equal matrices.
    untold = {"context", "tied_head"} if output.kind == "meta" else set()
    different = [name for name in config.differences(output.config) if name not in untold]
    if different:
        raise InputError(
            f"{output.path}: {different[0]} is not what the receipt says: convert again"
        )
    output = replace(output, config=config)
    order = list(weights(config))
    if records.keys() != {str(weight) for weight in order}:
        raise InputError(f"{output.path / receipt.FILE} tells of other weights: convert again")
    if not _is_whole(records, layout, output, order):
        raise _damaged(output.path)

    def check(weight: Weight) -> tuple[int, bool]:
        record = records[str(weight)]
        read = [tensor.read() for tensor in output.stored_tensors(weight)]
        kept = receipt.is_identical(record)
        if kept:
            ours = output.layout.to_ours(config, weight, read)
            receipt.check_restores_source(record, layout, config, weight, ours)
        else:
            _check_written(record, read)
        if source:
            _check_source(source, record, weight, output, None if kept else read)
        return sum(array.nbytes for array in read), kept

    def cost(weight: Weight) -> int:
        return 3 * output.nbytes(weight)

    identical = 0
    total = sum(output.nbytes(weight) for weight in order)
    with byte_progress("proving   ", total, progress) as advance:
        for nbytes, kept in map_in_order(order, check, cost, budget):
            identical += kept
            advance(nbytes)
    return {"identical": identical, "converted": len(order) - identical}


def _damaged(folder: Path) -> InputError:
    return InputError(f"{folder / receipt.FILE} is damaged: convert again")


def _is_whole(
    records: Mapping[str, Any], layout: Layout, output: Source, order: Sequence[Weight]
) -> bool:
    """Tells whether a receipt has a line for each tensor of the source and of the output."""
    try:
        if layout.shards != len(records["norm"]["source"]):
            return False
        for weight in order:
            read, written = (records[str(weight)][side] for side in ("source", "written"))
            shapes = [shape for _, _, shape in layout.tensor_specs(output.config, weight)]
            known = [isinstance(t[k], str) for t in read + written for k in _KNOWN]
            if [tuple(tensor["shape"]) for tensor in read] != shapes or not all(known):
                return False
            if len(written) != len(output.stored_tensors(weight)):
                return False
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return False
    return True


def _check_written(record: Mapping[str, Any], read: list[np.ndarray]) -> None:
    for array, tensor in zip(read, record["written"], strict=True):
        if receipt.tensor_hash(array) != tensor["sha256"]:
            raise InputError(f"{tensor['name']} is not what the conversion wrote: convert again")


def _check_source(
    source: Source,
    record: Mapping[str, Any],
    weight: Weight,
    output: Source,
    written: list[np.ndarray] | None,
) -> None:
    """Compares the source with its hashes in the receipt, and with what was made from it."""
    read = [tensor.read() for tensor in source.stored_tensors(weight)]
    for array, tensor in zip(read, record["source"], strict=True):
        if receipt.tensor_hash(array) != tensor["sha256"]:
            raise InputError(
                f"{source.path}: {tensor['name']} is not the tensor that was converted: it has"
                " changed, or is of another model"
            )
    if written is None:
        return
    again = source.layout.to_ours(source.config, weight, read)
    kept = output.config.param_dtype if output.layout.quantized else written[0].dtype
    with np.errstate(over="ignore"):
        again = again.astype(jnp.dtype(kept))
    made = output.layout.from_ours(output.config, weight, again)
    if not all(map(same_bits, made, written)):
        raise InputError(f"{weight}: what was written is not the source's: convert again")
