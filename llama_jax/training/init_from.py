"""Checks the model folder `training.init_from`, from which a run without a checkpoint starts."""

from llama_jax.checkpoint import folders
from llama_jax.config.run import Config
from llama_jax.data.batches import Batches
from llama_jax.errors import InputError
from llama_jax.runtime.console import print_status
from llama_jax.runtime.storage import parse_path
from llama_jax.tokenizer.tokenizer import TOKENIZER_FILES, file_hash, load_tokenizer

# The run may use the weights with other values of these; it prints the change.
_MAY_CHANGE = ("context", "norm_eps", "rope_theta", "rope_scaling")
_COMPARED_TOKENS = 2000  # of the data: two different tokenizers differ within a few sentences


def check_shape(config: Config) -> None:
    """Compares the model of the configuration with that of `training.init_from`.

    Raises:
        InputError: the folder is no model, is quantized, or has another shape.
    """
    source = config.training.init_from
    if source is None:
        return
    theirs = folders.read_model_config(source)
    for name in config.model.differences(theirs):
        ours, other = getattr(config.model, name), getattr(theirs, name)
        if name == "quantized" and config.lora:
            if other != "none":
                raise InputError(
                    f"the weights in {source}, training.init_from, are {other}: set model.quantized"
                    f" to {other}"
                )
            print_status(f"the weights in {source} are quantized to {ours} when they are loaded")
            continue
        if name == "quantized":
            raise InputError(
                f"training.init_from: the weights in {source} are {other}, for inference only: give"
                " the folder that it was converted from, or train low-rank pairs (lora)"
            )
        if name not in _MAY_CHANGE:
            raise InputError(
                f"model.{name} is {ours}, but the model in {source}, training.init_from, has"
                f" {other}: set the section `model` to its numbers"
            )
        print_status(f"model.{name} is {ours}, but {source} was trained with {other}")


def tokenizer_source(config: Config) -> str | None:
    """Returns the path of the tokenizer for `data.corpus`, or None to train one."""
    return config.data.tokenizer or config.training.init_from


def check_tokenizer(config: Config, data: Batches) -> None:
    """Compares the tokenizer of the data with that of `training.init_from`, if that has one.

    The files of one tokenizer differ by format (Meta's and Hugging Face's), so this function
    compares the tokens that both give for the start of the data.

    Raises:
        InputError: the same text has different tokens.
    """
    source = config.training.init_from
    if source is None or not any((parse_path(source) / name).is_file() for name in TOKENIZER_FILES):
        return
    tokens = data.splits["train"][0]
    theirs = load_tokenizer(source)
    if file_hash(theirs.path) == tokens.meta["tokenizer_sha256"]:
        return
    ours = load_tokenizer(tokens.folder)
    ids, _ = tokens.read(0, min(_COMPARED_TOKENS, len(tokens)))
    text = ours.decode(ids.tolist())
    if ours.encode(text, bos=True, eos=True) != theirs.encode(text, bos=True, eos=True):
        raise InputError(
            f"{tokens.folder} was tokenized with another tokenizer than that of {source},"
            " training.init_from, so its token ids stand for other text there: tokenize it again"
            f" with `llama-jax tokenize --tokenizer {source}`"
        )
