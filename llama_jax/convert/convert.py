"""Converts a checkpoint: open the source, plan, stream the weights, write, verify, write a receipt.

Weights are converted one at a time on each core, in order, within a memory budget.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self

import numpy as np

from llama_jax.checkpoint.model_folders import manifest_of
from llama_jax.convert import receipt
from llama_jax.convert.conversion_plan import (
    ConversionPlan,
    OutputFormat,
    conversion_bytes,
    make_plan,
)
from llama_jax.convert.detect import open_source
from llama_jax.convert.formats import huggingface, meta, model_folder
from llama_jax.convert.layout import Weight
from llama_jax.convert.lora_folder import quantization_note
from llama_jax.convert.merge import merge_pair, pair_of
from llama_jax.convert.peft_export import export_peft
from llama_jax.convert.row_major import row_major
from llama_jax.convert.sanity_checks import sanity_warnings
from llama_jax.convert.stream import local_files, map_within_budget, sync_in_background
from llama_jax.convert.tokenizer_files import collect_tokenizer_files
from llama_jax.convert.verify import verify_output
from llama_jax.errors import InputError
from llama_jax.runtime.atomic_write import check_absent, new_folder
from llama_jax.runtime.console import byte_progress
from llama_jax.runtime.manifest import write_manifest
from llama_jax.runtime.process_memory import peak_resident
from llama_jax.runtime.storage import AnyPath, parse_path, write_many


@dataclass(frozen=True)
class ConversionResult:
    """The output folder of a conversion, its warnings and its statistics."""

    folder: AnyPath
    notes: tuple[str, ...]  # warnings about the checkpoint
    bytes_written: int
    peak: int  # peak resident memory [bytes]
    # Weights (peft: matrices) from which the source's bits were restored; 0 if not verified yet.
    identical: int = 0
    converted: int = 0  # weights that equal the source's after a change of type (int8 included)
    merged: int = 0  # weights that equal the source's with their low-rank pairs merged


def convert(
    path: str | AnyPath,
    folder: str | AnyPath,
    *,
    to: OutputFormat = "orbax",
    dtype: str | None = None,
    max_ram: int | None = None,
    model: str | None = None,
    tokenizer: str | AnyPath | None = None,
    shards: int = 1,
    mesh: Mapping[str, int] | None = None,
    quantize: Literal["int8"] | None = None,
    lora: str | AnyPath | None = None,
    verify_later: bool = False,
    progress: bool = True,
) -> ConversionResult:
    """Converts the checkpoint at `path` into a new folder and verifies the output.

    >>> done = lj.convert_checkpoint("models/tiny", "export", to="hf", progress=False)
    >>> done.identical  # weights whose bits were restored from the output
    21
    >>> done.notes
    ()

    The folder appears once it is complete and, without `verify_later`, verified; or not at all.

    Args:
        path: a checkpoint of any format that `detect.open_source` knows.
        folder: the folder to create.
        to: format of the folder; `peft` is for the low-rank pairs of a LoRA run.
        dtype: float32, bfloat16 or float16; default: as stored, and float32 for quantized weights.
        max_ram: upper bound of the process's memory [bytes]; default: three times the largest
            weight plus 1 GiB (or plus the memory that the process already uses, if larger), but at
            most the memory that the machine or the container has left.
        model: member of the family whose shape replaces the checkpoint's own configuration.
        tokenizer: file or folder of the tokenizer; default: the checkpoint's own.
        shards: number of files of a Meta folder.
        mesh: sizes of mesh axes by which the arrays of an Orbax folder are chunked; default: none.
        quantize: stores matrices as int8 with float32 scales, computed from their values in
            `dtype`; norms stay as they are. For Orbax folders only.
        lora: LoRA run or PEFT folder whose low-rank pairs are merged into the weights, in float32;
            default: none, or those of `path` if it is a LoRA run.
        verify_later: skips the verification, which reads the output back: call `verify` later.
        progress: whether to show progress bars on standard error.

    Raises:
        InputError: the checkpoint is damaged, incomplete, an int8 folder of llama_jax or not a
            LLaMA; it doesn't fit into memory or into the format; or the folder already exists.
        Fault: the system can't write the folder.
    """
    folder = parse_path(folder)
    check_absent(folder)
    if to == "peft":
        if dtype or max_ram or model or mesh or quantize or lora or shards != 1 or verify_later:
            raise InputError(
                "--to peft writes the low-rank pairs of SRC as they are: use no other option than"
                " --tokenizer with it"
            )
        n, size, found = export_peft(parse_path(path), folder, tokenizer)
        return ConversionResult(folder, tuple(found), size, peak_resident(), identical=n)
    source = open_source(parse_path(path), model, None if lora is None else parse_path(lora))
    plan = make_plan(source, to, dtype, quantize, shards, max_ram)
    extra, counts = collect_tokenizer_files(source, plan.config, to, tokenizer), dict[str, int]()
    notes = [*sanity_warnings(plan.config, extra.tokenizer), *extra.notes]
    notes += quantization_note(source.pairs, source.config) if source.pairs else []
    with (
        new_folder(folder) as new,
        local_files(new, needed=to != "orbax") as partial_folder,
        sync_in_background(partial_folder),
    ):
        with _open_writer(partial_folder, plan, to, mesh or {}) as writer:
            records, weight_notes = _stream_weights(plan, writer, progress)
        notes += weight_notes
        files = {**writer.files, **extra.files}
        write_many(partial_folder, extra.files)
        sums = writer.sums if isinstance(writer, model_folder.ModelFolderWriter) else None
        if sums is not None:
            write_manifest(partial_folder, manifest_of(plan.config, files, sums))
        report = receipt.make_receipt(
            source, plan.layout, plan.config, extra.end_ids, extra.files, records, notes
        )
        report["verified"] = None
        if not verify_later:
            # The hashes in the receipt prove identical weights; others are converted once more.
            compared = None if all(receipt.is_identical(record) for record in records) else source
            output = open_source(partial_folder)
            counts = verify_output(report, output, compared, plan.memory_budget, progress)
            report["verified"] = counts
        files[receipt.FILE] = json.dumps(report, indent=1).encode()
        write_many(partial_folder, {receipt.FILE: files[receipt.FILE]})
        if sums is not None:  # now with the receipt
            write_manifest(partial_folder, manifest_of(plan.config, files, sums))
    return ConversionResult(folder, tuple(notes), plan.output_bytes(), peak_resident(), **counts)


# The stream of weights.


class CheckpointWriter(Protocol):
    """Writes the tensors of one format into a folder.

    Attributes:
        files: the small files that it has written and a manifest must cover, by relative name.
    """

    files: dict[str, bytes]

    def write(self, tensors: Any) -> None:
        """Writes tensors, given as (shard, name, array)."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> None:
        """Completes the files, or removes them after an error."""


def _open_writer(
    folder: AnyPath, plan: ConversionPlan, to: OutputFormat, mesh: Mapping[str, int]
) -> CheckpointWriter:
    if to == "orbax":
        return model_folder.ModelFolderWriter(folder, plan.config, plan.dtypes, mesh)
    assert isinstance(folder, Path)  # as `local_files` yields it
    writer = meta.MetaWriter if to == "meta" else huggingface.HuggingFaceWriter
    return writer(folder, plan.config, plan.layout, plan.dtypes)


def _stream_weights(
    plan: ConversionPlan, writer: CheckpointWriter, progress: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """Converts and writes all weights; returns their records for the receipt, and warnings."""
    records, notes = list[dict[str, Any]](), list[str]()
    work = partial(_convert_weight, plan)
    cost = partial(conversion_bytes, plan.source, plan.dtypes)
    with byte_progress("converting", plan.output_bytes(), progress) as advance:
        for converted in map_within_budget(plan.dtypes, work, cost, plan.memory_budget):
            writer.write(converted.tensors)
            records.append(converted.record)
            notes += [converted.note] if converted.note else []
            advance(sum(array.nbytes for _, _, array in converted.tensors))
    return records, notes


class ConvertedWeight(NamedTuple):
    """A weight in the output's layout and type, with its record for the receipt."""

    tensors: list[tuple[int, str, np.ndarray]]  # (shard, name, array)
    record: dict[str, Any]
    note: str | None  # a warning about the values


def _convert_weight(plan: ConversionPlan, weight: Weight) -> ConvertedWeight:
    """Reads a weight and converts it to the layout and type of the output.

    Raises:
        InputError: the tensors of the source contradict each other, or can't be quantized.
    """
    source, config, dtype = plan.source, plan.source.config, plan.dtypes[weight]
    stored = source.stored_tensors(weight)
    read = [tensor.read() for tensor in stored]
    specs = source.layout.tensor_specs(config, weight)
    source_records = [
        receipt.hashed_record(name, shard, array, tensor.exact)
        for (shard, name, _), tensor, array in zip(specs, stored, read, strict=True)
    ]
    ours = source.layout.to_ours(config, weight, read)
    pair = pair_of(source.pairs, weight)
    if source.pairs and pair:
        ours = merge_pair(ours, pair, source.pairs.lora.scale)
    note = None
    if not _is_finite(ours):
        note = f"{weight} contains NaN or infinity: a model with this weight is unusable"
        if plan.layout.quantized:
            raise InputError(f"{note}, and int8 can't represent it: correct the checkpoint")
    if ours.dtype != dtype:
        with np.errstate(over="ignore"):
            ours = ours.astype(dtype)
        if note is None and not _is_finite(ours):
            note = f"{weight} contains numbers too large for {dtype.name}: they became infinite"
    arrays = plan.layout.from_ours(config, weight, ours)
    specs = plan.layout.tensor_specs(config, weight)
    tensors = [
        (shard, name, row_major(array))
        for (shard, name, _), array in zip(specs, arrays, strict=True)
    ]
    record = {
        "weight": str(weight),
        "source": source_records,
        "written": [receipt.tensor_record(name, shard, array) for shard, name, array in tensors],
    }
    record |= {"pair": receipt.pair_records(weight, pair)} if pair else {}
    if not receipt.is_identical(record):  # else the hashes of the source prove the output
        for tensor, (_, _, array) in zip(record["written"], tensors, strict=True):
            tensor["blake3"] = receipt.tensor_hash(array)
    return ConvertedWeight(tensors, record, note)


def _is_finite(array: np.ndarray) -> bool:
    """Returns whether no element is NaN or infinity: whether no exponent has all its bits set."""
    flat = array.ravel(order="K")  # no copy of a transposed matrix
    bits = flat.view(np.dtype(f"u{array.dtype.itemsize}"))
    exponent = np.array(np.inf, array.dtype).view(bits.dtype)
    chunk = 1 << 20  # elements at a time, for temporary arrays that fit a cache
    return not any(
        np.any((bits[i : i + chunk] & exponent) == exponent) for i in range(0, len(bits), chunk)
    )
