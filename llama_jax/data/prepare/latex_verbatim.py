"""The parts of a LaTeX source in which % and backslashes are plain characters.

These are the environments for code, and the chunks of R in .Rnw files: from a line `<<…>>=` to a
line that starts with @.
"""

import io
import re
from collections.abc import Iterator

_BEGIN = re.compile(r"\\begin\{((?:[vV]erbatim|lstlisting|minted|alltt|Sinput|Soutput)\*?)\}")


def split_verbatim(text: str) -> Iterator[tuple[bool, str]]:
    """Yields the pieces of a LaTeX source, complete lines, and whether each is verbatim."""
    lines: list[str] = []
    end = None  # of the verbatim piece that these lines are in
    for line in io.StringIO(text):
        if end is None:
            begin = _BEGIN.search(line) if "\\begin" in line else None
            is_chunk = line.startswith("<<") and line.rstrip().endswith(">>=")
            if begin or is_chunk:
                yield False, "".join(lines)
                lines = []
                end = rf"\end{{{begin[1]}}}" if begin else "@"
            lines.append(line)
            is_end = begin and end and end in line[begin.end() :]
        else:
            lines.append(line)
            is_end = line.startswith("@") if end == "@" else end in line
        if is_end:
            yield True, "".join(lines)
            lines, end = [], None
    yield end is not None, "".join(lines)
