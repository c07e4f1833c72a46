"""Arguments that several commands share."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath, parse_path

if TYPE_CHECKING:
    from llama_jax.checkpoint.lora_pairs import StoredPairs
    from llama_jax.config.model import ModelConfig
    from llama_jax.inference.sampling import Sampling


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds the configuration file and its overrides."""
    parser.add_argument(
        "config", metavar="CONFIG", help="YAML file, or the name of an included one"
    )
    parser.add_argument(
        "overrides", metavar="section.key=value", nargs="*", help="changes a key of the file"
    )


def add_folder(parser: argparse.ArgumentParser) -> None:
    """Adds the folder that contains the model."""
    parser.add_argument("folder", metavar="FOLDER", help="run folder or model folder")


def add_hosts(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that join the hosts of a run where the environment doesn't describe them."""
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="number of processes, one per host"
    )
    parser.add_argument("--process", type=int, metavar="I", help="index of this process, from 0")


def check_equal_on_hosts(folder: AnyPath, config: "ModelConfig", values: dict[str, Any]) -> None:
    """Checks that all hosts got the same command for the same model, and run the same JAX.

    Args:
        folder: of the model.
        config: how this host computes the model.
        values: the arguments and what else must be equal, plain JSON.

    Raises:
        InputError: a value differs.
    """
    import jax

    from llama_jax.checkpoint.model_folders import manifest_hash
    from llama_jax.runtime import hosts

    if hosts.is_multi_host():
        common = {"the version of JAX": jax.__version__, "the model": manifest_hash(folder)}
        common["the dtype that fits the machine"] = config.dtype
        hosts.check_equal_on_hosts(common | values)


@contextlib.contextmanager
def exit_all_at_sigterm() -> Iterator[None]:
    """Makes SIGTERM on one of several hosts end all of them with exit code 0 in the block."""
    from llama_jax.runtime import hosts, stop_signal

    with contextlib.ExitStack() as stack:
        if hosts.is_multi_host():
            stack.enter_context(stop_signal.exit_at_sigterm("stopped on SIGTERM"))
        yield


def add_int8(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that quantize the weights and the KV cache."""
    parser.add_argument("--quantize", choices=["int8"], help="quantize the weights while loading")
    parser.add_argument("--cache", choices=["int8"], help="quantize the KV cache")


def add_lora(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `read_pairs` and `load` read."""
    parser.add_argument(
        "--lora", metavar="PAIRS",
        help="low-rank pairs for a model folder: a LoRA run, or a folder of PEFT",
    )  # fmt: skip
    parser.add_argument(
        "--unmerged", action="store_true", help="don't merge low-rank pairs into the weights"
    )


def read_pairs(lora: str | None, folder: AnyPath, config: "ModelConfig") -> "StoredPairs | None":
    """Returns the low-rank pairs of --lora; None without it.

    Args:
        lora: the flag.
        folder: the model folder.
        config: its configuration.

    Raises:
        InputError: they can't be read, or are not for this model.
    """
    from llama_jax.convert.lora_folder import base_and_pairs, open_pairs

    if lora is None:
        return None
    folder, pairs = base_and_pairs(folder, parse_path(lora))
    return open_pairs(pairs, folder, config) if pairs else None


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `read_sampling` reads."""
    for flag, kind, default, metavar, help_ in (
        ("temperature", float, 0.0, "X", "0: the most likely token (default)"),
        ("top-k", int, 0, "K", "0: all tokens (default)"),
        ("top-p", float, 1.0, "P", "1: all tokens (default)"),
        ("min-p", float, 0.0, "P", "0: all tokens (default)"),
        ("repetition-penalty", float, 1.0, "X", "1: none (default)"),
        ("presence-penalty", float, 0.0, "X", "0: none (default)"),
        ("frequency-penalty", float, 0.0, "X", "0: none (default)"),
    ):
        parser.add_argument(f"--{flag}", type=kind, default=default, metavar=metavar, help=help_)


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say which processes run the tasks of a command."""
    parser.add_argument("--workers", type=int, metavar="N", help="processes (one per core)")
    parser.add_argument(
        "--task", metavar="I/N", help="run every N-th task, from the I-th; others run the rest"
    )
    parser.add_argument(
        "--beam", nargs=argparse.REMAINDER, metavar="FLAG",
        help="run the tasks in Apache Beam with its flags, which are the rest of the line",
    )  # fmt: skip


def read_tasks(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of `add_tasks` as those of `tasks.run_tasks`: workers, part, runner.

    Raises:
        InputError: --beam and --task are both given, or one of them can't be used.
    """
    from llama_jax.data.beam import beam_runner
    from llama_jax.data.tasks import find_part

    if args.beam is None:
        return {"workers": args.workers, "part": find_part(args.task), "runner": None}
    if args.task is not None:
        raise InputError("--beam and --task both divide the work: give one of them")
    return {"workers": args.workers, "part": None, "runner": beam_runner(args.beam)}


def read_sampling(args: argparse.Namespace) -> "Sampling":
    """Returns the sampling settings of the flags of `add_sampling`.

    Raises:
        InputError: a value is out of range.
    """
    from pydantic import ValidationError

    from llama_jax.config.validation import first_problem
    from llama_jax.inference.sampling import Sampling

    try:
        return Sampling(
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            presence_penalty=args.presence_penalty,
            frequency_penalty=args.frequency_penalty,
        )
    except ValidationError as error:
        problem = first_problem(error)
        raise InputError(problem.sentence(f"--{problem.key.replace('_', '-')}")) from error


def parse_picture(path: str) -> Path:
    """Returns the path of --picture; checks it before a command works for minutes.

    Raises:
        InputError: the name ends neither with .png nor with .svg, or its folder is missing.
    """
    picture = Path(path)
    if picture.suffix not in (".png", ".svg"):
        raise InputError(f"--picture {path}: name a file that ends with .png or .svg")
    if not picture.parent.is_dir():
        raise InputError(f"--picture {path}: there is no folder {picture.parent}: create it first")
    return picture
