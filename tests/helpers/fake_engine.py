"""An engine without a model that generates scripted texts, with the interface of the real one."""

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

# The text that the engine generates for the prompt `hello` with the seed 7.
ANSWER = " hello: é🦙, said with the seed 7.\nThat is all."
COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


class Ticket:
    def __init__(self):
        self.cancelled = threading.Event()

    def cancel(self):
        self.cancelled.set()


class FakeEngine:
    """Generates a text that repeats the prompt and the seed, without a model.

    Every token has the log-probability -1/4; its alternatives are the next ids of the vocabulary.

    Attributes:
        requests: all requests in the order of their arrival.
        reasons: why each finished request ended, in the order of their ends.
        may_generate: while it is not set, requests generate nothing.
        failing: whether requests end with an error.
        seconds: time that each token takes.
    """

    rows, context, queue = 2, 200, 6
    failure = None

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.requests: list[Request] = []
        self.reasons: list[str] = []
        self.may_generate = threading.Event()
        self.may_generate.set()
        self.failing = self.closed = False
        self.seconds = 0.001
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
        reason = self._generate(request, ticket, deliver)
        with self._changed:
            self._running -= 1
            self.reasons.append(reason)
            self._changed.notify_all()
        deliver(RequestEnded(reason, "out of memory" if reason == "error" else ""))

    def _generate(self, request, ticket, deliver) -> str:
        while not self.may_generate.wait(0.002):
            if ticket.cancelled.is_set():
                return "cancelled"
        if self.failing:
            return "error"
        logprobs = [self._with_logprobs(request, token) for token in request.prompt[1:]]
        deliver(PromptDone(tuple(logprobs) if request.prompt_logprobs else ()))
        script = self.tokenizer.encode(self.script(request))
        ends = sorted(request.end_ids)[:1] or script * 20
        for token in [*script, *ends][: request.max_new_tokens]:
            if ticket.cancelled.wait(self.seconds):
                return "cancelled"
            deliver(self._with_logprobs(request, token))
            if token in request.end_ids:
                return "stop"
        return "length"

    def _with_logprobs(self, request: Request, token: int) -> GeneratedToken:
        top = tuple((token + i, -0.25 - i) for i in range(request.top_logprobs))
        return GeneratedToken(token, -0.25, top)

    def wait_until_idle(self):
        with self._changed:
            assert self._changed.wait_for(lambda: not self._running, timeout=10)

    def statistics(self) -> Statistics:
        running, finished = self._running, len(self.reasons)
        return Statistics(
            running=running, finished=finished, generated_tokens=22, decode_seconds=1.5
        )

    def close(self):
        self.closed = True


@contextmanager
def serving(tokenizer, engine=None, **settings):
    """Runs a server on a free port of the loopback interface; yields its engine and its URL."""
    engine = engine or FakeEngine(tokenizer)
    defaults = {"name": "stories", "copy_bandwidth": 1e10, "max_tokens": 150, "max_body": 20_000}
    server_settings = ServerSettings(**(defaults | settings))
    with running(build_app(engine, tokenizer, server_settings)) as url:
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
