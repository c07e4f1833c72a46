"""Collects the small files of a converted checkpoint: tokenizer, chat template, config.json."""

from collections.abc import Iterable
from typing import NamedTuple

from llama_jax.checkpoint import folders
from llama_jax.config.model import ModelConfig
from llama_jax.convert.formats.huggingface import config_json
from llama_jax.convert.source import Source
from llama_jax.convert.trained_tokenizer import complete_tokenizer
from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath, parse_path
from llama_jax.tokenizer.export import huggingface_files, tiktoken_bytes
from llama_jax.tokenizer.gguf import has_tokenizer
from llama_jax.tokenizer.huggingface import TokenizerJson
from llama_jax.tokenizer.settings import to_json
from llama_jax.tokenizer.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer


class TokenizerFiles(NamedTuple):
    """The small files to write next to the weights, and the tokenizer from which they come."""

    files: dict[str, bytes]
    tokenizer: Tokenizer | None
    notes: list[str]

    @property
    def end_ids(self) -> Iterable[int]:
        """The IDs of the tokens that end a text."""
        return self.tokenizer.end_ids if self.tokenizer else ()


def collect_tokenizer_files(
    source: Source, config: ModelConfig, to: str, given: str | AnyPath | None
) -> TokenizerFiles:
    """Returns the files that the format `to` requires in addition to the weights.

    Args:
        source: the checkpoint.
        config: configuration of the output.
        to: orbax, hf, meta or peft.
        given: file or folder of a tokenizer; None: the checkpoint's own.

    Raises:
        InputError: the tokenizer is damaged, or of an unknown kind.
    """
    path = _find_tokenizer(source) if given is None else parse_path(given)
    is_fine_tune, base = _base_tokenizer(source)
    try:
        tokenizer = path and load_tokenizer(path)
    except OSError as error:
        raise InputError(
            f"the tokenizer of {path} can't be read ({error.strerror}): give another one"
        ) from error
    if tokenizer and is_fine_tune:
        tokenizer = complete_tokenizer(tokenizer, base and load_tokenizer(base))
    if tokenizer and {"tokenizer.model", "tokenizer.json"} <= tokenizer.files.keys():
        # load_tokenizer has parsed tokenizer.model alone; tokenizer.json is written too.
        json_path = tokenizer.path.with_name("tokenizer.json")
        TokenizerJson(json_path, tokenizer.files["tokenizer.json"], tokenizer.files)
    notes = list[str]()
    files = dict[str, bytes]()
    if to in ("hf", "peft"):
        files = huggingface_files(tokenizer) if tokenizer else {}
        if to == "hf":
            bos, ends = (tokenizer.bos_id, tokenizer.end_ids) if tokenizer else (None, ())
            files = {"config.json": to_json(config_json(config, bos, ends))} | files
    elif tokenizer and to == "orbax":
        files = dict(tokenizer.files)
    elif tokenizer:
        model = tokenizer.files.get("tokenizer.model")
        model = model or tiktoken_bytes(tokenizer.files["tokenizer.json"])
        if model:
            files = {"tokenizer.model": model}
        else:
            notes.append(
                "Meta's format can't represent this tokenizer.json: the output has no tokenizer"
            )
    return TokenizerFiles(files, tokenizer, notes)


def _find_tokenizer(source: Source) -> AnyPath | None:
    """Returns the path of the checkpoint's tokenizer: in its folder, or in the parent of Meta's.

    The tokenizer with which low-rank pairs were trained comes first. Meta released LLaMA with one
    tokenizer next to the folders of all sizes.
    """
    if source.pairs and _has_tokenizer(source.pairs.folder):
        return source.pairs.folder
    return _own_tokenizer(source)


def _own_tokenizer(source: Source) -> AnyPath | None:
    if source.path.is_file():
        return source.path if source.kind == "gguf" and has_tokenizer(source.path) else None
    candidates = [source.path, source.path.parent] if source.kind == "meta" else [source.path]
    return next(filter(_has_tokenizer, candidates), None)


def _has_tokenizer(folder: AnyPath) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _base_tokenizer(source: Source) -> tuple[bool, AnyPath | None]:
    """Returns whether a source is a fine-tune, and the path of its base's tokenizer, if known."""
    if source.pairs:
        return True, _own_tokenizer(source)
    if source.kind != "orbax" or not folders.is_run_folder(source.path):
        return False, None
    init_from = folders.read_run_config(source.path).training.init_from
    found = init_from is not None and _has_tokenizer(parse_path(init_from))
    return init_from is not None, parse_path(init_from) if init_from and found else None
