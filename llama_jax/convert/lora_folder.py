"""Opens the low-rank pairs of a LoRA run or of a PEFT folder."""

from llama_jax.checkpoint.folders import is_lora_run, read_run_config
from llama_jax.checkpoint.lora_pairs import (
    StoredPairs,
    base_of_run,
    check_base,
    read_lora_run,
    stored_base,
)
from llama_jax.config.model import ModelConfig
from llama_jax.convert import receipt
from llama_jax.convert.formats import peft
from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath


def base_and_pairs(path: AnyPath, lora: AnyPath | None) -> tuple[AnyPath, AnyPath | None]:
    """Returns the checkpoint and the folder of pairs: of a LoRA run, its base and the run itself.

    Raises:
        InputError: `path` is a LoRA run, and `lora` is given too.
    """
    if not is_lora_run(path):
        return path, lora
    if lora is not None:
        raise InputError(
            f"{path} is a LoRA run, which has low-rank pairs of its own: remove --lora, or give the"
            " model that it started from"
        )
    return base_of_run(path), path


def quantization_note(pairs: StoredPairs, config: ModelConfig) -> list[str]:
    """Returns a warning if pairs are merged into other weights than they were trained beside.

    Args:
        pairs: the low-rank pairs.
        config: of the base, as it is stored.
    """
    if not is_lora_run(pairs.folder):
        return []
    trained = read_run_config(pairs.folder).model.quantized
    if trained == config.quantized:
        return []
    return [
        f"{pairs.folder} was trained beside {trained} weights, and its pairs are merged into the"
        " weights from which those were quantized: measure both with llama-jax eval"
    ]


def open_pairs(folder: AnyPath, base: AnyPath, config: ModelConfig) -> StoredPairs:
    """Returns the low-rank pairs in `folder`.

    Args:
        folder: a LoRA run, or a PEFT folder.
        base: the model that they are for.
        config: of the base.

    Raises:
        Damaged: the run's checkpoint is damaged.
        InputError: `folder` is neither, or its pairs are not for this base.
    """
    if peft.is_peft_folder(folder):
        if (folder / receipt.FILE).is_file():  # `peft_export` wrote the folder
            match receipt.read_receipt(folder):
                case {"lora": {"base": str(expected)}}:
                    check_base(folder, base, expected)
        return peft.read(folder, config)
    if not is_lora_run(folder):
        raise InputError(
            f"{folder} is neither a LoRA run (a config.yaml with the section lora) nor a PEFT"
            f" folder (an {peft.CONFIG}): give one of them"
        )
    check_base(folder, base, stored_base(folder))
    return read_lora_run(folder, config)
