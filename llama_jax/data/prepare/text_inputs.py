"""Raw inputs that are text already: the kind of a file by its name, and JSON lines."""

from collections.abc import Iterator
from pathlib import PurePosixPath

from llama_jax.data.prepare.document import Document
from llama_jax.data.text_files import COMPRESSED, is_json_lines, parse_json_line, read_lines
from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath

HTML_SUFFIXES = (".html", ".htm", ".xhtml")


def inner_suffix(path: AnyPath) -> str:
    """Returns the suffix of a file without that of its compression, in lower case: `.xml`."""
    name = PurePosixPath(path.name.lower())
    return PurePosixPath(name.stem).suffix if name.suffix in COMPRESSED else name.suffix


def read_json_documents(path: AnyPath, *fields: str) -> Iterator[Document]:
    """Yields the documents of JSON lines with `text`, and optionally `id` and other strings.

    Args:
        path: of the file.
        fields: names whose values become metadata, where a line has them.

    Raises:
        InputError: the file can't be read or is of another kind, or a line has no `text`.
    """
    if not is_json_lines(path):
        raise InputError(
            f"{path} is of no kind that this source reads: give the kinds that its manual names,"
            " or JSON lines"
        )
    for location, line in read_lines(path):
        record = parse_json_line(line, location)
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise InputError(f'{location}: a line needs a string "text": correct or remove it')
        metadata = {name: value for name in fields if isinstance(value := record.get(name), str)}
        yield Document(str(record.get("id", location)), text, metadata)
