"""`llama-jax data`."""

import argparse
import json
from typing import TYPE_CHECKING

from llama_jax.cli.arguments import add_config, parse_picture
from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath, parse_path

if TYPE_CHECKING:
    from llama_jax.config.run import Config

MANUAL = """\
Print what a run reads of each source: share, tokens, epochs, size of the text.

It is the first table of LLaMA's paper, for your data. A sample is a window of data.seq_len tokens;
an epoch of a source has each of its windows once. If a folder doesn't exist yet, data.mixture may
state its size, as in configs/data/llama.yaml. A source that is read more often than its max_epochs
gets a warning (and `train` refuses the run).

CONFIG may also be a run folder: then the table has what the run has read until its newest
checkpoint, to the token. Overrides show the effect of a change before you resume the run.

--show STEP prints the first rows of the batch of a step (1 is the first) as the model sees them, as
`info DATA --show`.

example:
  llama-jax data configs/data/llama.yaml
  llama-jax data configs/data/llama.yaml data.mixture.data/books.max_epochs=2 --picture mixture.png
  llama-jax data runs/quickstart
  llama-jax data quickstart --show 100 --rows 2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_config(parser)
    parser.add_argument("--json", action="store_true", help="print JSON: tokens, bytes, epochs")
    parser.add_argument(
        "--picture", metavar="FILE", help="also draw tokens and epochs: FILE.png or FILE.svg"
    )
    parser.add_argument("--show", type=int, metavar="STEP", help="print rows of a step instead")
    parser.add_argument("--rows", type=int, default=4, metavar="N", help="number of these rows (4)")


def run(args: argparse.Namespace) -> int:
    """Prints the table, or rows of a step; returns the exit code."""
    picture = args.picture and parse_picture(args.picture)
    path = parse_path(args.config)
    config, done = _load(path, args.overrides)
    if args.show is not None:
        if done:
            _check_order(path, done)
        return _show(config, args.show, args.rows)
    from llama_jax.cli import source_table
    from llama_jax.data.source_use import count_use

    uses = count_use(config.data, config.training.steps, done or 0)
    if args.json:
        print(json.dumps(source_table.as_dict(config, uses, done), indent=1))
    else:
        source_table.show(config, uses, done)
    if picture:
        from llama_jax.cli.source_figure import draw_sources

        draw_sources(picture, config, uses)
    return 0


def _load(path: AnyPath, overrides: list[str]) -> "tuple[Config, int | None]":
    """Returns the configuration, and for a run folder the steps of its newest checkpoint."""
    from llama_jax.checkpoint import folders
    from llama_jax.config import yaml_file

    if not folders.is_run_folder(path):
        return yaml_file.load(path, overrides), None
    steps, _ = folders.committed_steps(path / "checkpoints")
    return yaml_file.load(path / "config.yaml", overrides), max(steps, default=0)


def _check_order(run: AnyPath, step: int) -> None:
    """Refuses a run of a version that read other rows, given the step of a checkpoint."""
    from llama_jax.data.batches import check_order
    from llama_jax.runtime.manifest import verified_manifest

    check_order(str(run), verified_manifest(run / "checkpoints" / str(step))["data"])


def _show(config: "Config", step: int, rows: int) -> int:
    from llama_jax.cli.show_windows import show_step

    if not 1 <= step <= config.training.steps:
        raise InputError(f"--show {step}: the run has the steps 1 to {config.training.steps}")
    if rows < 1:
        raise InputError(f"--rows must be at least 1, not {rows}")
    print(show_step(config.data, step, range(min(rows, config.data.batch_size))))
    return 0
