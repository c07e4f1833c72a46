"""Exports the low-rank pairs of a LoRA run as a PEFT folder, with tokenizer and receipt."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax import __version__
from llama_jax.checkpoint.folders import is_lora_run
from llama_jax.checkpoint.lora_pairs import StoredPairs
from llama_jax.config.model import ModelConfig
from llama_jax.convert import receipt
from llama_jax.convert.detect import open_source
from llama_jax.convert.formats import peft
from llama_jax.convert.layout import weights
from llama_jax.convert.merge import pair_of
from llama_jax.convert.stream import local_files
from llama_jax.convert.tokenizer_files import collect_tokenizer_files
from llama_jax.errors import InputError
from llama_jax.runtime.atomic_write import new_folder
from llama_jax.runtime.manifest import hash_bytes
from llama_jax.runtime.storage import AnyPath, write_many


class PairsExport(NamedTuple):
    """The result of an export."""

    n_tensors: int  # A and B of each weight, equal to the run's bit for bit
    bytes_written: int
    notes: list[str]


def export_peft(path: AnyPath, folder: AnyPath, tokenizer: str | AnyPath | None) -> PairsExport:
    """Writes the pairs of a LoRA run's newest checkpoint into a new PEFT folder, and verifies it.

    Args:
        path: the run folder.
        folder: the folder to create.
        tokenizer: file or folder of the tokenizer; default: that of the run.

    Raises:
        InputError: `path` is no LoRA run, or damaged.
        Fault: the system can't write the folder.
    """
    if not is_lora_run(path):
        raise InputError(
            f"{path} is not a LoRA run, and --to peft writes low-rank pairs: give a LoRA run, or"
            " another --to"
        )
    source = open_source(path)
    assert source.pairs
    extra = collect_tokenizer_files(source, source.config, "peft", tokenizer)
    with new_folder(folder) as new, local_files(new, needed=True) as partial:
        assert isinstance(partial, Path)  # as `local_files` yields it
        peft.write(partial, source.config, source.pairs)
        write_many(partial, extra.files)
        names = (peft.CONFIG, *extra.files)
        records = _records(source.config, source.pairs)
        report = {
            "converter": f"llama_jax {__version__}",
            "source": {"kind": source.kind, "name": source.path.resolve().name},
            "lora": receipt.pairs_record(source.pairs),
            "config": dataclasses.asdict(source.config),
            "end_ids": sorted(extra.end_ids),
            "files": {name: hash_bytes((partial / name).read_bytes()) for name in names},
            "notes": extra.notes,
            "weights": records,
        }
        counts = verify_pairs(report, partial, None)
        report["verified"] = counts
        write_many(partial, {receipt.FILE: json.dumps(report, indent=1).encode()})
    size = 4 * source.pairs.lora.n_params(source.config)
    return PairsExport(counts["identical"], size, extra.notes)


def verify_pairs(report: dict[str, Any], folder: AnyPath, run: AnyPath | None) -> dict[str, int]:
    """Compares the pairs in a PEFT folder with its receipt, and with the run if given.

    Returns:
        identical: the number of tensors that are equal bit for bit; converted: 0.

    Raises:
        InputError: the folder or the run differs from the receipt, or the receipt is damaged.
    """
    try:
        config = ModelConfig(**report["config"])
        records = report["weights"]
    except (KeyError, TypeError, ValueError) as error:
        raise receipt.damaged_receipt(folder) from error
    if _records(config, peft.read(folder, config)) != records:
        raise InputError(f"{folder}: the pairs are not those that were written: convert again")
    source = run and open_source(run)
    if source and (source.pairs is None or _records(source.config, source.pairs) != records):
        raise InputError(
            f"{run} does not contain the pairs that were exported: it has changed, give the source"
            " of the conversion"
        )
    return {"identical": 2 * len(records), "converted": 0}


def _records(config: ModelConfig, pairs: StoredPairs) -> list[dict[str, Any]]:
    """Returns the record of each pair, in the order of the model."""
    found = ((weight, pair_of(pairs, weight)) for weight in weights(config))
    return [
        {"weight": str(weight), "pair": receipt.pair_records(weight, pair)}
        for weight, pair in found
        if pair
    ]
