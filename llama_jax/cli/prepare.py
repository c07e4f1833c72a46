"""`llama-jax prepare`."""

import argparse
import json

from llama_jax.cli.arguments import add_config, add_tasks, parse_picture, read_tasks

MANUAL = """\
Convert raw dumps into documents by the rules of LLaMA's paper, and count what each rule removes.

The section `prepare` of CONFIG names each folder of documents, its kind of source, its raw files
and the settings of its rules, all of which are below. Section 2.1 of the paper has a kind for each
of its sources. In --out, a folder of documents has the last part of its name in CONFIG, and:
part-*.jsonl.zst (JSON lines with id, text and metadata), which `tokenize` reads; funnel.json,
what each rule was given and what it removed; plan.json, the settings and the raw files.

All CPU cores work, and memory use does not depend on the number of files. Of duplicates the first
one remains, in the order of the raw files. A killed or interrupted command continues where it was.
--task I/N runs every N-th task, in N processes on any machines that see the same files and the
same --out; each waits until all folders are complete. SLURM arrays, indexed Jobs of Kubernetes
(with JOB_COMPLETIONS) and the hosts of a pod need no --task. The same command without --task then
removes the intermediate files, NAME.work. --beam, the last option, runs the tasks in Apache Beam
(extra `beam`): its flags name the engine. The result is the same, byte for byte, in all cases.

`decontaminate: FOLDER` in an entry cuts the questions and answers of evaluation sets out of its
documents, and reports which sets occur (docs/prepare.md). The files are those of `eval --data`.

example:
  llama-jax prepare configs/data/llama.yaml --out docs/
  llama-jax prepare configs/data/llama.yaml --out docs/ --only c4 --picture c4.png
  llama-jax prepare configs/data/llama.yaml --out gs://bucket/docs --task 3/64
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command, and the reference of the keys of an entry."""
    from llama_jax.config import yaml_file

    parser.epilog = f"The keys of an entry, by its kind:\n{yaml_file.prepare_manual()}"
    add_config(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="receives the folders")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="prepare this folder only (repeatable)"
    )
    add_tasks(parser)
    parser.add_argument("--json", action="store_true", help="print the funnels as JSON")
    parser.add_argument(
        "--picture", metavar="FILE", help="also draw the funnels: FILE.png or FILE.svg"
    )


def run(args: argparse.Namespace) -> int:
    """Prepares the sources and prints their funnels; returns the exit code."""
    from llama_jax.cli.funnel_table import show
    from llama_jax.config import yaml_file
    from llama_jax.data.prepare.prepare import prepare_sources, select_sources
    from llama_jax.evaluation.item_texts import replace_evaluation_data
    from llama_jax.runtime.storage import parse_path

    picture = args.picture and parse_picture(args.picture)
    entries = yaml_file.load_prepare(args.config, args.overrides)
    entries = select_sources(entries, args.only)
    funnels = prepare_sources(
        replace_evaluation_data(entries, parse_path(args.out)),
        args.out,
        **read_tasks(args),
    )
    if args.json:
        print(json.dumps(funnels, indent=1, ensure_ascii=False))
    else:
        show(funnels)
    if picture:
        from llama_jax.cli.funnel_figure import draw_funnels

        draw_funnels(picture, funnels)
    return 0
