"""Kills `llama-jax tokenize` at random moments, and compares the shards with an undisturbed run's.

    python benchmarks/tokenize_kills.py [--kills 50] [--task-processes 1]

Each command is killed with SIGKILL at a random moment, and the same command then continues, until
it ends by itself. With --task-processes N, N processes share the tasks by --task I/N, and one of
them is killed. The exit code is 1 if a byte of the folder differs, or a file is left.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llama_jax.data.text_files import find_files

# The small corpus is divided into many parts and shards.
COMMAND_LINE = """
import sys
from llama_jax.cli.main import main
from llama_jax.data import corpus_plan, shard_writer, tasks, tokenize
corpus_plan.MIN_PART_BYTES, corpus_plan._PARTS = 1 << 14, 60
shard_writer.SHARD_TOKENS, shard_writer.CHUNK_TOKENS = 1 << 15, 1 << 13
tokenize._SMALL_TOKENS, tasks.POLL_SECONDS = 0, 0.1
sys.exit(main(sys.argv[1:]))
"""


def start(corpus: Path, out: Path, number: int, processes: int) -> subprocess.Popen[str]:
    """Starts a command in its own process group."""
    command = [sys.executable, "-c", COMMAND_LINE, "tokenize", str(corpus), "--out", str(out)]
    command += ["--vocab-size", "1000", "--workers", "2"]
    if processes > 1:
        command += ["--task", f"{number + 1}/{processes}"]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(corpus: Path, out: Path, processes: int, kills: int, rng: random.Random) -> int:
    """Runs until `out` is complete, with at most so many kills; returns their number."""
    running, done, longest = dict[int, subprocess.Popen[str]](), 0, 4.0
    waiting = set(range(processes))
    while waiting or running:
        for number in waiting:
            running[number] = start(corpus, out, number, processes)
        waiting.clear()
        number = rng.choice([*running])
        time.sleep(rng.uniform(0, longest) if done < kills else 0.1)
        for other, process in [*running.items()]:
            if process.poll() is not None:
                if process.returncode:
                    raise SystemExit(f"the command failed: {process.communicate()[1]}")
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
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--task-processes", type=int, default=1, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, killed, runs, wrong = random.Random(args.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder, corpus = Path(temporary), Path(temporary, "corpus")
        corpus.mkdir()
        for i, path in enumerate(find_files(["python-stdlib"])[:80]):
            shutil.copy(str(path), corpus / f"{i:03d}.py")
        run(corpus, folder / "undisturbed", 1, 0, rng)
        expected = contents(folder / "undisturbed")
        begin = time.monotonic()
        while killed < args.kills:
            runs += 1
            out = folder / str(runs) / "out"
            n = run(corpus, out, args.task_processes, min(10, args.kills - killed), rng)
            killed += n
            found, names = contents(out), [path.name for path in out.parent.iterdir()]
            different = [name for name in expected | found if expected.get(name) != found.get(name)]
            wrong += bool(different) + (names != ["out"])
            print(f"run {runs}: {n} kills; {len(different)} files differ; {names}", flush=True)
    seconds = time.monotonic() - begin
    print(
        f"{killed} kills of {args.task_processes} command(s), {runs} runs, {len(expected)} files,"
        f" {seconds:.0f} s: {wrong} wrong"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
