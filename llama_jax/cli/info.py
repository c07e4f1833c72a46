"""`llama-jax info`."""

import argparse

from llama_jax.runtime.storage import parse_path

MANUAL = """\
Describe a run folder, a model folder or a folder of token shards on one screen.

example:
  llama-jax info runs/quickstart
  llama-jax info data/quickstart
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("folder", metavar="FOLDER")


def run(args: argparse.Namespace) -> int:
    """Prints the description; returns the exit code."""
    from llama_jax.cli.describe_folder import describe

    print(describe(parse_path(args.folder)))
    return 0
