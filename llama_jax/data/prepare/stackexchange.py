"""Questions of Stack Exchange with their answers; LLaMA's paper, section 2.1.

Reads Posts.xml as unpacked from Stack Exchange's dumps: one row per post, in the order of ids. A
question and its answers may be any distance apart; they meet in partitions on the local disk.
"""

import contextlib
import html
import json
import re
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

from llama_jax.config.prepare import StackExchangeEntry
from llama_jax.data.prepare.document import Document
from llama_jax.data.prepare.rules import Rule
from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath, file_size, open_file

_PAPER = "arXiv 2302.13971, section 2.1, Stack Exchange"
_QUESTION, _ANSWER = "1", "2"  # PostTypeId; the other types have no questions and answers
_PARTITION_BYTES = 1 << 28  # of XML: what is in memory at once, a few times as large as objects
_MAX_PARTITIONS = 1000  # open files
_TAG = re.compile(r"<!--[^<>]{0,1000}-->|<(/?)([A-Za-z][A-Za-z0-9]{0,20})(?:[\s/][^<>]*)?>")
_PARAGRAPHS = {
    "p",
    "div",
    "pre",
    "blockquote",
    "ul",
    "ol",
    "table",
    "hr",
    *(f"h{n}" for n in range(1, 7)),
}
_LINES = {"br", "li", "tr", "dt", "dd"}
_SPACES = re.compile(r"\s+")
_EMPTY_LINES = re.compile(r"\n{3,}")


def read(path: AnyPath) -> Iterator[Document]:
    """Yields each question of a site with its answers, from the highest score to the lowest.

    The text is HTML: the title, the question and the answers. Answers without a question, and posts
    of other types, are left out. The local disk needs as much space as the file; memory is bounded.

    Raises:
        InputError: the file can't be read, or is not a table of posts.
    """
    partitions = min(1 + file_size(path) // _PARTITION_BYTES, _MAX_PARTITIONS)
    site = path.parent.name if path.name == "Posts.xml" else path.name.removesuffix(".xml")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llama_jax-posts-")))
        files = [
            stack.enter_context(
                open(folder / str(number), "w+", encoding="utf-8", errors="replace")
            )
            for number in range(partitions)
        ]
        for row in _read_rows(path):
            if row.get("PostTypeId") in (_QUESTION, _ANSWER):
                is_answer = row["PostTypeId"] == _ANSWER
                question = _number(row.get("ParentId" if is_answer else "Id"))
                json.dump((question, is_answer, row), files[question % partitions])
                files[question % partitions].write("\n")
        for file in files:
            yield from _read_partition(file, site)


def rules(settings: StackExchangeEntry) -> list[Rule]:
    """Returns the rules for questions and answers."""
    selected = [_select_sites(settings.sites)] if settings.sites else []
    return [*selected, Rule("HTML", _PAPER, _remove_html)]


def _select_sites(sites: Collection[str]) -> Rule:
    return Rule("site", _PAPER, lambda d: d if d.metadata["site"] in sites else None)


def _remove_html(document: Document) -> Document | None:
    text = remove_tags(document.text)
    return document._replace(text=text) if text else None


def remove_tags(text: str) -> str:
    """Returns the text of HTML: paragraphs between blank lines, code with its line breaks."""
    pieces, position, preformatted = ["\n"], 0, 0

    def add(part: str) -> None:
        if not preformatted:
            part = _SPACES.sub(" ", part)
            part = part.lstrip() if pieces[-1].endswith("\n") else part
        if part:
            pieces.append(html.unescape(part))

    for match in _TAG.finditer(text):
        add(text[position : match.start()])
        position = match.end()
        name = (match[2] or "").lower()
        if name == "pre":
            preformatted = max(0, preformatted + (-1 if match[1] else 1))
        if name in _PARAGRAPHS:
            pieces.append("\n\n")
        elif name in _LINES and (name == "br" or not match[1]):
            pieces.append("\n- " if name == "li" else "\n")
    add(text[position:])
    lines = "".join(pieces).split("\n")
    return _EMPTY_LINES.sub("\n\n", "\n".join(line.rstrip() for line in lines)).strip()


def _read_rows(path: AnyPath) -> Iterator[dict[str, str]]:
    """Yields the attributes of each row.

    Raises:
        InputError: the file can't be read, or is not XML with rows.
    """
    found = False
    try:
        with open_file(path) as file:
            events = ElementTree.iterparse(file, events=("start", "end"))
            _, root = next(events)
            for event, element in events:
                if event == "end" and element.tag == "row":
                    found = True
                    yield dict(element.attrib)
                    root.clear()  # else all rows stay in memory
    except ElementTree.ParseError as error:
        raise InputError(
            f"{path} is not a complete Posts.xml ({error}): unpack it again"
        ) from error
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}") from error
    if not found:
        raise InputError(f"{path} has no rows: give the Posts.xml of a Stack Exchange dump")


def _read_partition(file: IO[str], site: str) -> Iterator[Document]:
    """Yields the questions of a partition in the order of their ids."""
    file.seek(0)
    questions = dict[int, dict[str, str]]()
    answers = dict[int, list[dict[str, str]]]()
    for line in file:
        number, is_answer, row = json.loads(line)
        if is_answer:
            answers.setdefault(number, []).append(row)
        else:
            questions[number] = row
    for number in sorted(questions):
        row, replies = questions[number], answers.get(number, [])
        replies.sort(key=lambda reply: (-_number(reply.get("Score")), _number(reply.get("Id"))))
        title = html.escape(row.get("Title", ""), quote=False)  # plain text, unlike the bodies
        bodies = (post.get("Body", "") for post in (row, *replies))
        metadata = {"site": site, "score": row.get("Score", ""), "answers": str(len(replies))}
        text = "".join(f"<div>{part}</div>\n" for part in (title, *bodies) if part.strip())
        yield Document(f"{site}/{number}", text, metadata)


def _number(value: str | None) -> int:
    try:
        return int(value or 0)
    except ValueError:
        return 0
