"""The command line, `llama-jax COMMAND`; what runs a model is in `cli_inference`."""

import argparse
import contextlib
import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from llama_jax.cli import inference
from llama_jax.errors import Fault, InputError
from llama_jax.runtime import stop_signal
from llama_jax.runtime.storage import check_local

# Faults of the machine that may come anywhere; their own words tell all that a user needs.
_SYSTEM_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES)
_SYSTEM_FAULTS += (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)

# What needs JAX is imported by the command that uses it: `--help` and typing errors answer at once.
# The configuration is imported when SIGTERM is already heard.


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 1 for a failed run, 2 for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    if [*argv[:1]] != ["train"]:
        return _run(argv)
    again = " ".join(["llama-jax", *argv])
    nothing = f"stopped on SIGTERM: there was nothing to save; start again with: {again}"
    with stop_signal.exit_at_sigterm(nothing):
        return _run(argv)
    return 0


def _run(argv: Sequence[str]) -> int:
    from llama_jax.cli.manual import parser

    made = parser()
    args, rest = made.parse_known_args(argv)
    # argparse takes overrides in one piece only; they may also stand after the flags.
    if "overrides" in args and not any(word.startswith("-") for word in rest):
        args.overrides += rest
    elif rest:
        made.error(f"unrecognized arguments: {' '.join(rest)}")
    # Orbax and asyncio log tracebacks of errors that are told in a sentence here.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        for name in _PATHS:
            given = getattr(args, name, None) or []
            for path in [given] if isinstance(given, str) else given:
                check_local(path)
        return _COMMANDS[args.name](args)
    except (InputError, Fault) as error:
        print(f"llama-jax {args.name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except BrokenPipeError:  # the reader of standard output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in _SYSTEM_FAULTS:
            raise
        print(f"llama-jax {args.name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _train(args: argparse.Namespace) -> int:
    from llama_jax.runtime import hosts

    with hosts.join(args.coordinator, args.processes, args.process):
        return _train_together(args)


def _train_together(args: argparse.Namespace) -> int:
    from llama_jax.config import yaml_file

    resolved = yaml_file.load(args.config, args.overrides)
    from llama_jax.runtime import hosts
    from llama_jax.runtime.console import print_status
    from llama_jax.training import loop

    try:
        outcome = loop.run(resolved)
    except loop.RunStopped as error:
        print_status(f"llama-jax train: {error}")
        return 1
    if not outcome.finished:
        again = " ".join(["llama-jax train", args.config, *args.overrides])
        print_status(f"saved after step {outcome.step}; go on with: {again}")
        return 0
    if not hosts.is_host_zero():
        return 0
    if outcome.validation_loss is not None and outcome.unigram_entropy is not None:
        print(
            f"validation loss {outcome.validation_loss:.3f} nats per token; unigram entropy of the"
            f" held-out text {outcome.unigram_entropy:.3f}"
        )
    # Several hosts would have to load and continue together: `generate` does it on one.
    prompts = () if hosts.is_multi_host() else resolved.logging.samples
    for i, prompt in enumerate(prompts):
        print(f"\n--- sample {i + 1} of {len(prompts)}: {prompt!r}")
        sampling = inference.sampling_of(temperature=0.7, top_p=0.95)
        inference.continue_text(outcome.folder, prompt, 80, sampling, seed=i)
    print(f"\nlosses: {outcome.folder / 'loss.png'}")
    print(f'continue with: llama-jax generate {outcome.folder} --prompt "def "')
    return 0


def _plan(args: argparse.Namespace) -> int:
    import json

    from llama_jax.config import yaml_file
    from llama_jax.config.family import FAMILY

    if args.inference:
        return _plan_inference(args)
    serving = ("context", "batch", "dtype", "cache", "quantize")
    if given := [name for name in serving if getattr(args, name) is not None]:
        raise InputError(f"--{given[0]} is for plan --inference: add that, or leave it out")
    if not yaml_file.find(args.config).is_file() and (
        args.config in FAMILY or Path(args.config).is_dir()
    ):
        raise InputError(
            f"{args.config} is a model, and a training run has a configuration file: give that, or"
            f" add --inference to plan serving {args.config}"
        )
    config = yaml_file.load(args.config, args.overrides)
    from llama_jax.plan import figure, search, topology, training, training_report
    from llama_jax.runtime.console import print_status

    pod = topology.parse(args.topology)
    drawn = args.picture and figure.check_path(args.picture)
    if args.compile < 1:
        raise InputError(f"--compile must be at least 1, not {args.compile}")
    if args.search:
        plans = search.find_fastest(config, pod, args.compile, print_status)
    else:
        plans = [training.plan_training(config, pod, print_status)]
    if drawn:
        figure.draw_chart(drawn, figure.chart_training(plans[0]))
    if args.json:
        dicts = [training_report.as_dict(plan) for plan in plans]
        print(json.dumps(dicts if args.search else dicts[0], indent=1))
    else:
        training_report.show(plans[0])
    if args.search and not args.json:
        training_report.show_ranking(plans)
        print(f"\nthe fastest, for the configuration file:\n{search.as_yaml(plans[0].config)}")
    return 0 if plans[0].fits else 1


def _plan_inference(args: argparse.Namespace) -> int:
    import json
    from dataclasses import replace

    from llama_jax.checkpoint import folders
    from llama_jax.config import yaml_file
    from llama_jax.config.family import FAMILY

    if args.search:
        raise InputError("--search is for training runs: leave it out with --inference")
    file = yaml_file.find(args.config)
    if args.overrides and not file.is_file():
        raise InputError(f"{args.overrides[0]}: overrides are for a configuration file alone")
    if args.config in FAMILY and not args.overrides:
        config = FAMILY[args.config]
    elif file.is_file():
        config = yaml_file.load(file, args.overrides).model
    elif Path(args.config).is_dir():
        config = folders.read_model_config(args.config)
    else:
        raise InputError(
            f"there is no {args.config}: give a model folder, a configuration file, or one of"
            f" {', '.join(FAMILY)}"
        )
    from llama_jax.plan import figure, serving, serving_report, topology
    from llama_jax.runtime.console import print_status

    drawn = args.picture and figure.check_path(args.picture)
    dtype = args.dtype or "bfloat16"
    config = replace(
        config,
        dtype=dtype,
        param_dtype=dtype,
        cache_dtype=args.cache or config.cache_dtype,
        quantized=args.quantize or config.quantized,
    )
    context = min(4096, config.context) if args.context is None else args.context
    batch = 8 if args.batch is None else args.batch
    pod = topology.parse(args.topology)
    plan = serving.plan_inference(config, pod, context, batch, print_status)
    if drawn:
        figure.draw_chart(drawn, figure.chart_inference(plan))
    if args.json:
        print(json.dumps(serving_report.as_dict(plan), indent=1))
    else:
        serving_report.show(plan)
    return 0 if plan.fits else 1


@contextlib.contextmanager
def _unwinding_at_sigterm() -> Iterator[None]:
    """Makes SIGTERM exit with 143 through all `with` blocks, which remove what is half-written."""

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would interrupt the removal
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@_unwinding_at_sigterm()
def _tokenize(args: argparse.Namespace) -> int:
    from llama_jax.data import tokenize

    if not 0 <= args.validation_fraction < 1:
        raise InputError("--validation-fraction must be at least 0 and below 1")
    meta = tokenize.tokenize_corpus(
        args.sources,
        args.out,
        n_vocab=args.vocab_size,
        tokenizer=args.tokenizer,
        validation_fraction=args.validation_fraction,
        workers=args.workers,
    )
    for split, about in meta["splits"].items():
        print(f"{args.out}/{split}: {about['documents']:,} documents, {about['tokens']:,} tokens")
    return 0


@_unwinding_at_sigterm()
def _convert(args: argparse.Namespace) -> int:
    from llama_jax.convert.convert import convert, parse_mesh
    from llama_jax.convert.verify import verify
    from llama_jax.runtime.byte_size import parse_size
    from llama_jax.runtime.process_memory import release_freed_memory

    if args.verify:
        counts = verify(Path(args.source), args.folder and Path(args.folder))
        print(f"{args.source}: {_proof(**counts)}")
        return 0
    if args.folder is None:
        raise InputError("name the folder to make: llama-jax convert SRC DST")
    begun = time.monotonic()
    release_freed_memory()
    outcome = convert(
        args.source,
        args.folder,
        to=args.to,
        dtype=args.dtype,
        max_ram=args.max_ram and parse_size(args.max_ram, "--max-ram"),
        model=args.model,
        tokenizer=args.tokenizer,
        shards=args.shards,
        mesh=args.mesh and parse_mesh(args.mesh),
        quantize=args.quantize,
    )
    seconds = time.monotonic() - begun
    for note in outcome.notes:
        print(f"warning: {note}", file=sys.stderr)
    print(
        f"{outcome.folder}: {outcome.bytes_written / 1e9:.3f} GB in {seconds:.1f} s"
        f" ({outcome.bytes_written / 1e6 / seconds:.0f} MB/s, with the proof), peak memory"
        f" {outcome.peak / 2**30:.2f} GiB"
    )
    print(f"{outcome.folder}: {_proof(outcome.identical, outcome.converted)}")
    if args.quantize:
        print(f"measure what that loses: llama-jax perplexity {outcome.folder} TEXT_FILE")
    return 0


def _proof(identical: int, converted: int) -> str:
    """Returns what a verification has shown."""
    parts = [f"{identical} weights give back the source's bits"] if identical else []
    parts += [f"{converted} equal the source's after the change of type"] if converted else []
    return ", ".join(parts)


def _info(args: argparse.Namespace) -> int:
    from llama_jax.cli import info

    print(info.describe(Path(args.folder)))
    return 0


_PATHS = ("config", "folder", "source", "sources", "out", "tokenizer", "text", "picture")
_COMMANDS = {
    "train": _train,
    "plan": _plan,
    "tokenize": _tokenize,
    "generate": inference.generate,
    "serve": inference.serve,
    "perplexity": inference.perplexity,
    "convert": _convert,
    "info": _info,
}
