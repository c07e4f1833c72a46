"""LaTeX sources of papers, cleaned as in Lewkowycz et al. (2022); LLaMA's paper, section 2.1.

arXiv's bulk files are .tar of submissions: a submission is the .gz of one .tex file, or of a tar of
files. A single .tex, .ltx or .Rnw file (a vignette of R) is a document too.
"""

import gzip
import io
import posixpath
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import IO

from llama_jax.config.prepare import ArxivEntry
from llama_jax.data.prepare.document import Document
from llama_jax.data.prepare.latex_macros import expand_macros
from llama_jax.data.prepare.latex_verbatim import split_verbatim
from llama_jax.data.prepare.rules import Rule
from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath, open_file

SUFFIXES = (".tar", ".gz", ".tgz", ".tex", ".ltx", ".Rnw", ".Rtex")
_TEX = tuple(suffix.lower() for suffix in SUFFIXES[3:])
_PAPER = "arXiv 2302.13971, section 2.1, ArXiv"
_MAX_SUBMISSION = 1 << 28  # bytes, packed and unpacked: figures make few larger
_MAX_INPUT_DEPTH = 8  # of \input in \input
_INPUT = re.compile(
    r"\\(?:input|include|subfile)\s{0,9}\{([^{}\s]{1,200})\}|\\input\s{1,9}([\w./-]+)"
)
_MAIN = re.compile(r"^[^%\n]*\\document(?:class|style)\b", re.M)
# Everything before the first of these commands is removed.
_SECTION = re.compile(r"\\(?:part|chapter|(?:sub){0,2}section|(?:sub)?paragraph)\*?\s{0,9}[\[{]")
_LIST = re.compile(r"\\(begin|end)\{(?:thebibliography|references|REFERENCES)\}")
_BIBLIOGRAPHY = re.compile(
    r"\\(?:bibliography|bibliographystyle|addbibresource)\s{0,9}\{[^{}]{0,1000}\}"
    r"|\\printbibliography(?:\[[^\[\]]{0,1000}\])?"
)
_COMMENT = re.compile(r"\\verb\*?([!-)+-/:-@\[-`{-~])[^\n]*?\1|\\[^\n]|%")
_COMMENT_ENVIRONMENT = re.compile(r"\\(begin|end)\{comment\}")


def read(path: AnyPath) -> Iterator[Document]:
    """Yields the documents of a raw file: submissions of a .tar, one submission, or a .tex file.

    Submissions without LaTeX (a PDF alone) and those above 256 MiB yield nothing.

    Raises:
        InputError: the file can't be read, or is damaged.
    """
    try:
        with open_file(path) as file:
            if path.suffix == ".tar":
                yield from _read_bulk(file)
            else:
                name = PurePosixPath(path.name)
                identifier = name.stem if name.suffix == ".gz" else str(name)
                yield from _read_submission(path.name, identifier, file.read(_MAX_SUBMISSION + 1))
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is damaged or truncated ({error}): fetch it again") from error
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}") from error


def rules(settings: ArxivEntry) -> list[Rule]:
    """Returns the rules for LaTeX, in their order: macros are defined before the first section."""
    del settings  # nothing to choose
    return [
        Rule("comments", _PAPER, _change(remove_comments)),
        Rule("macros", _PAPER, _change(expand_macros)),
        Rule("before the first section", _PAPER, _change(remove_preamble)),
        Rule("bibliography", _PAPER, _change(remove_bibliography)),
    ]


def _change(function: Callable[[str], str]) -> Callable[[Document], Document | None]:
    """Returns a rule's function that changes the text; it removes a document without text."""

    def apply(document: Document) -> Document | None:
        text = function(document.text)
        return document._replace(text=text) if text.strip() else None

    return apply


def remove_comments(text: str) -> str:
    r"""Returns LaTeX without its comments: from % to the end of a line, and comment environments.

    `\%`, `\verb|%|` and the code of verbatim environments and R chunks are no comments.
    """
    pieces = []
    for is_verbatim, piece in split_verbatim(text):
        if not is_verbatim:
            lines = (_without_comment(line) for line in io.StringIO(piece))
            piece = _remove_between(_COMMENT_ENVIRONMENT, "".join(lines))
        pieces.append(piece)
    return "".join(pieces)


def _without_comment(line: str) -> str:
    """Returns a line until its first comment; '' if it has nothing else."""
    for match in _COMMENT.finditer(line) if "%" in line else ():
        if match[0] == "%":
            before = line[: match.start()]
            return before.rstrip() + "\n" if before.strip() else ""
    return line


def remove_preamble(text: str) -> str:
    """Returns LaTeX from its first section on; '' if it has no section."""
    first = _SECTION.search(text)
    return text[first.start() :].split(r"\end{document}", 1)[0] if first else ""


def remove_bibliography(text: str) -> str:
    """Returns LaTeX without its list of references and the commands that print it."""
    return _BIBLIOGRAPHY.sub("", _remove_between(_LIST, text))


def _remove_between(border: re.Pattern[str], text: str) -> str:
    """Returns the text without its parts from a `begin` to the next `end`, or to the text's end."""
    pieces, position = [], 0
    is_inside = False
    for match in border.finditer(text):
        if match[1] == "begin" and not is_inside:
            pieces.append(text[position : match.start()])
            is_inside = True
        elif match[1] == "end" and is_inside:
            position, is_inside = match.end(), False
    return "".join([*pieces, "" if is_inside else text[position:]])


def _read_bulk(file: IO[bytes]) -> Iterator[Document]:
    """Yields the submissions of a bulk file; only one is in memory at a time."""
    with tarfile.open(fileobj=file, mode="r|") as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is None or member.size > _MAX_SUBMISSION:
                continue
            name = PurePosixPath(member.name)
            is_source = name.suffix == ".gz" or name.name.lower().endswith(_TEX)
            if is_source:
                identifier = str(name.with_suffix(""))
                yield from _read_submission(member.name, identifier, content.read())


def _read_submission(name: str, identifier: str, data: bytes) -> Iterator[Document]:
    """Yields the main files of a submission, each with the files that it inputs."""
    if name.endswith((".gz", ".tgz")):
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            data = stream.read(_MAX_SUBMISSION + 1)
    if len(data) > _MAX_SUBMISSION:
        return
    if not _is_tar(data):
        if b"\0" not in data[:4096] and not data.startswith((b"%PDF", b"%!PS")):
            yield Document(identifier, _decode(data), {})
        return
    files = dict[str, str]()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content and member.name.lower().endswith(_TEX):
                files[posixpath.normpath(member.name)] = _decode(content.read())
    main = [file for file, text in files.items() if _MAIN.search(text)] or list(files)
    included = {
        file
        for parent in main
        for match in _INPUT.finditer(files[parent])
        if (file := _find_input(match, parent, files))
    }
    main = [file for file in main if file not in included] or main
    for file in sorted(main):
        others = files.copy()
        text = _inline(file, others.pop(file), others)
        yield Document(f"{identifier}/{file}" if len(main) > 1 else identifier, text, {})


def _is_tar(data: bytes) -> bool:
    return data[257:262] == b"ustar" or (len(data) >= 512 and tarfile.is_tarfile(io.BytesIO(data)))


def _decode(data: bytes) -> str:
    """Returns text in UTF-8, else in Latin-1, with plain line ends."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _find_input(match: re.Match[str], parent: str, files: Mapping[str, str]) -> str | None:
    """Returns the file that an `input` command names."""
    target = match[1] or match[2]
    for folder in (posixpath.dirname(parent), ""):
        for suffix in ("", ".tex"):
            file = posixpath.normpath(posixpath.join(folder, target + suffix))
            if file in files and file != parent:
                return file
    return None


def _inline(file: str, text: str, files: dict[str, str], depth: int = 0) -> str:
    """Returns the text of a file with the files that it inputs in their places, each once."""

    def replace(match: re.Match[str]) -> str:
        target = _find_input(match, file, files) if depth < _MAX_INPUT_DEPTH else None
        return _inline(target, files.pop(target), files, depth + 1) if target else match[0]

    return _INPUT.sub(replace, text)
