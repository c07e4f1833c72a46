"""Verifies a conversion: reads the output and restores the source's tensors from it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.convert import receipt
from llama_jax.convert.detect import open_source
from llama_jax.convert.files.tensor_file import quote
from llama_jax.convert.formats.peft import is_peft_folder
from llama_jax.convert.layout import Layout, Weight, element_scales, same_bits, weights
from llama_jax.convert.merge import check_merged, pair_of
from llama_jax.convert.peft_export import verify_pairs
from llama_jax.convert.source import Source
from llama_jax.convert.stream import map_within_budget
from llama_jax.errors import InputError
from llama_jax.runtime.console import byte_progress
from llama_jax.runtime.manifest import hash_bytes
from llama_jax.runtime.process_memory import check_memory
from llama_jax.runtime.storage import AnyPath, read_file

_COPIES = 3  # copies of a weight in memory at once: as read, in our layout, as restored


def verify(
    folder: AnyPath,
    source: AnyPath | None = None,
    *,
    lora: AnyPath | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """Verifies again that a converted folder restores its source; returns `verify_output`'s counts.

    Args:
        folder: the output of a conversion.
        source: the source, to be hashed again; default: only the hashes in the receipt are used.
        lora: the LoRA run or PEFT folder that was merged into the source; default: as `convert`.
        progress: whether to show a progress bar on standard error.

    Raises:
        InputError: the folder has no receipt, the folder or the source is damaged, or a bit
            differs.
    """
    report = receipt.read_receipt(folder)
    if not isinstance(report.get("files"), dict):
        raise receipt.damaged_receipt(folder)
    present = {path.name for path in folder.iterdir() if path.is_file()}
    for name, digest in report["files"].items():
        path = folder / name
        if name not in present or hash_bytes(read_file(path)) != digest:
            raise InputError(
                f"{folder}: {quote(name)} is not the file that the conversion wrote: convert again"
            )
    if is_peft_folder(folder):
        return verify_pairs(report, folder, source)
    output = open_source(folder)
    compared = source and open_source(source, lora=lora)
    sides = [side for side in (output, compared) if side]
    largest = max(side.nbytes(weight) for side in sides for weight in weights(side.config))
    check_memory(_COPIES * largest, f"the largest weight of {folder}")
    return verify_output(report, output, compared, progress=progress)


def verify_output(
    report: Mapping[str, Any],
    output: Source,
    source: Source | None,
    budget: int = 1 << 30,
    progress: bool = True,
) -> dict[str, int]:
    """Compares the output with its receipt, and with the source if given.

    Args:
        report: the receipt.
        output: the output, as read from its folder.
        source: the source; None: only the receipt's hashes are compared.
        budget: tensors in memory at once [bytes].
        progress: whether to show a progress bar on standard error.

    Returns:
        identical: the number of weights from which the source's bits were restored; converted: the
        number of weights that equal the source's after a change of type (int8 included), or that
        were computed from quantized blocks. merged, if there are any: the number of weights that
        equal the source's with their low-rank pairs merged.

    Raises:
        InputError: the output or the source differs from the receipt, or the receipt is damaged.
    """
    try:
        config = ModelConfig(**report["config"])
        layout = receipt.source_layout(report)
        records = {record["weight"]: record for record in report["weights"]}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise receipt.damaged_receipt(output.path) from error
    # Meta's format doesn't store the context, and a tied head only as two equal matrices.
    unstored = {"context", "tied_head"} if output.kind == "meta" else set()
    different = [name for name in config.differences(output.config) if name not in unstored]
    if different:
        raise InputError(f"{output.path}: {different[0]} differs from the receipt's: convert again")
    output = replace(output, config=config)
    order = list(weights(config))
    if records.keys() != {str(weight) for weight in order}:
        raise InputError(
            f"{output.path / receipt.FILE} lists other weights than the model's: convert again"
        )
    if not _is_complete(records, layout, output, order):
        raise receipt.damaged_receipt(output.path)

    def check(weight: Weight) -> tuple[int, bool]:
        record = records[str(weight)]
        read = [tensor.read() for tensor in output.stored_tensors(weight)]
        identical = receipt.is_identical(record)
        if identical:
            ours = output.layout.to_ours(config, weight, read)
            receipt.check_restores_source(record, layout, config, weight, ours)
        else:
            _check_written(record, read)
        if source:
            _check_source(source, record, weight, output, None if identical else read)
        return sum(array.nbytes for array in read), identical

    def cost(weight: Weight) -> int:
        return _COPIES * output.nbytes(weight)

    identical = 0
    total = sum(output.nbytes(weight) for weight in order)
    with byte_progress("verifying ", total, progress) as advance:
        for nbytes, is_identical in map_within_budget(order, check, cost, budget):
            identical += is_identical
            advance(nbytes)
    merged = sum(map(receipt.is_merged, records.values()))
    counts = {"identical": identical, "converted": len(order) - identical - merged}
    return counts | ({"merged": merged} if merged else {})


def _is_complete(
    records: Mapping[str, Any], layout: Layout, output: Source, order: Sequence[Weight]
) -> bool:
    """Returns whether a receipt has a record of each tensor of the source and of the output."""
    try:
        if layout.shards != len(records["norm"]["source"]):
            return False
        for weight in order:
            read, written = (records[str(weight)][side] for side in ("source", "written"))
            shapes = [shape for _, _, shape in layout.tensor_specs(output.config, weight)]
            pair = records[str(weight)].get("pair", [])
            hashed = read + pair + ([] if receipt.is_identical(records[str(weight)]) else written)
            valid = [isinstance(t["blake3"], str) for t in hashed]
            valid += [isinstance(t[key], str) for t in read + written for key in ("name", "dtype")]
            if [tuple(tensor["shape"]) for tensor in read] != shapes or not all(valid):
                return False
            if len(written) != len(output.stored_tensors(weight)):
                return False
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return False
    return True


def _check_written(record: Mapping[str, Any], read: list[np.ndarray]) -> None:
    """Compares the output's tensors with their hashes in the receipt.

    Raises:
        InputError: a tensor differs.
    """
    for array, tensor in zip(read, record["written"], strict=True):
        if receipt.tensor_hash(array) != tensor["blake3"]:
            raise InputError(
                f"{tensor['name']} is not the tensor that the conversion wrote: convert again"
            )


def _check_source(
    source: Source,
    record: Mapping[str, Any],
    weight: Weight,
    output: Source,
    written: list[np.ndarray] | None,
) -> None:
    """Compares a weight of the source with its hashes in the receipt, and converts it again.

    Args:
        source: the source.
        record: the weight's record in the receipt.
        weight: the weight.
        output: the output.
        written: the output's tensors, which a second conversion must reproduce; None: not
            compared.

    Raises:
        InputError: a tensor differs.
    """
    read = [tensor.read() for tensor in source.stored_tensors(weight)]
    if len(read) != len(record["source"]):  # a model folder's has one tensor, Meta's one per shard
        raise InputError(
            f"{source.path} is not what was converted (tensors of {weight}: {len(read)} instead of"
            f" {len(record['source'])}): give the source of the conversion"
        )
    for array, tensor in zip(read, record["source"], strict=True):
        if receipt.tensor_hash(array) != tensor["blake3"]:
            raise InputError(
                f"{source.path}: {tensor['name']} is not the tensor that was converted: it has"
                " changed or is of another model, give the source of the conversion"
            )
    pair = pair_of(source.pairs, weight)
    if (receipt.pair_records(weight, pair) if pair else None) != record.get("pair"):
        raise InputError(
            f"{weight} was not merged with this low-rank pair: give the LoRA run or, with --lora,"
            " the folder of the conversion"
        )
    if written is None:
        return
    ours = source.layout.to_ours(source.config, weight, read)
    quantized = output.layout.quantized
    dtype = jnp.dtype(output.config.param_dtype if quantized else written[0].dtype)
    if source.pairs and pair:
        stored = output.layout.to_ours(output.config, weight, written)
        step = element_scales(weight, written[1]) if quantized else 0.0
        check_merged(weight, stored, ours, pair, source.pairs.lora.scale, dtype, step)
        return
    with np.errstate(over="ignore"):
        ours = ours.astype(dtype)
    expected = output.layout.from_ours(output.config, weight, ours)
    if not all(map(same_bits, expected, written)):
        raise InputError(f"{weight}: the output differs from the source: convert again")
