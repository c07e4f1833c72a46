"""`llama-jax info`."""

import argparse

from llama_jax.runtime.storage import parse_path

MANUAL = """\
Describe a run folder, a model folder or a folder of token shards on one screen.

With --verify, read every byte of a run's checkpoints, of a model folder or of token shards instead,
and compare it with its checksum. The exit code is 1 if anything is damaged.

example:
  llama-jax info runs/quickstart
  llama-jax info data/quickstart
  llama-jax info runs/quickstart --verify
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--verify", action="store_true", help="read and verify every byte")


def run(args: argparse.Namespace) -> int:
    """Prints the description; returns the exit code."""
    from llama_jax.cli.describe_folder import check_exists, describe

    folder = parse_path(args.folder)
    if not args.verify:
        print(describe(folder))
        return 0
    from llama_jax.checkpoint.verify_folder import describe_verdicts, verify_folder

    check_exists(folder)
    verdicts = verify_folder(folder)
    print("\n".join(describe_verdicts(folder, verdicts) or [f"{folder} has no checkpoint yet"]))
    return int(any(verdict.damage for verdict in verdicts))
