"""The folder of an evaluation's results: what was measured, with which model, item by item."""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

import llama_jax
from llama_jax.checkpoint.folders import is_lora_run
from llama_jax.checkpoint.lora_pairs import StoredPairs
from llama_jax.checkpoint.model_folders import manifest_hash
from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError
from llama_jax.evaluation.evaluate import Evaluation
from llama_jax.runtime.storage import AnyPath, open_file, write_many

FILE, ITEMS = "results.json", "items"
_RECEIPT = "receipt.json"  # of a conversion
_PAIRS = "adapter_model.safetensors"  # of PEFT


def identify(
    folder: AnyPath, config: ModelConfig, pairs: StoredPairs | None, unmerged: bool
) -> dict[str, Any]:
    """Returns what the answers of a model depend on, besides the requests.

    Args:
        folder: a model folder, or a run folder.
        config: how the model is computed.
        pairs: low-rank pairs from another folder.
        unmerged: whether pairs stay apart from the matrices.
    """
    return {
        "model": manifest_hash(folder),
        "pairs": _pairs_hash(pairs.folder) if pairs else None,
        "unmerged": unmerged,
        "dtype": config.dtype,
        "param_dtype": config.param_dtype,
        "quantized": config.quantized,
        "context": config.context,
    }


def write_results(
    out: Path,
    evaluation: Evaluation,
    folder: AnyPath,
    config: ModelConfig,
    identity: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    """Writes results.json, and the items of each task as items/TASK.jsonl.

    Args:
        out: the folder, which exists.
        evaluation: the results.
        folder: of the model.
        config: how the model was computed, on the current mesh.
        identity: of `identify`.
        options: of the evaluation: limit, chat, …

    Raises:
        OSError: a file can't be written.
    """
    receipt = folder / _RECEIPT
    results = {
        **evaluation.results,
        "folder": str(folder),
        "identity": identity,
        "receipt": _file_hash(receipt) if receipt.is_file() else None,
        "config": dataclasses.asdict(config),
        "options": options,
        "mesh": dict(jax.sharding.get_mesh().shape),
        "device": jax.devices()[0].device_kind,
        "versions": {
            "llama_jax": llama_jax.__version__,
            **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "lm-eval")},
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    files = {
        f"{ITEMS}/{_file_name(name)}": _lines(items) for name, items in evaluation.items.items()
    }
    write_many(out, files)
    write_many(out, {FILE: json.dumps(results, indent=1).encode()})


def read_results(out: Path) -> Evaluation:
    """Returns the results in a folder.

    Raises:
        InputError: there are none, or they are damaged.
    """
    try:
        results = json.loads((out / FILE).read_text())
        items = {
            name: [
                json.loads(line)
                for line in (out / ITEMS / _file_name(name)).read_text().splitlines()
            ]
            for name in results["tasks"]
        }
    except FileNotFoundError as error:
        raise InputError(
            f"{out} has no results of a finished evaluation: give a folder that `llama-jax eval"
            " --out` has written"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the results in {out} can't be read ({error})") from error
    return Evaluation(results, items)


def _lines(items: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(item) + "\n" for item in items).encode()


def _file_name(task: str) -> str:
    return f"{task.replace('/', '_')}.jsonl"


def _pairs_hash(folder: AnyPath) -> str:
    return manifest_hash(folder) if is_lora_run(folder) else _file_hash(folder / _PAIRS)


def _file_hash(path: AnyPath) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
