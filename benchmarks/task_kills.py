"""Kills `llama-jax tokenize` or `prepare` at random moments; compares with an undisturbed run.

    python benchmarks/task_kills.py tokenize [--kills 50] [--task-processes 1]
    python benchmarks/task_kills.py prepare

Each command is killed with SIGKILL at a random moment, and the same command then continues, until
it ends by itself. With --task-processes N, N processes share the tasks by --task I/N, and one of
them is killed. The exit code is 1 if a byte of the folder differs, or a file is left.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llama_jax.data.text_files import find_files

# The small corpus is divided into many parts, shards and partitions.
COMMAND_LINE = """
import sys
from llama_jax.cli.main import main
from llama_jax.data import corpus_plan, shard_writer, tasks, tokenize
from llama_jax.data.prepare import prepare
corpus_plan.MIN_PART_BYTES, corpus_plan._PARTS = 1 << 14, 60
shard_writer.SHARD_TOKENS, shard_writer.CHUNK_TOKENS = 1 << 15, 1 << 13
tokenize._SMALL_TOKENS, tasks.POLL_SECONDS = 0, 0.1
prepare._PARTITION_BYTES = 1 << 16
sys.exit(main(sys.argv[1:]))
"""
# Grouping by equal files and equal lines, by overlap of books, and by MinHash.
PREPARE = """
prepare:
  github: {{kind: github, inputs: [{0}], license: PSF-2.0, licenses: [PSF], near_duplicates: 0.8}}
  books: {{kind: books, inputs: [{0}]}}
"""


def write_corpus(folder: Path) -> None:
    """Writes 16 files of JSON lines with source code; some documents occur several times."""
    texts = [Path(str(path)).read_text() for path in find_files(["python-stdlib"])[:80]]
    for number in range(16):
        numbers = range(5 * number, 5 * number + 6)
        records = [
            {"text": texts[i % 80], "content": texts[i % 80], "path": f"{i}.py"} for i in numbers
        ]
        lines = (json.dumps(record) + "\n" for record in records)
        (folder / f"{number:02}.jsonl").write_text("".join(lines))
    folder.with_suffix(".yaml").write_text(PREPARE.format(folder))


def start(command: str, corpus: Path, out: Path, number: int, n: int) -> subprocess.Popen[str]:
    """Starts process `number` of n in its own process group."""
    arguments = {
        "tokenize": ["tokenize", str(corpus), "--vocab-size", "1000"],
        "prepare": ["prepare", str(corpus.with_suffix(".yaml"))],
    }[command]
    arguments += ["--out", str(out), "--workers", "2"]
    if n > 1:
        arguments += ["--task", f"{number + 1}/{n}"]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND_LINE, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(
    command: str, corpus: Path, out: Path, processes: int, kills: int, rng: random.Random
) -> int:
    """Runs until `out` is complete, with at most `kills` kills; returns their number."""
    running, done, longest = dict[int, subprocess.Popen[str]](), 0, 4.0
    waiting = set(range(processes))
    while waiting or running:
        for number in waiting:
            running[number] = start(command, corpus, out, number, processes)
        waiting.clear()
        number = rng.choice([*running])
        time.sleep(rng.uniform(0, longest) if done < kills else 0.1)
        for other, process in [*running.items()]:
            if process.poll() is not None:
                errors = process.communicate()[1]
                # A kill may come after the folder has been published.
                if process.returncode and not (done and "already exists" in errors):
                    raise SystemExit(f"the command failed: {errors}")
                del running[other]
        if done < kills and number in running:
            running[number].send_signal(signal.SIGKILL)
            running.pop(number).communicate()
            waiting.add(number)
            done += 1
            longest *= 1.05  # so that every stage is reached
    return done


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the content of each file by its relative name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def main() -> int:
    """Prints the figures; returns 1 if anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["tokenize", "prepare"])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--task-processes", type=int, default=1, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, killed, runs, wrong = random.Random(args.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder, corpus = Path(temporary), Path(temporary, "corpus")
        corpus.mkdir()
        write_corpus(corpus)
        run(args.command, corpus, folder / "undisturbed", 1, 0, rng)
        expected = contents(folder / "undisturbed")
        begin = time.monotonic()
        while killed < args.kills:
            runs += 1
            out = folder / str(runs) / "out"
            kills = min(10, args.kills - killed)
            n = run(args.command, corpus, out, args.task_processes, kills, rng)
            killed += n
            if args.command == "prepare" and args.task_processes > 1:
                run("prepare", corpus, out, 1, 0, rng)  # removes the intermediate files
            found, names = contents(out), [path.name for path in out.parent.iterdir()]
            different = [name for name in expected | found if expected.get(name) != found.get(name)]
            wrong += bool(different) + (names != ["out"])
            print(f"run {runs}: {n} kills; {len(different)} files differ; {names}", flush=True)
    seconds = time.monotonic() - begin
    print(
        f"{killed} kills of {args.task_processes} {args.command} command(s), {runs} runs,"
        f" {len(expected)} files, {seconds:.0f} s: {wrong} wrong"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
