"""Detects the format of a checkpoint and opens it."""

from dataclasses import replace

from llama_jax.checkpoint import folders
from llama_jax.config.family import FAMILY
from llama_jax.convert.formats import gguf, huggingface, llama2c, meta, model_folder
from llama_jax.convert.formats.peft import is_peft_folder
from llama_jax.convert.lora_folder import base_and_pairs, open_pairs
from llama_jax.convert.source import Source, validate_source
from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath

_KINDS = (
    "a Meta folder (params.json), a Hugging Face folder (config.json), a .gguf file, a llama2.c"
    " .bin file, or a model or run folder of llama_jax"
)
_READERS = {
    "meta": meta.read, "huggingface": huggingface.read, "gguf": gguf.read,
    "llama2c": llama2c.read, "orbax": model_folder.read,
}  # fmt: skip
_WEIGHTS = (".pth", ".safetensors", ".bin")


def open_source(path: AnyPath, model: str | None = None, lora: AnyPath | None = None) -> Source:
    """Opens the checkpoint at `path`, of any format, and validates its names, shapes and types.

    Args:
        path: a folder or file; of a LoRA run, its base and its low-rank pairs are opened.
        model: member of the family whose shape replaces the checkpoint's own configuration.
        lora: LoRA run or PEFT folder whose low-rank pairs belong to the checkpoint.

    Raises:
        InputError: there is no checkpoint, or it is damaged, incomplete or not a LLaMA.
    """
    try:
        base, lora = base_and_pairs(path, lora)
        source = _open(base)
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): give another one") from error
    if base != path:  # a run may change the context and the rotary embedding of its base
        own, config = source.config, folders.read_run_config(path).model
        config = replace(config, quantized=own.quantized, param_dtype=own.param_dtype)
        source = replace(source, config=config)
    if model is not None:
        if model not in FAMILY:
            raise InputError(f"--model {model} is not known; the family is: {', '.join(FAMILY)}")
        own = source.config
        config = replace(FAMILY[model], dtype=own.dtype, param_dtype=own.param_dtype)
        source = replace(source, config=config)
    source = validate_source(source)
    return replace(source, pairs=open_pairs(lora, base, source.config)) if lora else source


def _open(path: AnyPath) -> Source:
    try:
        kind = folders.checkpoint_format(path)
    except FileNotFoundError as error:
        raise InputError(f"there is no {path}: give {_KINDS}") from error
    if kind == "gguf" and path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise InputError(f"{path} contains {len(files)} .gguf files: give one of them")
        return gguf.read(files[0])
    if kind is not None:
        return _READERS[kind](path)
    if is_peft_folder(path):
        raise InputError(
            f"{path} contains low-rank pairs of PEFT, and no model: give the model that they belong"
            f" to, with --lora {path}"
        )
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    weights = next((file for file in files if file.suffix in _WEIGHTS), None)
    if weights:
        raise InputError(
            f"{weights} contains weights without the configuration of their model: give a folder"
            " that also contains params.json or config.json"
        )
    raise InputError(f"{path} is not a checkpoint: give {_KINDS}")
