"""What comes along with the weights: the tokenizer, the end ids, the chat format."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from llama_jax.config.model import ModelConfig
from llama_jax.convert.formats.huggingface import config_json
from llama_jax.convert.source import Source
from llama_jax.errors import InputError
from llama_jax.tokenizer.export import huggingface_files, tiktoken_bytes
from llama_jax.tokenizer.gguf import has_tokenizer
from llama_jax.tokenizer.huggingface import TokenizerJson
from llama_jax.tokenizer.settings import to_json
from llama_jax.tokenizer.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer


class TokenizerFiles(NamedTuple):
    """Small files to be written beside the weights."""

    files: dict[str, bytes]
    tokenizer: Tokenizer | None
    notes: list[str]

    @property
    def end_ids(self) -> Iterable[int]:
        """The tokens that end a text."""
        return self.tokenizer.end_ids if self.tokenizer else ()


def collect_tokenizer_files(
    source: Source, config: ModelConfig, to: str, given: str | Path | None
) -> TokenizerFiles:
    """Returns the files that the format `to` wants beside the weights of `source`.

    Args:
        source: the checkpoint.
        config: of what is written.
        to: orbax, hf or meta.
        given: file or folder of another tokenizer than the checkpoint's own.

    Raises:
        InputError: the tokenizer is damaged, or of no known kind.
    """
    place = _tokenizer_of(source) if given is None else Path(given)
    try:
        tokenizer = place and load_tokenizer(place)
    except OSError as error:
        raise InputError(
            f"the tokenizer of {place} can't be read ({error.strerror}): give another one"
        ) from error
    if tokenizer and {"tokenizer.model", "tokenizer.json"} <= tokenizer.files.keys():
        beside = tokenizer.path.with_name("tokenizer.json")  # goes along, so it must be whole
        TokenizerJson(beside, tokenizer.files["tokenizer.json"], tokenizer.files)
    notes = list[str]()
    files = dict[str, bytes]()
    if to == "hf":
        bos, ends = (tokenizer.bos_id, tokenizer.end_ids) if tokenizer else (None, ())
        files = {"config.json": to_json(config_json(config, bos, ends))}
        files |= huggingface_files(tokenizer) if tokenizer else {}
    elif tokenizer and to == "orbax":
        files = dict(tokenizer.files)
    elif tokenizer:
        has = tokenizer.files
        known = has.get("tokenizer.model") or tiktoken_bytes(has["tokenizer.json"])
        if known:
            files = {"tokenizer.model": known}
        else:
            notes.append(
                "Meta's format has no place for this tokenizer.json: its folder has no tokenizer"
            )
    return TokenizerFiles(files, tokenizer, notes)


def _tokenizer_of(source: Source) -> Path | None:
    """Returns where the checkpoint's tokenizer is: in it, or beside it as Meta gave LLaMA out."""
    if source.path.is_file():
        return source.path if source.kind == "gguf" and has_tokenizer(source.path) else None
    folders = [source.path, source.path.parent] if source.kind == "meta" else [source.path]
    found = (f for f in folders if any((f / name).is_file() for name in TOKENIZER_FILES))
    return next(found, None)
