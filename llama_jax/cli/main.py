"""The command line, `llama-jax COMMAND`: parses arguments, runs a command, returns its exit code.

Each command is a module with its manual page (`MANUAL`), `add_arguments(parser)` and `run(args)`.
No module of this folder imports JAX or the configuration at module level, so that `--help` and
mistyped commands answer at once, and `train` handles SIGTERM before its long imports.
"""

import argparse
import atexit
import contextlib
import errno
import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence

from llama_jax import __version__
from llama_jax.cli import convert, data, eval, generate, info, plan, prepare, serve, tokenize, train
from llama_jax.errors import Fault, InputError
from llama_jax.runtime import stop_signal
from llama_jax.runtime.platform_choice import skip_missing_tpu
from llama_jax.runtime.storage import check_path

COMMANDS = {
    "train": train,
    "plan": plan,
    "data": data,
    "prepare": prepare,
    "tokenize": tokenize,
    "generate": generate,
    "serve": serve,
    "eval": eval,
    "convert": convert,
    "info": info,
}

# Arguments that contain paths.
_PATHS = ("config", "folder", "source", "sources", "out", "tokenizer", "text", "picture", "data")

# Faults of the machine that can occur anywhere: the system's message is all that a user needs.
_SYSTEM_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES)
_SYSTEM_FAULTS += (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 for a failed run, 2 for bad input."""
    # Python's last garbage collection takes 0.3 s with JAX; it skips frozen objects.
    atexit.register(gc.freeze)
    argv = sys.argv[1:] if argv is None else argv
    with _handle_sigterm(argv):
        return _run(argv)
    return 0  # SIGTERM stopped `train`


def _run(argv: Sequence[str]) -> int:
    args = _parse(argv)
    # asyncio and users of absl log tracebacks of errors that are reported below in one sentence.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        _check_paths(args)
        skip_missing_tpu()
        return COMMANDS[args.name].run(args)
    except (InputError, Fault) as error:
        print(f"llama-jax {args.name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except BrokenPipeError:  # the reader of standard output has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in _SYSTEM_FAULTS:
            raise
        print(f"llama-jax {args.name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="llama-jax", description="LLaMA in JAX: train, run and inspect models."
    )
    parser.add_argument("--version", action="version", version=f"llama_jax {__version__}")
    subparsers = parser.add_subparsers(dest="name", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.MANUAL.split("\n")[0],
            description=command.MANUAL,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in argv[:1]:  # the arguments of `train` need the configuration, 0.1 s
            command.add_arguments(subparser)
    args, rest = parser.parse_known_args(argv)
    # argparse accepts consecutive overrides only; here overrides may also follow flags.
    if "overrides" in args and not any(word.startswith("-") for word in rest):
        args.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _check_paths(args: argparse.Namespace) -> None:
    """Checks that every path names a kind of storage that is supported.

    Raises:
        InputError: one doesn't.
    """
    for name in _PATHS:
        given = getattr(args, name, None) or []
        for path in [given] if isinstance(given, str) else given:
            check_path(path)


def _handle_sigterm(argv: Sequence[str]) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which SIGTERM ends the command in its own way."""
    match [*argv[:1]]:
        case ["train"]:
            command = " ".join(["llama-jax", *argv])
            return stop_signal.exit_at_sigterm(
                f"stopped on SIGTERM: there was nothing to save; start again with: {command}"
            )
        case ["tokenize" | "convert" | "prepare"]:
            return _unwind_at_sigterm()
    return contextlib.nullcontext()  # `serve` installs its own handler


@contextlib.contextmanager
def _unwind_at_sigterm() -> Iterator[None]:
    """Makes SIGTERM exit with 143 through all `with` blocks, which remove incomplete files."""

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would interrupt the removal
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
