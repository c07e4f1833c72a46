"""Reads the arrays of a checkpoint onto devices; distinguishes damaged files from machine faults.

An item of a checkpoint (`model`, `optimizer`) is a folder that Orbax has written: `_METADATA` in
JSON, and arrays in TensorStore's formats. This module reads them with TensorStore, because Orbax
hides the reason why a file could not be read.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import tensorstore as ts

from llama_jax.errors import Fault, InputError
from llama_jax.model.summary import path_names
from llama_jax.runtime.regular_file import check_regular_files

# The exceptions that a fault of the machine raises in Python, TensorStore (ValueError) and JAX.
FAULTS = (OSError, MemoryError, ValueError, jax.errors.JaxRuntimeError)
# The exceptions and statuses of a missing file, or a file with invalid content. The message of a
# TensorStore error begins with the name of its status, except for INVALID_ARGUMENT.
_DAMAGE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, UnicodeDecodeError)
_STATUS = re.compile(r"(DATA_LOSS|OUT_OF_RANGE|NOT_FOUND|FAILED_PRECONDITION): |Error \w+ing ")

Selected = TypeVar("Selected")


def load_items(where: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Returns the items `wanted` of the Orbax checkpoint `where`, in their dtypes and shardings.

    Args:
        where: the folder of the checkpoint.
        wanted: for each item, a tree of abstract arrays.

    Raises:
        InputError: the checkpoint is damaged, or has other names or shapes.
        Fault: the machine could not read it.
    """
    stores = {item: open_arrays(where / item) for item in wanted}
    for item, tree in wanted.items():
        _check_shapes(where, item, stores[item], tree)
    with classify_errors(where):
        return {
            item: jax.tree.map_with_path(partial(_load_array, stores[item]), tree)
            for item, tree in wanted.items()
        }


def _load_array(stores: dict[str, Any], path: tuple[Any, ...], like: Any) -> jax.Array:
    """Reads the shards of an array that this host's devices need: each once, all concurrently."""
    store = stores[_dotted(path)]
    indices = like.sharding.addressable_devices_indices_map(like.shape).values()
    shards = {str(index): store[index] for index in indices}
    reads = {name: shard.read() for name, shard in shards.items()}

    def shard(index: Any) -> np.ndarray:
        return np.asarray(reads[str(index)].result(), like.dtype)

    return jax.make_array_from_callback(like.shape, like.sharding, shard)


def open_arrays(folder: Path) -> dict[str, Any]:
    """Opens the arrays of a checkpoint's item; returns them by dotted name, their data not read.

    Raises:
        InputError: the item is damaged.
        Fault: the machine could not read it.
    """
    check_regular_files(folder)
    dotted, ocdbt, zarr3 = parse_json_file(
        folder / "_METADATA",
        lambda metadata: (
            [
                ".".join(part["key"] for part in entry["key_metadata"])
                for entry in metadata["tree_metadata"].values()
            ],
            metadata["use_ocdbt"],
            metadata["use_zarr3"],
        ),
    )
    root = folder.absolute()
    context = ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": 100_000_000}})
    packed: Any = {"driver": "ocdbt", "base": f"file://{root}/", "cache_pool": "cache_pool#ocdbt"}
    opening = dict[str, Any]()  # opened concurrently
    with classify_errors(folder):
        for name in dotted:
            plain: Any = {"driver": "file", "path": f"{root}/{name}/"}
            spec = {
                "driver": "zarr3" if zarr3 else "zarr",
                "kvstore": packed | {"path": f"{name}/"} if ocdbt else plain,
                "fill_missing_data_reads": False,  # a missing file is an error, not zeros
            }
            opening[name] = ts.open(spec, read=True, context=context)
        return {name: store.result() for name, store in opening.items()}


def parse_json_file(path: Path, select: Callable[[Any], Selected]) -> Selected:
    """Returns the result of `select` on the content of a checkpoint's JSON file.

    Raises:
        InputError: the file is missing, or its content is invalid.
        Fault: the machine could not read it.
    """
    with classify_errors(path.parent):
        text = path.read_text(encoding="utf-8")
    try:
        return select(json.loads(text))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path.parent, f"{path.name}: {error!r}"[:200]) from error


@contextlib.contextmanager
def classify_errors(where: Path) -> Iterator[None]:
    """Replaces an error in the block by one that says whether the checkpoint `where` is damaged.

    An error is called damage only if it certainly is: a user who trusts the message may delete
    good files.

    Raises:
        InputError: a file is missing, or its content is invalid.
        Fault: the machine could not read it.
    """
    try:
        yield
    except FAULTS as error:
        if isinstance(error, _DAMAGE) or _STATUS.match(str(error)):
            raise _damaged(where, root_cause(error)) from error
        raise Fault(
            f"the checkpoint {where} could not be read ({root_cause(error)}): its files may"
            " be intact; fix the cause and try again"
        ) from error


def _damaged(where: Path, reason: str) -> InputError:
    return InputError(
        f"the checkpoint {where} is damaged or cut short ({reason}): replace it by a copy, or move"
        " it out of the run's folder, so that the run resumes from the checkpoint before it"
    )


def root_cause(error: BaseException) -> str:
    """Returns the message of the first error in a chain, without TensorStore's appended details."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = re.split(r" \[(?:tensorstore_spec|os_error_code|source)", lines[0])[0]
    return text if len(text) <= 200 else f"{text[:40]} … {text[-150:]}"


def _check_shapes(where: Path, item: str, stores: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Checks names and shapes before anything is read: TensorStore would clip an index.

    Raises:
        InputError: an array is missing, unknown or of another shape.
    """
    found = {name: tuple(store.shape) for name, store in stores.items()}
    expected = {_dotted(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(wanted)}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise InputError(
                f"the checkpoint {where} was written with another model configuration:"
                f" {item}.{name} is {found.get(name, 'absent')} in the checkpoint, but"
                f" {expected.get(name, 'absent')} in the configuration"
            )


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(path_names(path))
