"""`llama-jax eval`."""

import argparse
import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.cli.arguments import add_hosts, add_lora, parse_picture, read_pairs
from llama_jax.errors import InputError
from llama_jax.runtime.storage import parse_path

if TYPE_CHECKING:
    from llama_jax.config.model import ModelConfig
    from llama_jax.evaluation.evaluate import Evaluation
    from llama_jax.evaluation.paper_tables import Metrics

MANUAL = """\
Measure a model on tasks of lm-evaluation-harness, or how well it predicts a text.

Tasks need the extra: pip install 'llama_jax[eval]'. Prompts, normalization and metrics are those of
the harness, and each answer equals that of its `hf` model on the same weights. Without --data the
harness fetches the data sets; with it, each task reads a local file.

--tasks paper:common-sense, paper:closed-book, paper:reading, paper:math, paper:code, paper:mmlu and
paper:all run the tasks of the LLaMA paper's tables, and print its rows above the measured ones.

With --out, each answer is saved as soon as it is computed: a killed command continues when it is
started again. results.json contains the metrics with standard errors, and what they depend on;
items/ contains each item. --compare prints which items differ between two such folders, and whether
the difference is significant.

--samples N draws N answers to each item of humaneval, mbpp, gsm8k or minerva_math: of programs it
prints pass@k, the probability that one of k programs is right, and of the others maj1@k, whether
the answer of most of k draws is right; k is 1, 10, 80, 100, 256 and N, as far as N reaches.

--perplexity prints nats per token, and perplexity, which is exp(nats). The text is split into
windows of 2048 tokens, or of the model's context if that is shorter. The model predicts each token
from the earlier tokens of its window. With --quantize, the model is measured twice, as it is and
with quantized weights, and the difference is printed.

On a TPU pod, under SLURM, Open MPI or a Kubernetes JobSet, run the command on every host, as for
`llama-jax train`.

example:
  llama-jax eval models/llama3.1-8b --tasks arc_easy,hellaswag --out results/llama3.1-8b
  llama-jax eval models/llama3.1-8b --tasks gsm8k --shots 8 --limit 100 --data data/eval
  llama-jax eval models/llama3.1-8b --tasks humaneval --samples 100 --run-code --data data/eval
  llama-jax eval models/llama3.1-8b --tasks arc_easy --lora runs/lora --out results/lora
  llama-jax eval models/llama3.1-8b --tasks paper:common-sense --data data/eval --picture a.png
  llama-jax eval --compare results/llama3.1-8b results/lora
  llama-jax eval models/llama3.2-1b --perplexity book.txt --quantize int8
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help="run folder or model folder")
    parser.add_argument("--tasks", metavar="A,B", help="names of tasks of the harness")
    parser.add_argument(
        "--shots", type=int, metavar="N", help="examples in each prompt (default: the task's)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N items of each task")
    parser.add_argument(
        "--samples", type=int, metavar="N", help="draw N answers to each item, for pass@k or maj1@k"
    )
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="temperature of --samples (default: 0.8)"
    )
    parser.add_argument("--data", metavar="DIR", help="folder with the data sets of the tasks")
    parser.add_argument("--out", metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--chat", action="store_true", help="render prompts in the model's chat format"
    )
    parser.add_argument(
        "--run-code", action="store_true", help="allow tasks that run the programs of the model"
    )
    parser.add_argument(
        "--picture", metavar="FILE", help="draw the paper's tables with the results: .png or .svg"
    )
    parser.add_argument("--quantize", choices=["int8"], help="quantize the weights while loading")
    add_lora(parser)
    parser.add_argument(
        "--mesh", metavar="fsdp=8,tensor=4", help="mesh of the devices (default: tensor on a host)"
    )
    parser.add_argument(
        "--perplexity", metavar="TEXT", dest="text", help="a text file in UTF-8 to predict"
    )
    parser.add_argument(
        "--compare", metavar=("A", "B"), nargs=2, help="compare the results in two folders"
    )
    add_hosts(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluates a model and prints its results; returns the exit code."""
    from llama_jax.runtime import hosts

    if args.compare:
        return _compare(*map(Path, args.compare))
    if args.folder is None:
        raise InputError("there is no model: give a FOLDER, or --compare A B")
    if (args.tasks is None) == (args.text is None):
        raise InputError("give either --tasks or --perplexity")
    for name, least in (("shots", 0), ("limit", 1), ("samples", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name} must be at least {least}, not {value}")
    if args.temperature is not None and (args.samples is None or args.temperature <= 0):
        raise InputError("--temperature is that of --samples, and must be above 0")
    with hosts.join(args.coordinator, args.processes, args.process):
        return _measure_perplexity(args) if args.text else _evaluate(args)


def _evaluate(args: argparse.Namespace) -> int:
    from llama_jax.evaluation.evaluate import check_installed

    check_installed()
    import jax

    from llama_jax.checkpoint import folders
    from llama_jax.evaluation.answers import Answers
    from llama_jax.evaluation.drawn_answers import TEMPERATURE
    from llama_jax.evaluation.evaluate import evaluate
    from llama_jax.evaluation.figure import check_columns, draw_tables
    from llama_jax.evaluation.paper_tables import metrics_of
    from llama_jax.evaluation.results import identify, write_results
    from llama_jax.evaluation.tasks import load_tasks
    from llama_jax.inference.load import choose_compute_dtype, load
    from llama_jax.runtime import hosts
    from llama_jax.runtime.compile_cache import enable_compile_cache
    from llama_jax.tokenizer.tokenizer import load_tokenizer

    folder, out = parse_path(args.folder), args.out and parse_path(args.out)
    if out and not isinstance(out, Path):
        raise InputError(f"--out {out} is in a bucket, where files can't grow: give a local folder")
    names = args.tasks.split(",")
    picture = args.picture and parse_picture(args.picture)
    if picture:
        check_columns(names)
    stored = folders.read_model_config(folder)
    tokenizer, pairs = load_tokenizer(folder), read_pairs(args.lora, folder, stored)
    data, tasks = args.data and parse_path(args.data), {}
    if hosts.is_host_zero():
        tasks = load_tasks(
            names,
            data,
            args.shots,
            run_code=args.run_code,
            samples=args.samples,
            temperature=args.temperature or TEMPERATURE,
        )
    enable_compile_cache()
    with jax.set_mesh(_make_mesh(args.mesh, stored)):
        config, model = load(
            folder,
            choose_compute_dtype(stored),
            args.quantize,
            pairs=pairs,
            unmerged=args.unmerged,
        )
        identity = identify(folder, config, pairs, args.unmerged)
        hosts.check_equal_on_hosts({"the model": identity, "the arguments": _options(args)})
        with closing(Answers(out if hosts.is_host_zero() else None, identity)) as answers:
            evaluation = evaluate(
                config, model, tokenizer, tasks, limit=args.limit, answers=answers, chat=args.chat
            )
        if evaluation is None:
            return 0
        if out:
            write_results(out, evaluation, folder, config, identity, _options(args))
    _print_results(evaluation)
    metrics = metrics_of(evaluation.results)
    if "paper:" in args.tasks:
        _print_tables(metrics, folder.name)
    if picture:
        draw_tables(picture, metrics, folder.name)
        print(f"{picture}: the paper's tables with these results")
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments that are equal on all hosts and describe the evaluation."""
    names = ("tasks", "shots", "limit", "samples", "temperature", "data", "chat", "lora")
    return {name: getattr(args, name) for name in (*names, "unmerged", "quantize", "mesh")}


def _make_mesh(mesh: str | None, config: "ModelConfig") -> Any:
    """Returns the mesh that the argument describes; default: of all devices of all hosts."""
    from llama_jax.config.mesh import MeshConfig
    from llama_jax.convert.formats.model_folder import parse_mesh
    from llama_jax.parallel.mesh import inference_mesh, make_mesh

    if mesh is None:
        return inference_mesh(config)
    return make_mesh(replace(MeshConfig(fsdp=1), **parse_mesh(mesh)))


def _print_results(evaluation: "Evaluation") -> None:
    found = evaluation.results
    lines = [["task", "shots", "items", "metric", "value", "stderr"]]
    for name, task in {**found["tasks"], **found["groups"]}.items():
        for metric, measured in task["metrics"].items():
            stderr = measured["stderr"]
            shown = "" if stderr is None else f"± {stderr:.4f}"
            counts = (str(task.get(key, "")) for key in ("shots", "items"))
            lines.append([name, *counts, metric, f"{measured['value']:.4f}", shown])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


def _print_tables(metrics: "Metrics", model: str) -> None:
    """Prints the paper's tables that were measured."""
    from llama_jax.evaluation.paper_tables import format_table, tables_of

    for name in tables_of(metrics):
        print(f"\n{format_table(name, metrics, model)}")


def _compare(a: Path, b: Path) -> int:
    from llama_jax.evaluation.compare import compare
    from llama_jax.evaluation.results import read_results

    for difference in compare(read_results(a), read_results(b)):
        print(difference)
    return 0


def _measure_perplexity(args: argparse.Namespace) -> int:
    import jax

    from llama_jax.checkpoint import folders
    from llama_jax.evaluation.perplexity import nats_per_token
    from llama_jax.inference.load import choose_compute_dtype, load
    from llama_jax.model.weights import check_not_quantized
    from llama_jax.runtime import hosts
    from llama_jax.runtime.compile_cache import enable_compile_cache
    from llama_jax.tokenizer.tokenizer import load_tokenizer

    if hosts.is_multi_host():
        raise InputError("--perplexity runs on one host: start the command there only")
    folder = parse_path(args.folder)
    stored, tokenizer = folders.read_model_config(folder), load_tokenizer(folder)
    pairs = read_pairs(args.lora, folder, stored)
    if args.quantize:
        check_not_quantized(stored)
    ids = tokenizer.encode(_read_text(args.text), bos=tokenizer.add_bos)
    enable_compile_cache()

    def measure(quantize: str | None) -> float:
        config, model = load(
            folder,
            choose_compute_dtype(stored),
            quantize,
            pairs=pairs,
            unmerged=args.unmerged,
        )
        nats = nats_per_token(config, model, ids)
        print(
            f"{config.weight_dtype:8}  {nats:.5f} nats per token, perplexity {math.exp(nats):.4f},"
            f" of {len(ids) - 1:,} tokens"
        )
        return nats

    with jax.set_mesh(_make_mesh(args.mesh, stored)):
        nats = measure(None)
        if not args.quantize:
            return 0
        change = measure(args.quantize) - nats
    print(f"change    {change:+.5f} nats per token, perplexity {100 * math.expm1(change):+.3f} %")
    return 0


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"{path} can't be read ({reason}): give a text file") from error
