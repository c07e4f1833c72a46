"""Finding out what a path holds."""

from dataclasses import replace
from pathlib import Path

from llama_jax import folders
from llama_jax.convert import gguf, huggingface, llama2c, meta, orbax
from llama_jax.convert.source import Source, checked
from llama_jax.errors import InputError
from llama_jax.family import FAMILY

_KINDS = (
    "a Meta folder (params.json), a Hugging Face folder (config.json), a .gguf file, a llama2.c"
    " .bin file, or a model or run folder of llama_jax"
)


def open_source(path: Path, model: str | None = None) -> Source:
    """Returns the checkpoint at `path`, of whatever format, looked over.

    Args:
        path: a folder or file.
        model: member of the family that it is, where its own configuration is not to be followed.

    Raises:
        InputError: there is none, or it is damaged, incomplete or not a LLaMA.
    """
    try:
        source = _open(path)
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): give another one") from error
    if model is not None:
        if model not in FAMILY:
            raise InputError(f"--model {model} is not known; the family is: {', '.join(FAMILY)}")
        own = source.config
        config = replace(FAMILY[model], dtype=own.dtype, param_dtype=own.param_dtype)
        source = replace(source, config=config)
    return checked(source)


def _open(path: Path) -> Source:
    if path.is_file():
        return _open_file(path)
    if not path.is_dir():
        raise InputError(f"there is no {path}: give {_KINDS}")
    if (path / "params.json").exists():
        return meta.read(path)
    if folders.is_run(path) or (path / "weights").exists():
        return orbax.read(path)
    if (path / "config.json").exists():
        return huggingface.read(path)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return gguf.read(files[0])
    weights = [file for file in path.iterdir() if file.suffix in (".pth", ".safetensors", ".bin")]
    if weights:
        raise InputError(
            f"{path} holds {weights[0].name}, but neither params.json nor config.json says what"
            " model it is: fetch that file too"
        )
    raise InputError(f"{path} is no checkpoint: give {_KINDS}")


def _open_file(path: Path) -> Source:
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"GGUF":
        return gguf.read(path)
    if path.suffix in (".pth", ".safetensors") or start[:2] in (b"PK", b"\x80\x02"):
        raise InputError(
            f"{path} holds weights, but not what model they are of: give the folder that also holds"
            " params.json or config.json"
        )
    if llama2c.is_llama2c(path):
        return llama2c.read(path)
    raise InputError(f"{path} is no checkpoint: give {_KINDS}")
