"""Ways to break what lies beside the weights, or what is asked of a conversion."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

from corrupt_checkpoint import STRANGE, Options, Rng, drawn
from sample_checkpoints import tokenizer_model

# What a receipt tells people; nothing follows from it.
_TOLD = ("converter", "notes", "dropped", "end_ids", "output", "verified", "kind", "name", "rotary",
         "quantized", "dtype", "shape", "remat", "scan", "param_dtype")  # fmt: skip


def tokenizer(place: Path, rng: Rng) -> None:
    """With a damaged tokenizer, or a file beside it that is no JSON."""
    names = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    path = drawn(rng, [place / name for name in names if (place / name).is_file()])
    data = path.read_bytes()
    ranks = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(200))
    half = len(data) // 2
    wrong = [b"", data[: int(rng.integers(1, half))], data[:half] + b"\xff" + data[half:], ranks]
    wrong += [b"[" * 100_000, b'{"a": ' * 100_000, b"{}", b"[]", b"\xff" * 99, b"null"]
    wrong += [b'{"bos_token_id": {}, "eos_token_id": "x"}']
    fit = {".model": b"null", ".json": b"{}"}[path.suffix]  # which is a tokenizer, or says nothing
    wrong = [w for w in wrong if w != fit or path.name == "tokenizer.json"]
    path.write_bytes(drawn(rng, wrong if "generation" in path.name else wrong[:-1]))


def vocabulary(place: Path, rng: Rng) -> Options:
    """With the tokenizer of a model with a larger vocabulary."""
    other = place.parent / "other.model"
    other.write_bytes(tokenizer_model(int(rng.integers(289, 400))))
    if rng.random() < 0.5:
        return {"tokenizer": other, "to": drawn(rng, ["hf", "meta"])}
    shutil.copy(other, place / "tokenizer.model")
    return None


def template(place: Path, rng: Rng) -> None:
    """With a chat template that would run code."""
    code = "{{ cycler.__init__.__globals__.os.mkdir('" + str(place.parent / "canary") + "') }}"
    (place / "chat_template.jinja").write_text(code)


def destination(place: Path, rng: Rng) -> Options:
    """To where no folder can be made."""
    (place.parent / "file").write_text("here")
    (place.parent / "loop").symlink_to("loop")
    names = ["file", "file/model", "loop", "loop/model", "x" * 300, place.name]
    return {"folder": place.parent / drawn(rng, names)}


def asked(place: Path, rng: Rng) -> Options:
    """With options that don't fit the model."""
    wrong = [{"model": "llama2-7b"}, {"model": "llama9"}, {"shards": 3, "to": "meta"}]
    wrong += [{"shards": 2}, {"max_ram": 1000}, {"tokenizer": place / "gone"}, {"tokenizer": place}]
    return drawn(rng, wrong)


def nothing(place: Path, rng: Rng) -> Options:
    """No checkpoint at all."""
    path = place.parent / "nothing"
    names = ["params.json", "config.json", "config.yaml", "consolidated.00.pth", "model.bin"]
    kind = rng.integers(7)
    if kind == 0:
        path.write_bytes(rng.bytes(int(rng.integers(100))))
    elif kind == 1:
        path.symlink_to("nothing")
    elif kind == 2:
        path = place.parent / ("x" * 300)
    elif kind > 2:
        path.mkdir()
        if kind == 3:
            (path / drawn(rng, names)).symlink_to(path)
        elif kind == 4:
            (path / drawn(rng, names)).mkdir()
        elif kind == 5:
            (path / drawn(rng, names)).write_text("what is written here is no checkpoint\n")
    return {"path": path}


def receipt(place: Path, rng: Rng) -> Options:
    """With a damaged receipt, to be verified."""
    path = place / "receipt.json"
    content = json.loads(path.read_text())
    if rng.random() < 0.2:
        path.write_text(path.read_text()[: int(rng.integers(9000))])
        return {"verify": True}
    part: Any = content
    places = [[], ["config"], ["source"], ["source", "layout"], ["files"], ["weights"]]
    places += [["weights", 3], ["weights", 3, "source", 0], ["weights", 9, "written"]]
    for step in drawn(rng, places):
        part = part[step]
    whole = [k for k in part if k not in _TOLD] if isinstance(part, dict) else range(len(part))
    part[drawn(rng, whole)] = "here"
    path.write_text(json.dumps(content).replace('"here"', drawn(rng, STRANGE)))
    return {"verify": True}
