"""Errors that are told in one sentence: a bad input, and a system that can't write."""


class InputError(ValueError):
    """Something given to the program is wrong: its message is one sentence for the user.

    The message says what is wrong, where, and what to do. The command line prints it without a
    traceback and exits with code 2.
    """


class WriteError(OSError):
    """The system can't write a file or a folder: its message is one sentence for the user.

    That is a fault, not a bad input: the message holds the system's own text. The command line
    prints it without a traceback and exits with code 1.
    """


def missing(what: str, extra: str) -> InputError:
    """Returns the error about a package of an optional extra of ours that is not installed.

    pip adds an extra's packages to an installed llama_jax, from a wheel and from a checkout alike.

    Args:
        what: what lacks the package, and its name: 'the server needs uvicorn'.
        extra: as in pyproject.toml.
    """
    return InputError(f"{what}: install it with {install(extra)}")


def install(extra: str) -> str:
    """Returns the command that installs an optional extra."""
    return f"pip install 'llama_jax[{extra}]'"
