"""A document of a prepared source, and the files of documents: JSON lines in Zstandard."""

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from llama_jax.data.text_files import parse_json_line, read_lines
from llama_jax.errors import InputError
from llama_jax.runtime.atomic_write import replace_file
from llama_jax.runtime.storage import AnyPath, write_file

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


class Document(NamedTuple):
    """One text, the id that it has in its source, and what the source says about it."""

    id: str  # a URL, a path in a repository, a title
    text: str
    metadata: dict[str, str]


def write_lines(path: Path, documents: Iterable[Document]) -> None:
    """Writes documents as JSON lines with `id`, `text`, `metadata`, into a local file.

    The documents are written one by one. Equal documents give equal bytes.
    """
    with zstd.open(path, "wb") as file:
        file.write(b"")  # without documents the file has a frame, too
        for document in documents:
            line = json.dumps(document._asdict(), ensure_ascii=False)
            # Half a surrogate pair, which JSON's escapes can contain, has no UTF-8.
            file.write(line.encode(errors="replace") + b"\n")


@contextlib.contextmanager
def replace_any_file(path: AnyPath) -> Iterator[Path]:
    """Yields a local file to write; when the block ends, it is complete at `path`.

    Raises:
        Fault: the system can't write it.
    """
    if isinstance(path, Path):
        with replace_file(path) as partial:
            yield partial
        return
    with tempfile.TemporaryDirectory() as folder:
        partial = Path(folder, path.name)
        yield partial
        write_file(path, partial.read_bytes())


def read_documents(path: AnyPath) -> Iterator[Document]:
    """Yields the documents of a file that `write_lines` wrote.

    Raises:
        InputError: the file can't be read, or has other content.
    """
    for location, line in read_lines(path):
        match parse_json_line(line, location):
            case {"id": str(name), "text": str(text), "metadata": dict(metadata)}:
                yield Document(name, text, metadata)
            case _:
                raise InputError(f"{location} is not a document of `llama-jax prepare`")
