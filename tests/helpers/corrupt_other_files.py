"""Functions that corrupt a checkpoint's other files, or return wrong options for a conversion."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

from corrupt_checkpoint import STRANGE, Options, Rng, choose
from sample_checkpoints import tokenizer_model

# Fields of a receipt that are information for people; the program does not read them.
_INFORMATION = (
    "converter", "notes", "dropped", "end_ids", "output", "verified", "kind", "name", "rotary",
    "quantized", "dtype", "shape", "remat", "scan", "param_dtype",
)  # fmt: skip


def corrupt_tokenizer(checkpoint: Path, rng: Rng) -> None:
    """Damages the tokenizer, or a JSON file next to it."""
    names = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    path = choose(rng, [checkpoint / name for name in names if (checkpoint / name).is_file()])
    data = path.read_bytes()
    ranks = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(200))
    half = len(data) // 2
    wrong = [b"", data[: int(rng.integers(1, half))], data[:half] + b"\xff" + data[half:], ranks]
    wrong += [b"[" * 100_000, b'{"a": ' * 100_000, b"{}", b"[]", b"\xff" * 99, b"null"]
    wrong += [b'{"bos_token_id": {}, "eos_token_id": "x"}']
    # b"null" is a valid tiktoken file, b"{}" a valid configuration without settings.
    valid = {".model": b"null", ".json": b"{}"}[path.suffix]
    wrong = [w for w in wrong if w != valid or path.name == "tokenizer.json"]
    path.write_bytes(choose(rng, wrong if "generation" in path.name else wrong[:-1]))


def enlarge_vocabulary(checkpoint: Path, rng: Rng) -> Options:
    """Uses the tokenizer of a model with a larger vocabulary."""
    other = checkpoint.parent / "other.model"
    other.write_bytes(tokenizer_model(int(rng.integers(289, 400))))
    if rng.random() < 0.5:
        return {"tokenizer": other, "to": choose(rng, ["hf", "meta"])}
    shutil.copy(other, checkpoint / "tokenizer.model")
    return None


def plant_template(checkpoint: Path, rng: Rng) -> None:
    """Adds a chat template that would run code."""
    code = "{{ cycler.__init__.__globals__.os.mkdir('" + str(checkpoint.parent / "canary") + "') }}"
    (checkpoint / "chat_template.jinja").write_text(code)


def impossible_destination(checkpoint: Path, rng: Rng) -> Options:
    """Selects a destination where no folder can be created."""
    (checkpoint.parent / "file").write_text("here")
    (checkpoint.parent / "loop").symlink_to("loop")
    names = ["file", "file/model", "loop", "loop/model", "x" * 300, checkpoint.name]
    return {"folder": checkpoint.parent / choose(rng, names)}


def wrong_options(checkpoint: Path, rng: Rng) -> Options:
    """Returns options that don't fit the model."""
    wrong = [{"model": "llama2-7b"}, {"model": "llama9"}, {"shards": 3, "to": "meta"}]
    wrong += [
        {"shards": 2},
        {"max_ram": 1000},
        {"tokenizer": checkpoint / "gone"},
        {"tokenizer": checkpoint},
    ]
    return choose(rng, wrong)


def no_checkpoint(checkpoint: Path, rng: Rng) -> Options:
    """Returns a path without a checkpoint."""
    path = checkpoint.parent / "nothing"
    names = ["params.json", "config.json", "config.yaml", "consolidated.00.pth", "model.bin"]
    kind = rng.integers(7)
    if kind == 0:
        path.write_bytes(rng.bytes(int(rng.integers(100))))
    elif kind == 1:
        path.symlink_to("nothing")
    elif kind == 2:
        path = checkpoint.parent / ("x" * 300)
    elif kind > 2:
        path.mkdir()
        if kind == 3:
            (path / choose(rng, names)).symlink_to(path)
        elif kind == 4:
            (path / choose(rng, names)).mkdir()
        elif kind == 5:
            (path / choose(rng, names)).write_text("this file is not a checkpoint\n")
    return {"path": path}


def corrupt_receipt(checkpoint: Path, rng: Rng) -> Options:
    """Damages the receipt, and verifies the model folder with it."""
    path = checkpoint / "receipt.json"
    content = json.loads(path.read_text())
    if rng.random() < 0.2:
        path.write_text(path.read_text()[: int(rng.integers(9000))])
        return {"verify": True}
    part: Any = content
    parents = [[], ["config"], ["source"], ["source", "layout"], ["files"], ["weights"]]
    parents += [["weights", 3], ["weights", 3, "source", 0], ["weights", 9, "written"]]
    for step in choose(rng, parents):
        part = part[step]
    keys = (
        [k for k in part if k not in _INFORMATION] if isinstance(part, dict) else range(len(part))
    )
    part[choose(rng, keys)] = "here"
    path.write_text(json.dumps(content).replace('"here"', choose(rng, STRANGE)))
    return {"verify": True}
