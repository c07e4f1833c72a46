"""A file of sections of 64-bit numbers, any range of which can be read alone, also in a bucket."""

from collections.abc import Iterable

import numpy as np

from llama_jax.data.prepare.document import replace_any_file
from llama_jax.runtime.storage import AnyPath, open_file

_SIZE = 8  # bytes of a number


def write_numbers(path: AnyPath, *sections: Iterable[np.ndarray]) -> None:
    """Writes sections of uint64 numbers, one after the other; the file appears complete.

    Args:
        path: of the file.
        sections: the arrays of each section. Each array is written before the next one is taken.

    Raises:
        Fault: the system can't write it.
    """
    ends = list[int]()
    with replace_any_file(path) as partial, open(partial, "wb") as file:
        for section in sections:
            for array in section:
                file.write(np.ascontiguousarray(array, "<u8").data)
            ends.append(file.tell() // _SIZE)
        file.write(np.array([*ends, len(ends)], "<u8").data)


class NumberFile:
    """A file of `write_numbers`, open for reading.

    Raises:
        OSError: the file can't be read.
    """

    def __init__(self, path: AnyPath) -> None:
        self._file = open_file(path)
        end = self._file.seek(-_SIZE, 2) // _SIZE
        count = int(self._numbers(end, 1)[0])
        ends = self._numbers(end - count, count).tolist()
        self._bounds = [*zip([0, *ends], ends, strict=False)]

    def _numbers(self, first: int, count: int) -> np.ndarray:
        self._file.seek(first * _SIZE)
        return np.frombuffer(self._file.read(count * _SIZE), "<u8")

    def read(self, section: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns the numbers `start` to `stop` of a section: uint64 [stop - start]."""
        first, end = self._bounds[section]
        return self._numbers(first + start, (end if stop is None else first + stop) - first - start)

    def read_range(self, section: int, section_of_ends: int, number: int) -> np.ndarray:
        """Returns range `number` of a section, whose bounds are numbers of another section."""
        start, stop = self.read(section_of_ends, number, number + 2).tolist()
        return self.read(section, start, stop)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
