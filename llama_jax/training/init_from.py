"""What a run starts from where it has no checkpoint yet: the model folder `training.init_from`."""

from pathlib import Path

from llama_jax.checkpoint import folders
from llama_jax.config.run import Config
from llama_jax.data.batches import Batches
from llama_jax.errors import InputError
from llama_jax.runtime.console import print_status
from llama_jax.tokenizer.tokenizer import TOKENIZER_FILES, file_hash, load_tokenizer

# Weights of one value can be computed with another; the run is told what it changes.
_MAY_CHANGE = ("context", "norm_eps", "rope_theta", "rope_scaling")
_COMPARED = 2000  # tokens of the data: whether two tokenizers are one shows in a few sentences


def check_shape(config: Config) -> None:
    """Compares the configuration's model with that of `training.init_from`, before any work.

    Raises:
        InputError: the folder is no model, is kept as int8, or has another shape.
    """
    source = config.training.init_from
    if source is None:
        return
    theirs = folders.read_model_config(source)
    for name in config.model.differences(theirs):
        ours, has = getattr(config.model, name), getattr(theirs, name)
        if name == "quantized":
            raise InputError(
                f"training.init_from: the weights in {source} are {has}, for inference alone: give"
                " the folder that it was made from"
            )
        if name not in _MAY_CHANGE:
            raise InputError(
                f"model.{name} is {ours}, but the model in {source}, training.init_from, has {has}:"
                " give the section `model` its numbers"
            )
        print_status(f"model.{name} is {ours}, but {source} was trained with {has}")


def tokenizer_of(config: Config) -> str | None:
    """Returns where the tokenizer is that `data.corpus` must be read with; None: train one."""
    return config.data.tokenizer or config.training.init_from


def check_tokenizer(config: Config, data: Batches) -> None:
    """Compares the tokenizer of the data with that of `training.init_from`, if it holds one.

    Two files of one tokenizer (Meta's and Hugging Face's) are not alike, so what counts is what
    they make of the beginning of the data.

    Raises:
        InputError: the same text has other tokens.
    """
    source = config.training.init_from
    if source is None or not any((Path(source) / name).is_file() for name in TOKENIZER_FILES):
        return
    tokens = data.splits["train"][0]
    theirs = load_tokenizer(source)
    if file_hash(theirs.path) == tokens.meta["tokenizer_sha256"]:
        return
    ours = load_tokenizer(tokens.folder)
    ids, _ = tokens.read(0, min(_COMPARED, len(tokens)))
    text = ours.decode(ids.tolist())
    if ours.encode(text, bos=True, eos=True) != theirs.encode(text, bos=True, eos=True):
        raise InputError(
            f"{tokens.folder} was made with another tokenizer than that of {source},"
            " training.init_from, so its numbers mean other texts there: make it again with"
            f" `llama-jax tokenize --tokenizer {source}`"
        )
