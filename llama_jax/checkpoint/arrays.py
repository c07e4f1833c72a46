"""Reads the arrays of a checkpoint onto devices, and tells damaged files from a machine's faults.

An item of a checkpoint (`model`, `optimizer`) is a folder that Orbax has written: `_METADATA` in
JSON, and arrays that TensorStore reads. They are read by TensorStore itself: Orbax hides why it
could not read a file.
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

# What the machine's faults raise, in Python, TensorStore (ValueError) and JAX.
FAULTS = (OSError, MemoryError, ValueError, jax.errors.JaxRuntimeError)
# Those that a missing file, or one whose content makes no sense, raises. An error of TensorStore
# begins with the name of its status; INVALID_ARGUMENT goes without.
_DAMAGE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, UnicodeDecodeError)
_STATUS = re.compile(r"(DATA_LOSS|OUT_OF_RANGE|NOT_FOUND|FAILED_PRECONDITION): |Error \w+ing ")

Picked = TypeVar("Picked")


def load_items(where: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Loads the items `wanted` of the Orbax checkpoint `where`, whose names and shapes must fit."""
    stores = {item: open_arrays(where / item) for item in wanted}
    for item, tree in wanted.items():
        _check_shapes(where, item, stores[item], tree)
    with classify_errors(where):
        return {
            item: jax.tree.map_with_path(partial(_load_array, stores[item]), tree)
            for item, tree in wanted.items()
        }


def _load_array(stores: dict[str, Any], path: tuple[Any, ...], like: Any) -> jax.Array:
    """Reads the parts of an array that this host's devices hold, each once and all at a time."""
    store = stores[_dotted(path)]
    indices = like.sharding.addressable_devices_indices_map(like.shape).values()
    parts = {str(index): store[index] for index in indices}
    reads = {name: part.read() for name, part in parts.items()}

    def part(index: Any) -> np.ndarray:
        return np.asarray(reads[str(index)].result(), like.dtype)

    return jax.make_array_from_callback(like.shape, like.sharding, part)


def open_arrays(place: Path) -> dict[str, Any]:
    """Returns the arrays of an item of a checkpoint by dotted name: opened, their data not read.

    Raises:
        InputError: the item is damaged.
        Fault: the machine could not read it.
    """
    check_regular_files(place)
    dotted, ocdbt, zarr3 = parse_json_file(
        place / "_METADATA",
        lambda about: (
            [
                ".".join(part["key"] for part in entry["key_metadata"])
                for entry in about["tree_metadata"].values()
            ],
            about["use_ocdbt"],
            about["use_zarr3"],
        ),
    )
    root = place.absolute()
    context = ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": 100_000_000}})
    packed: Any = {"driver": "ocdbt", "base": f"file://{root}/", "cache_pool": "cache_pool#ocdbt"}
    opening = dict[str, Any]()
    with classify_errors(place):
        for name in dotted:
            plain: Any = {"driver": "file", "path": f"{root}/{name}/"}
            spec = {
                "driver": "zarr3" if zarr3 else "zarr",
                "kvstore": packed | {"path": f"{name}/"} if ocdbt else plain,
                "fill_missing_data_reads": False,  # a missing file is not one of zeros
            }
            opening[name] = ts.open(spec, read=True, context=context)
        return {name: store.result() for name, store in opening.items()}


def parse_json_file(path: Path, pick: Callable[[Any], Picked]) -> Picked:
    """Returns what `pick` finds in a JSON file of a checkpoint.

    Raises:
        InputError: the file is missing or makes no sense.
        Fault: the machine could not read it.
    """
    with classify_errors(path.parent):
        text = path.read_text(encoding="utf-8")
    try:
        return pick(json.loads(text))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path.parent, f"{path.name}: {error!r}"[:200]) from error


@contextlib.contextmanager
def classify_errors(where: Path) -> Iterator[None]:
    """Turns an error in the block into one that says whether the checkpoint `where` is damaged.

    What is not surely damage is not called so: who trusts that word may throw good files away.

    Raises:
        InputError: a file is missing, or its content makes no sense.
        Fault: the machine could not read it.
    """
    try:
        yield
    except FAULTS as error:
        if isinstance(error, _DAMAGE) or _STATUS.match(str(error)):
            raise _damaged(where, root_cause(error)) from error
        raise Fault(
            f"the checkpoint {where} could not be read ({root_cause(error)}): its files may"
            " well be sound; mend that and try again"
        ) from error


def _damaged(where: Path, reason: str) -> InputError:
    return InputError(
        f"the checkpoint {where} is damaged or cut short ({reason}): put a copy in its place, or"
        " let a run go on from the checkpoint before it: move this one out of the run's folder"
    )


def root_cause(error: BaseException) -> str:
    """Returns the message of what caused an error, without TensorStore's description of itself."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = re.split(r" \[(?:tensorstore_spec|os_error_code|source)", lines[0])[0]
    return text if len(text) <= 200 else f"{text[:40]} … {text[-150:]}"


def _check_shapes(where: Path, item: str, stores: dict[str, Any], wanted: dict[str, Any]) -> None:
    # Compared first, so that no array of another shape is cut or read beyond its end.
    has = {name: tuple(store.shape) for name, store in stores.items()}
    wants = {_dotted(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(wanted)}
    for name in sorted(has.keys() | wants.keys()):
        if has.get(name) != wants.get(name):
            raise InputError(
                f"the checkpoint {where} was written with another model configuration: it holds"
                f" {item}.{name} as {has.get(name, 'nothing')}, but the configuration says"
                f" {wants.get(name, 'nothing')}"
            )


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(path_names(path))
