"""An engine that makes scripted texts: what the server asks of one, without a model."""

import threading
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import openai

from llama_jax.errors import InputError
from llama_jax.inference.engine.requests import (
    EngineStopped,
    GeneratedToken,
    PromptDone,
    QueueFull,
    Request,
    RequestEnded,
    Statistics,
)
from llama_jax.serving.server import ServerSettings, bind_socket, build_app, create_server
from llama_jax.tokenizer.tokenizer import Tokenizer

# What the engine makes of the prompt `hello`, and where it is asked.
ANSWER = " hello: é🦙, said with the seed 7.\nThat is all."
COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


class Ticket:
    def __init__(self):
        self.cancelled = threading.Event()

    def cancel(self):
        self.cancelled.set()


class FakeEngine:
    """Says what it was asked, and with which seed. Texts in `hold` wait until it is set.

    Tokens have the log-probability -1/4; each is followed by its neighbours in the vocabulary.
    """

    rows, context, queue = 2, 200, 6
    failure = None

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.requests: list[Request] = []
        self.reasons: list[str] = []
        self.hold = threading.Event()
        self.hold.set()
        self.failing = self.closed = False
        self.seconds = 0.001  # for a token
        self._changed = threading.Condition()
        self._running = 0

    def script(self, request: Request) -> str:
        text = self.tokenizer.decode(request.prompt)
        return f" {text[-20:]}: é🦙, said with the seed {request.seed}.\nThat is all."

    def submit(
        self,
        requests: list[Request],
        deliver: Callable[[int, PromptDone | GeneratedToken | RequestEnded], None],
    ):
        if any(len(r.prompt) + r.max_new_tokens > self.context for r in requests):
            raise InputError("too long")
        with self._changed:
            if self.failure:
                raise EngineStopped(self.failure)
            if self._running >= self.rows + self.queue:
                raise QueueFull
            self._running += len(requests)
            self.requests += requests
        tickets = [Ticket() for _ in requests]
        for i, work in enumerate(zip(requests, tickets, strict=True)):
            arguments = (*work, partial(deliver, i))
            threading.Thread(target=self._run, args=arguments, daemon=True).start()
        return tickets

    def _run(self, request, ticket, deliver):
        reason = self._make(request, ticket, deliver)
        with self._changed:
            self._running -= 1
            self.reasons.append(reason)
            self._changed.notify_all()
        deliver(RequestEnded(reason, "out of memory" if reason == "error" else ""))

    def _make(self, request, ticket, deliver) -> str:
        while not self.hold.wait(0.002):
            if ticket.cancelled.is_set():
                return "cancelled"
        if self.failing:
            return "error"
        score = (self._scored(request, token) for token in request.prompt[1:])
        deliver(PromptDone(list(score) if request.prompt_logprobs else []))
        script = self.tokenizer.encode(self.script(request))
        ends = sorted(request.end_ids)[:1] or script * 20
        for token in [*script, *ends][: request.max_new_tokens]:
            if ticket.cancelled.wait(self.seconds):
                return "cancelled"
            deliver(self._scored(request, token))
            if token in request.end_ids:
                return "stop"
        return "length"

    def _scored(self, request: Request, token: int) -> GeneratedToken:
        top = tuple((token + i, -0.25 - i) for i in range(request.top_logprobs))
        return GeneratedToken(token, -0.25, top)

    def wait_until_idle(self):
        with self._changed:
            assert self._changed.wait_for(lambda: not self._running, timeout=10)

    def statistics(self) -> Statistics:
        n = len(self.reasons)
        running = self._running
        return Statistics(running=running, finished=n, made_tokens=22, decode_seconds=1.5)

    def close(self):
        self.closed = True


@contextmanager
def serving(tokenizer, engine=None, **settings):
    """Runs a server on a free port of the loopback; yields its engine and its URL."""
    engine = engine or FakeEngine(tokenizer)
    made = ServerSettings(
        **(
            {"name": "stories", "copy_bandwidth": 1e10, "max_tokens": 150, "max_body": 20_000}
            | settings
        )
    )
    with running(build_app(engine, tokenizer, made)) as url:
        yield engine, url


@contextmanager
def running(app):
    """Runs an ASGI application in a thread; yields its URL."""
    server = create_server(app)
    with bind_socket("127.0.0.1", 0) as bound:
        bound.listen()
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def new_client(url, key="none"):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def complete(client, prompt="hello", **fields):
    fields = {"model": "stories", "max_tokens": 150, "seed": 7} | fields
    return client.completions.create(prompt=prompt, **fields)


def chat(client, content="hello", **fields):
    fields = {"model": "stories", "max_tokens": 150, "seed": 7} | fields
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(messages=messages, **fields)
