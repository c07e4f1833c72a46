"""What model folders and run folders say of themselves, their weights aside."""

import json
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from llama_jax import config_file
from llama_jax.config import Config
from llama_jax.errors import InputError
from llama_jax.family import ModelConfig
from llama_jax.storage import check_local


def is_run(folder: Path) -> bool:
    """Tells whether `folder` is a run folder (and not a model folder)."""
    return (folder / "config.yaml").is_file()


def read_model_config(folder: str | Path) -> ModelConfig:
    """Returns the shape of the model in a model folder or run folder.

    Raises:
        InputError: the folder is neither, or its configuration is damaged.
    """
    folder = Path(check_local(str(folder)))
    if is_run(folder):
        return read_run_config(folder).model
    path = folder / "config.json"
    if not path.is_file():
        what = "is neither a run folder nor a model folder" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {what}: give one that has a config.yaml or a config.json")
    try:
        config = TypeAdapter(ModelConfig).validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = "".join(f"{part} " for part in problem["loc"])
        raise InputError(
            f"{path} is not the configuration of a llama_jax model ({key[:200]}"
            f"{problem['msg'][:200].lower()}): correct it"
        ) from error
    _check_receipt(folder / "receipt.json", config)
    return config


def _check_receipt(path: Path, config: ModelConfig) -> None:
    """Refuses a configuration that is not the one that the weights were converted with."""
    if not path.is_file():
        return
    try:
        converted = ModelConfig(**json.loads(path.read_bytes())["config"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is damaged: convert the model again") from error
    changed = config.differences(converted)
    if changed:
        key = changed[0]
        says, had = (f"{getattr(c, key)}"[:80] for c in (config, converted))
        raise InputError(
            f"{path.with_name('config.json')} says {key} {says}, but the weights were converted"
            f" with {had} ({path.name}): correct it"
        )


def read_run_config(folder: Path) -> Config:
    """Returns the configuration that a run was started with."""
    return config_file.load(folder / "config.yaml")
