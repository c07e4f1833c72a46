"""Hundreds of damaged checkpoints: each is refused in a sentence, or converts like the intact one.

A case is a tiny intact checkpoint, a kind of damage and a number; the name of the case is the seed
of its random choices. Bytes of the weights are not changed if the format has no checksum for them,
nor values that another intact checkpoint could have.
"""

import errno
import os
import pickle
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import corrupt_checkpoint as corrupt
import corrupt_other_files as corrupt_other
import corrupt_pickle
import corrupt_weights
import numpy as np
import pytest
from sample_checkpoints import write_all_formats

from llama_jax.checkpoint.folders import read_model_config
from llama_jax.checkpoint.single_weights import WeightsReader
from llama_jax.cli.main import main
from llama_jax.config.model import ModelConfig
from llama_jax.convert.convert import ConversionResult, convert
from llama_jax.convert.verify import verify
from llama_jax.errors import Fault, InputError
from llama_jax.runtime.process_memory import peak_resident
from llama_jax.tokenizer.tokenizer import load_tokenizer

Corruption = Callable[[Path, corrupt.Rng], corrupt.Options]
# After these kinds of damage the checkpoint may still be valid: only unused bytes may have changed.
MAY_BE_HARMLESS = (
    "truncate_file", "flip_header_bits", "change_json_value", "change_gguf_metadata",
    "change_pickle", "corrupt_receipt", "plant_template",
)  # fmt: skip
ADVICE = re.compile(
    r"\b(fetch|give|put|move|correct|convert|"
    r"remove|choose|save|write|lay|name|start|make|load|leave|one of"
    r"|must contain|must be|not valid|add|numbers that do|the family is)\b"
)


@pytest.fixture(scope="session")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Returns the paths of the intact checkpoints by name."""
    return write_all_formats(tmp_path_factory.mktemp("intact"))


class Case(NamedTuple):
    base: str
    corrupt: Corruption
    number: int

    def __str__(self) -> str:
        return f"{self.base}-{self.corrupt.__name__}-{self.number}"


FOLDERS = ("meta1", "meta2", "hf1", "hf3", "bin1", "bin3")
# Kind of damage -> the checkpoints it is applied to, and the number of cases for each.
KINDS: dict[Corruption, tuple[tuple[str, ...], int]] = {
    corrupt.truncate_file: ((*FOLDERS, "f32", "q8", "legacy", "version1", "model", "run"), 4),
    corrupt.empty_file: ((*FOLDERS, "f32", "legacy", "model", "run"), 1),
    corrupt.flip_header_bits: ((*FOLDERS, "f32", "q8", "legacy", "version1", "model"), 6),
    corrupt_weights.flip_weight_bit: (("meta1", "meta2", "bin1", "bin3"), 4),
    corrupt_weights.shift_weights: (("f32", "q8"), 8),
    corrupt_weights.replace_by_special_file: ((*FOLDERS, "f32", "legacy", "model", "run"), 4),
    corrupt.delete_file: ((*FOLDERS, "model", "run"), 2),
    corrupt.change_json_value: (("meta1", "hf1", "model", "run"), 14),
    corrupt.change_gguf_metadata: (("f32", "q8"), 9),
    corrupt.change_llama2c_header: (("legacy", "version1"), 5),
    corrupt.drop_tensor: ((*FOLDERS, "f32", "q8"), 1),
    corrupt.rename_tensor: ((*FOLDERS, "f32"), 1),
    corrupt.add_tensor: ((*FOLDERS, "q8"), 1),
    corrupt.transpose_tensor: ((*FOLDERS, "f32", "q8"), 1),
    corrupt.reshape_tensor: ((*FOLDERS, "f32"), 2),
    corrupt.change_dtype: ((*FOLDERS, "f32"), 1),
    corrupt.add_non_finite: ((*FOLDERS, "f32"), 1),
    corrupt.change_one_shard: (("meta2",), 3),
    corrupt.swap_files: (("meta2", "hf3", "bin3"), 2),
    corrupt.replace_weights_file: (("meta2", "hf3"), 3),
    corrupt.add_shard: (("meta1", "meta2"), 3),
    corrupt.change_index: (("hf3", "bin3"), 8),
    corrupt_pickle.plant_code: (("meta1", "bin3"), 8),
    corrupt_pickle.change_pickle: (("meta1", "bin1"), 5),
    corrupt.claim_huge_size: (("meta1", "hf1", "bin1", "f32", "q8"), 5),
    corrupt.change_layer_count: (("model",), 5),
    corrupt_other.corrupt_tokenizer: (("meta1", "export", "model"), 6),
    corrupt_other.enlarge_vocabulary: (("meta1", "hf1"), 2),
    corrupt_other.plant_template: (("export",), 1),
    corrupt_other.impossible_destination: (("meta1", "q8"), 5),
    corrupt_other.wrong_options: (("hf1",), 5),
    corrupt_other.no_checkpoint: (("hf1",), 12),
    corrupt_other.corrupt_receipt: (("model",), 16),
}
CASES = [Case(base, kind, i) for kind, (bases, n) in KINDS.items() for base in bases
         for i in range(n)]  # fmt: skip


class Output(NamedTuple):
    """The parts of a conversion's output that must equal those of the intact checkpoint's."""

    config: ModelConfig
    tokenizer: Any
    bits: dict[str, bytes]
    notes: set[str]


def read_output(result: ConversionResult) -> Output:
    reader = WeightsReader(result.folder)
    bits = {name: reader.read(name, None).tobytes() for name in reader.arrays}
    summary = None
    if list(result.folder.glob("tokenizer.*")):
        tokenizer = load_tokenizer(result.folder)
        summary = (
            tokenizer.encode("ab hé", bos=True, eos=True),
            tokenizer.n_vocab,
            tokenizer.end_ids,
            tokenizer.add_bos,
        )
    # remat and scan don't change the model.
    config = replace(read_model_config(result.folder), remat="none", scan=True)
    return Output(config, summary, bits, set(result.notes))


@pytest.fixture(scope="session")
def intact_output(intact: dict[str, Path]) -> Callable[[str], Output]:
    """Returns a function from the name of a checkpoint to the output of its conversion."""
    outputs: dict[str, Output] = {}

    def convert_once(name: str) -> Output:
        if name not in outputs:
            folder = intact[name].with_name("converted-" + name)
            outputs[name] = read_output(convert(intact[name], folder))
        return outputs[name]

    return convert_once


def all_paths(folder: Path) -> Iterator[str]:
    return (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")))


def check_sentence(message: str, at: Path) -> None:
    """Checks that a message is one sentence: where, what, and what to do."""
    assert len(message) < 600 + 2 * len(str(at)), len(message)
    assert message.isprintable(), message
    assert not re.search(r"Traceback|[A-Za-z]Error", message), message
    named = ("weight", "layers.", "norm", "--")
    assert str(at) in message or any(part in message for part in named), message
    assert ADVICE.search(message.replace(str(at), "")), message


def test_there_are_enough_cases():
    assert len(CASES) >= 400
    assert len(set(map(str, CASES))) == len(CASES)
    assert sum(map(on_command_line, CASES)) >= 40


def on_command_line(case: Case) -> bool:
    return case.number == 0


def run(
    options: dict[str, Any], command_line: bool, err: Callable[[], str]
) -> ConversionResult | str | None:
    """Returns the result of a conversion (None for a verification), or the error message."""
    verifies = options.pop("verify", False)
    if not command_line:
        try:
            if verifies:
                verify(options["path"], progress=False)
                return None
            return convert(**options, progress=False)
        except InputError as error:
            return str(error)
    path, folder = str(options.pop("path")), options.pop("folder")
    pairs = [(f"--{key.replace('_', '-')}", str(value)) for key, value in options.items()]
    target = ["--verify"] if verifies else [str(folder)]
    status = main(["convert", path, *target, *(part for pair in pairs for part in pair)])
    stderr = err()
    assert status == (2 if stderr.startswith("llama-jax convert: ") else 0)
    if status:
        return stderr.removeprefix("llama-jax convert: ").removesuffix("\n")
    assert all(line.startswith("warning: ") for line in stderr.splitlines()), stderr
    notes = tuple(line.removeprefix("warning: ") for line in stderr.splitlines())
    return None if verifies else ConversionResult(folder, notes, 0, 0, 0, 0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_damaged_checkpoint_is_refused_in_a_sentence_or_converts_like_the_intact_one(
    case, intact, intact_output, tmp_path, capfd
):
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    source, out = intact[case.base], tmp_path / "out"
    damaged = tmp_path / "in" / source.name
    damaged.parent.mkdir()
    out.mkdir()
    (tmp_path / "intact").symlink_to(source.parent)
    (shutil.copytree if source.is_dir() else shutil.copy)(source, damaged)
    expected = intact_output(case.base)
    options = {"path": damaged, "folder": out / "model"} | dict(case.corrupt(damaged, rng) or {})
    before, start, memory = list(all_paths(damaged.parent)), time.monotonic(), peak_resident()
    capfd.readouterr()
    result = run(options, on_command_line(case), lambda: capfd.readouterr().err)
    assert time.monotonic() - start < 5
    assert peak_resident() - memory < 256 << 20
    assert not (tmp_path / "in/canary").exists()
    assert list(all_paths(damaged.parent)) == before
    if isinstance(result, ConversionResult):
        new = set(result.notes) - expected.notes
        assert new or case.corrupt.__name__ in MAY_BE_HARMLESS, "the damage was not detected"
        assert new or read_output(result) == expected
    else:
        assert list(out.iterdir()) == []
        assert result or case.corrupt is corrupt_other.corrupt_receipt
        check_sentence(result or f"{tmp_path} give", tmp_path)


def test_pythons_unpickler_runs_the_code_in_the_hostile_pickles(tmp_path):
    """The pickles are hostile: the converter's refusal of them means something."""
    for seed in range(30):
        canary = tmp_path / f"canary{seed}"
        pickle.loads(corrupt_pickle.code_pickle(np.random.default_rng(seed), canary))
        assert canary.exists()


@pytest.mark.parametrize("to", ["orbax", "hf", "meta"])
def test_a_full_disk_is_reported_and_leaves_nothing(intact, tmp_path, monkeypatch, to):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr("llama_jax.convert.convert.write_many", full)
    monkeypatch.setattr("llama_jax.convert.formats.model_folder.write_many", full)
    with pytest.raises(Fault, match=r"can't write .*out/model: No space left on device$"):
        convert(intact["meta1"], tmp_path / "out/model", to=to, progress=False)
    assert list((tmp_path / "out").iterdir()) == []
