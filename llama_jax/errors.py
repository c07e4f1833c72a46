"""Exceptions whose message is complete: the command line prints it without a traceback."""

import importlib


class InputError(ValueError):
    """An input is wrong: a file, a flag, a configuration, a request.

    The message is one sentence that says what is wrong, where, and what to do. The command line
    exits with code 2.
    """


class Fault(RuntimeError):
    """The machine has failed, not the input: a full disk, a permission, memory, the network.

    The message is one sentence that contains the message of the system. It never calls a file
    damaged and never advises to remove one. The command line exits with code 1.
    """


def missing_extra(problem: str, extra: str) -> InputError:
    """Returns the error about a package of an optional extra that is not installed.

    Args:
        problem: which package is missing, and for what: 'the server needs uvicorn'.
        extra: name of the extra in pyproject.toml.
    """
    return InputError(f"{problem}: install it with {install_command(extra)}")


def check_package(module: str, use: str, extra: str) -> None:
    """Checks that a package of an optional extra is installed, before any work is done.

    Args:
        module: that is imported later.
        use: the package, and for what: 'rensa, which finds near-duplicates'.
        extra: name of the extra in pyproject.toml.

    Raises:
        InputError: it can't be imported.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise missing_extra(f"{use}, is missing", extra) from error


def install_command(extra: str) -> str:
    """Returns the command that installs an optional extra.

    pip adds the packages of the extra to an installed llama_jax, whether that came from a wheel or
    from a checkout.
    """
    return f"pip install 'llama_jax[{extra}]'"
