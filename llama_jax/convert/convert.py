"""Converting a checkpoint: read, turn, write and prove, one weight at a time."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self

import jax.numpy as jnp
import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.convert import receipt
from llama_jax.convert.detect import open_source
from llama_jax.convert.formats import huggingface, meta, model_folder
from llama_jax.convert.layout import AXES, Layout, Weight, weights
from llama_jax.convert.sanity_checks import sanity_warnings
from llama_jax.convert.source import Source
from llama_jax.convert.stream import map_in_order, sync_in_background
from llama_jax.convert.tokenizer_files import collect_tokenizer_files
from llama_jax.convert.verify import verify_output
from llama_jax.errors import InputError
from llama_jax.parallel.sharding import MESH_AXES
from llama_jax.runtime.atomic_write import check_absent, new_folder
from llama_jax.runtime.console import byte_progress
from llama_jax.runtime.process_memory import available_memory, check_memory, peak_resident, resident

OutputFormat = Literal["orbax", "hf", "meta"]
GIB = 1 << 30
_SLACK = 64 << 20  # small things that come and go
_COPIES = 3  # of a weight in memory at once: as read, as turned, as written


class CheckpointWriter(Protocol):
    """Writes the tensors of one format into a folder."""

    def write(self, pieces: Any) -> None:
        """Writes (shard, name, tensor)s."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> None:
        """Completes the files, or takes them away after an error."""


class ConvertedWeight(NamedTuple):
    """A weight on its way: what to write and what to remember."""

    weight: Weight
    pieces: list[tuple[int, str, np.ndarray]]
    record: dict[str, Any]
    note: str | None


def _turn(
    source: Source, layout: Layout, dtypes: Mapping[Weight, np.dtype], weight: Weight
) -> ConvertedWeight:
    """Reads a weight and brings it into the layout and type that are wanted."""
    config = source.config
    stored = source.stored_tensors(weight)
    read = [tensor.read() for tensor in stored]
    names = source.layout.tensor_specs(config, weight)
    had = [
        receipt.tensor_record(name, shard, array, tensor.exact)
        for (shard, name, _), tensor, array in zip(names, stored, read, strict=True)
    ]
    ours = source.layout.to_ours(config, weight, read)
    del read
    note = _not_finite(weight, ours)
    if note and layout.quantized:
        raise InputError(f"{note}; such numbers can't be quantized: correct the checkpoint")
    if ours.dtype != dtypes[weight]:
        with np.errstate(over="ignore"):
            ours = ours.astype(dtypes[weight])
        if not note and _not_finite(weight, ours):
            note = f"{weight} holds numbers too large for {ours.dtype.name}: they became infinite"
    made = layout.from_ours(config, weight, ours)
    pieces = [
        (shard, name, array)
        for (shard, name, _), array in zip(layout.tensor_specs(config, weight), made, strict=True)
    ]
    wrote = [receipt.tensor_record(name, shard, a) for shard, name, a in pieces]
    return ConvertedWeight(
        weight, pieces, {"weight": str(weight), "source": had, "written": wrote}, note
    )


def _not_finite(weight: Weight, array: np.ndarray) -> str | None:
    """Returns a note if the weight holds NaN or infinity."""
    flat = array.reshape(-1)
    bits = flat.view(np.dtype(f"u{array.dtype.itemsize}"))
    exponent = np.array(np.inf, array.dtype).view(bits.dtype)
    for i in range(0, len(bits), 1 << 20):
        bad = int(np.count_nonzero((bits[i : i + (1 << 20)] & exponent) == exponent))
        if bad:
            return f"{weight} holds NaN or infinity: a model with it computes nothing of use"
    return None


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion came to."""

    folder: Path
    notes: tuple[str, ...]  # what looks wrong
    bytes_written: int
    identical: int  # weights that were turned back into the source's very bits
    converted: int  # weights that were compared after a change of type (int8 is one)
    peak: int  # most memory held [bytes]


def convert(
    path: str | Path,
    folder: str | Path,
    *,
    to: OutputFormat = "orbax",
    dtype: str | None = None,
    max_ram: int | None = None,
    model: str | None = None,
    tokenizer: str | Path | None = None,
    shards: int = 1,
    mesh: Mapping[str, int] | None = None,
    quantize: Literal["int8"] | None = None,
    progress: bool = True,
) -> ConversionResult:
    """Converts the checkpoint at `path` into a new folder, and proves it by turning it back.

    >>> done = lj.convert_checkpoint("models/tiny", "export", to="hf", progress=False)
    >>> done.identical  # weights whose bits came back
    21
    >>> done.notes
    ()

    The folder appears when it is whole and proven, or not at all.

    Args:
        path: a checkpoint of any format that `detect.open_source` knows.
        folder: to be made.
        to: format of the folder.
        dtype: float32, bfloat16 or float16; default: as stored, and float32 for quantized weights.
        max_ram: most memory to hold [bytes]; default: three times the largest tensor, and 1 GiB
            (or what the process holds already, if that is more), but no more than the machine or
            the container has.
        model: member of the family, where the checkpoint's own configuration is not to be followed.
        tokenizer: file or folder of the tokenizer; default: the checkpoint's own.
        shards: files of a Meta folder.
        mesh: sizes of a mesh's axes, along which an Orbax folder's chunks are cut; default: none.
        quantize: matrices become int8 with float32 scales, from their numbers in `dtype`; the norms
            stay. For an Orbax folder alone.
        progress: whether to show it on standard error.

    Raises:
        InputError: the checkpoint is damaged, incomplete, our own int8 or not a LLaMA, it doesn't
            fit into the memory or the format, or the folder is there already.
        Fault: the system can't write the folder.
    """
    folder = Path(folder)
    check_absent(folder)
    source = open_source(Path(path), model)
    if source.layout.quantized:
        raise InputError(
            f"{path} is int8, which gives back no other format: convert the checkpoint that it was"
            " made from"
        )
    if quantize and to != "orbax":
        raise InputError(f"--quantize {quantize} is for --to orbax: leave one of the two out")
    # What is quantized on load has one type too, which gives the same bits.
    of_all = source.dtype(Weight("wq", 0)).name if quantize else None
    dtypes = _dtypes(source, to, dtype or of_all)
    config = _written_config(source.config, dtypes, dtype, quantize)
    layout = _layout(config, to, shards)
    budget = _budget(source, dtypes, max_ram)
    extra = collect_tokenizer_files(source, config, to, tokenizer)
    with new_folder(folder) as partial_folder, sync_in_background(partial_folder):
        writer = _writer(partial_folder, config, layout, dtypes, to, mesh or {})
        records = list[dict[str, Any]]()
        notes = [*sanity_warnings(config, extra.tokenizer), *extra.notes]
        total = sum(layout.nbytes(config, weight, kept) for weight, kept in dtypes.items())
        turn = partial(_turn, source, layout, dtypes)
        cost = partial(_cost, source, dtypes)
        with writer, byte_progress("converting", total, progress) as advance:
            for turned in map_in_order(dtypes, turn, cost, budget):
                writer.write(turned.pieces)
                records.append(turned.record)
                notes += [turned.note] if turned.note else []
                advance(sum(array.nbytes for _, _, array in turned.pieces))
        for name, data in extra.files.items():
            (partial_folder / name).write_bytes(data)
        made = receipt.make_receipt(
            source, layout, config, extra.end_ids, extra.files, records, notes
        )
        again = None if all(receipt.is_identical(r) for r in records) else source
        output = open_source(partial_folder)
        made["verified"] = verify_output(made, output, again, budget, progress)
        (partial_folder / receipt.FILE).write_text(json.dumps(made, indent=1))
    return ConversionResult(folder, tuple(notes), total, **made["verified"], peak=peak_resident())


def _dtypes(source: Source, to: OutputFormat, dtype: str | None) -> dict[Weight, np.dtype]:
    """Returns the type that each weight is to be written in."""
    own = {weight: source.dtype(weight) for weight in weights(source.config)}
    if dtype is not None:
        return dict.fromkeys(own, jnp.dtype(dtype))
    if to != "orbax":
        return own
    # Layers are stacked there, so a weight has one type: one that holds the numbers of all layers.
    by_name: dict[str, set[np.dtype]] = {}
    for weight, kept in own.items():
        by_name.setdefault(weight.name, set()).add(kept)
    wide = {name: jnp.result_type(*kept) for name, kept in by_name.items()}
    return {weight: wide[weight.name] for weight in own}


def _written_config(
    config: ModelConfig,
    dtypes: Mapping[Weight, np.dtype],
    dtype: str | None,
    quantize: Literal["int8"] | None,
) -> ModelConfig:
    kept = dtypes[Weight("wq", 0)].name
    config = replace(config, quantized=quantize or "none")
    if dtype is None:
        return replace(config, param_dtype=kept)
    return replace(config, param_dtype=kept, dtype="float32" if kept == "float32" else "bfloat16")


def _layout(config: ModelConfig, to: OutputFormat, shards: int) -> Layout:
    if to == "meta":
        return meta.writer_layout(config, shards)
    if shards != 1:
        raise InputError(
            f"--shards is for --to meta; --to {to} cuts its files by itself: leave it out"
        )
    return model_folder.layout(config) if to == "orbax" else Layout(huggingface.NAMES)


def _writer(
    folder: Path,
    config: ModelConfig,
    layout: Layout,
    dtypes: Mapping[Weight, np.dtype],
    to: OutputFormat,
    mesh: Mapping[str, int],
) -> CheckpointWriter:
    if to == "orbax":
        return model_folder.ModelFolderWriter(folder, config, dtypes, mesh)
    make = meta.MetaWriter if to == "meta" else huggingface.HuggingFaceWriter
    return make(folder, config, layout, dtypes)


def _nbytes(config: ModelConfig, weight: Weight, dtypes: Mapping[Weight, np.dtype]) -> int:
    return math.prod(config.shape(AXES[weight.name].ours)) * dtypes[weight].itemsize


def _cost(source: Source, dtypes: Mapping[Weight, np.dtype], weight: Weight) -> int:
    read = _nbytes(source.config, weight, {weight: source.dtype(weight)})
    return _COPIES * max(read, _nbytes(source.config, weight, dtypes))


def _budget(source: Source, dtypes: Mapping[Weight, np.dtype], max_ram: int | None) -> int:
    """Returns how many bytes of tensors may be held at once.

    Raises:
        InputError: not even the largest weight fits.
    """
    largest = max(_cost(source, dtypes, weight) for weight in dtypes)
    base = resident() + _SLACK
    if max_ram is None:
        check_memory(largest + _SLACK, "the largest weight, while it is converted,")
        return min(max(GIB - base, 0) + largest, available_memory() - _SLACK)
    if base + largest > max_ram:
        raise InputError(
            f"--max-ram {max_ram / GIB:.2f}GiB is too little: the largest weight takes"
            f" {largest / GIB:.2f} GiB while it is turned, and the program itself"
            f" {base / GIB:.2f} GiB; give at least {(base + largest) / GIB + 0.005:.2f}GiB"
        )
    return max_ram - base


def parse_mesh(text: str) -> dict[str, int]:
    """Returns the sizes of the axes in 'fsdp=8,tensor=4'.

    Raises:
        InputError: it names no axis or no size.
    """
    sizes = dict[str, int]()
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in MESH_AXES or not size.isdecimal() or int(size) < 1:
            raise InputError(
                f"{part!r} is no axis of a mesh with its size: write --mesh like"
                f" {MESH_AXES[1]}=8,{MESH_AXES[2]}=4"
            )
        sizes[axis] = int(size)
    return sizes
