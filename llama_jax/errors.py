"""The exceptions whose message is all that a user needs."""


class InputError(ValueError):
    """Something given to the program is wrong: its message is one sentence for the user.

    The message says what is wrong, where, and what to do. The command line prints it without a
    traceback and exits with code 2.
    """


class Fault(RuntimeError):
    """The machine has failed, not what it was given: a full disk, a permission, memory, a network.

    The message is one sentence that holds the system's own words. It never says that a file is
    damaged, and never advises to remove one. The command line prints it without a traceback and
    exits with code 1.
    """


def missing_extra(what: str, extra: str) -> InputError:
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
