"""Broken checkpoints by the hundred: each refused in a sentence, or converted as if it were whole.

A case is a whole tiny checkpoint, a way to break it and a number; the case's name seeds what the
breaking draws. Bytes of the weights themselves are left alone where the format has no checksum of
them, and so are values that another whole checkpoint could have.
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
import corrupt_weights
import numpy as np
import pytest
from sample_checkpoints import write_all

from llama_jax.checkpoint.folders import read_model_config
from llama_jax.checkpoint.single_weights import WeightsReader
from llama_jax.cli.main import main
from llama_jax.config.model import ModelConfig
from llama_jax.convert.convert import ConversionResult, convert
from llama_jax.convert.verify import verify
from llama_jax.errors import Fault, InputError
from llama_jax.runtime.process_memory import peak_resident
from llama_jax.tokenizer.tokenizer import load_tokenizer

Way = Callable[[Path, corrupt.Rng], corrupt.Options]
# After these the checkpoint may still be whole: nothing that matters was hit.
ENDURED = ("cut", "flip", "value", "metadata", "pickled", "receipt", "template")
ADVICE = re.compile(
    r"\b(fetch|give|put|move|correct|convert|"
    r"remove|choose|save|write|lay|name|start|make|load|leave|one of"
    r"|must hold|must be|not valid|add|numbers that do|the family is)\b"
)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_all(tmp_path_factory.mktemp("whole"))


class Case(NamedTuple):
    base: str
    breaking: Way
    number: int

    def __str__(self) -> str:
        return f"{self.base}-{self.breaking.__name__}-{self.number}"


FOLDERS = ("meta1", "meta2", "hf1", "hf3", "bin1", "bin3")
HOW_MANY: dict[Way, tuple[tuple[str, ...], int]] = {
    corrupt.cut: ((*FOLDERS, "f32", "q8", "legacy", "version1", "model", "run"), 4),
    corrupt.emptied: ((*FOLDERS, "f32", "legacy", "model", "run"), 1),
    corrupt.flip: ((*FOLDERS, "f32", "q8", "legacy", "version1", "model"), 6),
    corrupt_weights.one_bit: (("meta1", "meta2", "bin1", "bin3"), 4),
    corrupt_weights.shifted: (("f32", "q8"), 8),
    corrupt_weights.irregular: ((*FOLDERS, "f32", "legacy", "model", "run"), 4),
    corrupt.missing: ((*FOLDERS, "model", "run"), 2),
    corrupt.value: (("meta1", "hf1", "model", "run"), 14),
    corrupt.metadata: (("f32", "q8"), 9),
    corrupt.sizes: (("legacy", "version1"), 5),
    corrupt.dropped: ((*FOLDERS, "f32", "q8"), 1),
    corrupt.renamed: ((*FOLDERS, "f32"), 1),
    corrupt.added: ((*FOLDERS, "q8"), 1),
    corrupt.transposed: ((*FOLDERS, "f32", "q8"), 1),
    corrupt.reshaped: ((*FOLDERS, "f32"), 2),
    corrupt.retyped: ((*FOLDERS, "f32"), 1),
    corrupt.infinite: ((*FOLDERS, "f32"), 1),
    corrupt.unlike: (("meta2",), 3),
    corrupt.swapped: (("meta2", "hf3", "bin3"), 2),
    corrupt.foreign: (("meta2", "hf3"), 3),
    corrupt.beyond: (("meta1", "meta2"), 3),
    corrupt.index: (("hf3", "bin3"), 8),
    corrupt.runs: (("meta1", "bin3"), 8),
    corrupt.pickled: (("meta1", "bin1"), 5),
    corrupt.huge: (("meta1", "hf1", "bin1", "f32", "q8"), 5),
    corrupt.stacked: (("model",), 5),
    corrupt_other.tokenizer: (("meta1", "export", "model"), 6),
    corrupt_other.vocabulary: (("meta1", "hf1"), 2),
    corrupt_other.template: (("export",), 1),
    corrupt_other.destination: (("meta1", "q8"), 5),
    corrupt_other.asked: (("hf1",), 5),
    corrupt_other.nothing: (("hf1",), 12),
    corrupt_other.receipt: (("model",), 16),
}
CASES = [Case(b, how, i) for how, (bs, n) in HOW_MANY.items() for b in bs for i in range(n)]


class Made(NamedTuple):
    """What a conversion came to, as far as it can be compared."""

    config: ModelConfig
    tokenizer: Any
    bits: dict[str, bytes]
    notes: set[str]


def made(outcome: ConversionResult) -> Made:
    reader = WeightsReader(outcome.folder)
    bits = {name: reader.read(name, None).tobytes() for name in reader.arrays}
    told = None
    if list(outcome.folder.glob("tokenizer.*")):
        known = load_tokenizer(outcome.folder)
        told = (
            known.encode("ab hé", bos=True, eos=True),
            known.n_vocab,
            known.end_ids,
            known.add_bos,
        )
    config = replace(read_model_config(outcome.folder), remat="none", scan=True)  # no matter here
    return Made(config, told, bits, set(outcome.notes))


@pytest.fixture(scope="session")
def clean(whole: dict[str, Path]) -> Callable[[str], Made]:
    """Returns what the whole checkpoint of a name is converted to."""
    found: dict[str, Made] = {}

    def of(name: str) -> Made:
        if name not in found:
            found[name] = made(convert(whole[name], whole[name].with_name("clean-" + name)))
        return found[name]

    return of


def everything(folder: Path) -> Iterator[str]:
    return (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")))


def check_sentence(message: str, at: Path) -> None:
    """A sentence of its own: where, what, and what to do."""
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
    """Returns what a conversion came to (None for a verification), or why it was refused."""
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
    told = err()
    assert status == (2 if told.startswith("llama-jax convert: ") else 0)
    if status:
        return told.removeprefix("llama-jax convert: ").removesuffix("\n")
    assert all(line.startswith("warning: ") for line in told.splitlines()), told
    notes = tuple(line.removeprefix("warning: ") for line in told.splitlines())
    return None if verifies else ConversionResult(folder, notes, 0, 0, 0, 0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_refused_in_a_sentence_or_converted_as_if_whole(case, whole, clean, tmp_path, capfd):
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    source, out = whole[case.base], tmp_path / "out"
    place = tmp_path / "in" / source.name
    place.parent.mkdir()
    out.mkdir()
    (tmp_path / "whole").symlink_to(source.parent)
    (shutil.copytree if source.is_dir() else shutil.copy)(source, place)
    expected = clean(case.base)
    options = {"path": place, "folder": out / "model"} | dict(case.breaking(place, rng) or {})
    before, begun, held = list(everything(place.parent)), time.monotonic(), peak_resident()
    capfd.readouterr()
    outcome = run(options, on_command_line(case), lambda: capfd.readouterr().err)
    assert time.monotonic() - begun < 5
    assert peak_resident() - held < 256 << 20
    assert not (tmp_path / "in/canary").exists()
    assert list(everything(place.parent)) == before
    if isinstance(outcome, ConversionResult):
        new = set(outcome.notes) - expected.notes
        assert new or case.breaking.__name__ in ENDURED, "nothing was noticed"
        assert new or made(outcome) == expected
    else:
        assert list(out.iterdir()) == []
        assert outcome or case.breaking is corrupt_other.receipt
        check_sentence(outcome or f"{tmp_path} give", tmp_path)


def test_the_pickles_would_run_code_elsewhere(tmp_path):
    """Python's own reader of pickles does what the converter must not do."""
    for seed in range(30):
        canary = tmp_path / f"canary{seed}"
        pickle.loads(corrupt.runs_code(np.random.default_rng(seed), canary))
        assert canary.exists()


@pytest.mark.parametrize("to", ["orbax", "hf", "meta"])
def test_a_full_disk_is_told_and_leaves_nothing(whole, tmp_path, monkeypatch, to):
    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(Fault, match=r"can't write .*out/model: No space left on device$"):
        convert(whole["meta1"], tmp_path / "out/model", to=to, progress=False)
    assert list((tmp_path / "out").iterdir()) == []
