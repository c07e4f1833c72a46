"""`llama-jax info`."""

import argparse

from llama_jax.cli.arguments import parse_picture
from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath, parse_path

MANUAL = """\
Describe a run folder, a model folder or a folder of token shards on one screen.

With --show N, also print the first N windows of token shards as the model sees them: with special
tokens, with the tokens that it learns in color (⟦between marks⟧ if the output is no terminal), and
with the borders of documents or examples.

With --picture, also draw loss, gradient norm, tokens/s, goodput, restarts, spikes and rewinds of a
run on one time axis, into run.png in its folder or into FILE (.png or .svg).

With --spike STEP, print instead what a run has recorded of a spike of its loss or gradient norm:
the losses and sources of the rows, the norms of each layer before the step, and the text of the
four rows with the highest losses. STEP-2 is the second spike of a step, after a rewind.

With --verify, read every byte of a run's checkpoints, of a model folder or of token shards instead,
and compare it with its checksum. The exit code is 1 if anything is damaged.

example:
  llama-jax info runs/quickstart
  llama-jax info data/quickstart
  llama-jax info data/quickstart --show 3
  llama-jax info runs/quickstart --picture quickstart.png
  llama-jax info runs/quickstart --spike 131
  llama-jax info runs/quickstart --verify
"""

_SPIKE_ROWS = 4  # with text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--verify", action="store_true", help="read and verify every byte")
    parser.add_argument("--spike", metavar="STEP", help="print the record of a spike of a run")
    parser.add_argument("--show", type=int, metavar="N", help="print N windows of token shards")
    parser.add_argument(
        "--picture", nargs="?", const="", metavar="FILE", help="draw a run over time (run.png)"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the description; returns the exit code."""
    from llama_jax.cli.describe_folder import check_exists, describe
    from llama_jax.cli.show_windows import show_windows

    folder = parse_path(args.folder)
    if args.spike is not None:
        from llama_jax.cli.show_replay import show_spike

        _check_run(folder, "--spike shows a spike of")
        show_spike(folder, args.spike, _SPIKE_ROWS)
        return 0
    if not args.verify:
        picture = parse_picture(args.picture) if args.picture else folder / "run.png"
        print(describe(folder))
        if args.show is not None:
            print(show_windows(folder, args.show))
        if args.picture is not None:
            _draw(folder, picture)
        return 0
    from llama_jax.checkpoint.verify_folder import describe_verdicts, verify_folder

    check_exists(folder)
    verdicts = verify_folder(folder)
    print("\n".join(describe_verdicts(folder, verdicts) or [f"{folder} has no checkpoint yet"]))
    return int(any(verdict.damage for verdict in verdicts))


def _check_run(folder: AnyPath, option: str) -> None:
    from llama_jax.checkpoint import folders

    if not folders.is_run_folder(folder):
        raise InputError(f"{option} a run, and {folder} is none: give a run folder")


def _draw(folder: AnyPath, picture: AnyPath) -> None:
    from llama_jax.training.run_figure import draw_run

    _check_run(folder, "--picture draws")
    draw_run(folder, picture)
    print(f"picture     {picture}")
