"""Distinguishes damaged files from faults of the machine."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from llama_jax.errors import Fault, InputError

# The exceptions that a fault of the machine raises in Python and in TensorStore (ValueError).
FAULTS: tuple[type[Exception], ...] = (OSError, MemoryError, ValueError)
# The exceptions and statuses of a missing file, or a file with invalid content. The message of a
# TensorStore error begins with the name of its status, except for INVALID_ARGUMENT.
_DAMAGE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, UnicodeDecodeError)
_STATUS = re.compile(r"(DATA_LOSS|OUT_OF_RANGE|NOT_FOUND|FAILED_PRECONDITION): |Error \w+ing ")
_NOT_DAMAGE = "byte range .* was ignored by server"  # FAILED_PRECONDITION too, of a proxy


class Damaged(InputError):
    """Stored files are not those that were written: cut short, changed or missing.

    Args:
        where: the folder.
        reason: the file, and how it differs.
    """

    def __init__(self, where: Any, reason: str):
        super().__init__(
            f"{where} is damaged or cut short ({reason}): put a copy in its place, or create it"
            " again"
        )
        self.reason = reason


@contextlib.contextmanager
def classify_errors(where: Any, faults: tuple[type[Exception], ...] = FAULTS) -> Iterator[None]:
    """Replaces an error in the block by one that says whether the files in `where` are damaged.

    An error is called damage only if it certainly is: a user who trusts the message may delete
    good files.

    Raises:
        Damaged: a file is missing, or its content is invalid.
        Fault: the machine could not read it.
    """
    try:
        yield
    except (InputError, Fault):
        raise
    except faults as error:
        text = str(error)
        certain = _STATUS.match(text) and not re.search(_NOT_DAMAGE, text)
        if isinstance(error, _DAMAGE) or certain:
            raise Damaged(where, root_cause(error)) from error
        raise Fault(
            f"{where} could not be read ({root_cause(error)}): its files may be intact; fix the"
            " cause and try again"
        ) from error


def root_cause(error: BaseException) -> str:
    """Returns the message of the first error in a chain, without TensorStore's appended details."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = re.split(r" \[(?:tensorstore_spec|os_error_code|source)", lines[0])[0]
    return text if len(text) <= 200 else f"{text[:40]} … {text[-150:]}"
