import queue
import threading
import time

import jax
import numpy as np
import pytest
from conftest import tiny_model

from llama_jax.errors import InputError
from llama_jax.inference.engine.engine import Engine
from llama_jax.inference.engine.requests import (
    EngineStopped,
    GeneratedToken,
    PromptDone,
    QueueFull,
    Request,
    RequestEnded,
)
from llama_jax.inference.logprobs import prompt_logprobs
from llama_jax.inference.sampling import Sampling
from llama_jax.inference.stream import stream
from llama_jax.model.transformer import forward
from llama_jax.model.weights import Llama, unstack_layers
from llama_jax.parallel.mesh import one_device_mesh, shard_array
from llama_jax.runtime.compile_cache import compile_statistics

CONFIG = tiny_model(context=2048)
RANDOM = np.random.default_rng(0)
DRAWN = Sampling(temperature=0.9, top_p=0.95)


def some(n):
    return tuple(RANDOM.integers(3, 320, n).tolist())


@pytest.fixture(scope="module")
def model():
    with jax.set_mesh(one_device_mesh()):
        return unstack_layers(jax.jit(Llama, static_argnums=0)(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def engine(model):
    with jax.set_mesh(one_device_mesh()):
        told = []
        engine = Engine(
            CONFIG, model, rows=3, context=700, queue=4, progress=lambda *of: told.append(of)
        )
        names = "prefill of 32 tokens", "prefill of 256 tokens", "decode", "cache resize and copy"
        assert told == [(i / 4, f"{i + 1} of 4: {name}, 956 slots") for i, name in enumerate(names)]
        yield engine
        engine.close()


class Answer:
    """Collects the events of a request."""

    def __init__(self, engine, request, pause=0.0):
        self.events, self.pause = queue.Queue(), pause
        (self.ticket,) = engine.submit([request], lambda _, event: self.take(event))
        self.tokens, self.reason, self.begun = [], None, None

    def take(self, event):
        time.sleep(self.pause)  # holds the engine up, so that a tiny model is not done too soon
        self.events.put(event)

    def wait(self, enough=None):
        while self.reason is None and (enough is None or len(self.tokens) < enough):
            event = self.events.get(timeout=60)
            if isinstance(event, GeneratedToken):
                self.tokens.append(event)
            elif isinstance(event, RequestEnded):
                self.reason = event.reason
            else:
                self.begun = event
        return self

    @property
    def ids(self):
        return [token.id for token in self.tokens]


def alone(model, request):
    with jax.set_mesh(one_device_mesh()):
        return list(
            stream(
                CONFIG, model, request.prompt, max_new_tokens=request.max_new_tokens,
                sampling=request.sampling, seed=request.seed, end_ids=request.end_ids,
            )
        )  # fmt: skip


def asked(engine, *requests):
    return [Answer(engine, request) for request in requests]


def test_tokens_are_the_same_alone_and_in_company(engine, model):
    requests = [
        Request(some(5), 20),
        Request(some(300), 12, DRAWN, seed=7),
        Request(some(40), 30, DRAWN, seed=8),
        Request(some(1), 9),
        Request(some(257), 5, Sampling(repetition_penalty=1.5)),
        Request(some(600), 20, DRAWN, seed=9),
    ]
    answers = asked(engine, *requests)
    for answer, request in zip(answers, requests, strict=True):
        assert answer.wait().ids == alone(model, request)
        assert answer.reason == "length"
        assert answer.begun == PromptDone()


def test_nothing_is_compiled_while_requests_come_and_go(engine):
    asked(engine, Request(some(3), 2))[0].wait()
    before = compile_statistics().programs
    requests = [Request(some(n), m, DRAWN, n) for n, m in ((1, 1), (33, 9), (256, 3), (500, 150))]
    for answer in asked(
        engine, *requests, Request(some(9), 3, logprobs=True, prompt_logprobs=True)
    ):
        answer.wait()
    assert compile_statistics().programs == before


def test_a_prompt_that_begins_like_another_is_not_read_again(engine, model):
    shared = some(100)
    first, second = Request(shared + some(10), 4), Request(shared + some(20), 4)
    asked(engine, first)[0].wait()
    before = engine.statistics()
    together = asked(engine, second, second)
    expected = alone(model, second)
    assert [answer.wait().ids for answer in together] == [expected, expected]
    after = engine.statistics()
    assert after.reused_tokens - before.reused_tokens >= 200
    assert after.prompt_tokens - before.prompt_tokens <= 40


def test_an_end_id_ends_the_text(engine, model):
    request = Request(some(6), 20)
    ids = alone(model, request)
    ends = frozenset({ids[4], 300})
    (answer,) = asked(engine, request._replace(end_ids=ends))
    assert answer.wait().ids == ids[: ids.index(ids[4]) + 1]
    assert answer.reason == "stop"


def test_logprobs_come_with_the_tokens(engine, model):
    request = Request(some(300), 3, logprobs=True, top_logprobs=4, prompt_logprobs=True)
    asked(engine, Request(request.prompt, 1))[0].wait()  # it would be found in the slots of this
    (answer,) = asked(engine, request)
    answer.wait()
    whole = [*request.prompt, *answer.ids]
    with jax.set_mesh(one_device_mesh()):
        expected = prompt_logprobs(CONFIG, model, np.array([whole], np.int32))[0]
    told = [*answer.begun.prompt_logprobs, *answer.tokens]
    np.testing.assert_allclose([token.logprob for token in told], expected, atol=1e-5)
    assert [token.id for token in told] == whole[1:]
    # The alternatives are those of an independent pass over the whole text.
    with jax.set_mesh(one_device_mesh()):
        logits = np.asarray(
            forward(CONFIG, model, shard_array(np.array([whole], np.int32), "BT"))[0]
        )
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    greedy = 0
    for token, at in zip(told, exact, strict=False):
        best = np.argsort(-at)[:4]
        assert [i for i, _ in token.top] == best.tolist()
        np.testing.assert_allclose([logprob for _, logprob in token.top], at[best], atol=1e-5)
        # Clients compare a token with the most likely one by these very numbers.
        assert dict(token.top).get(token.id, token.logprob) == token.logprob
        greedy += token.top[0][0] == token.id
    assert 3 <= greedy < 100


def test_a_request_can_be_given_up_while_it_waits_reads_or_makes(engine, model):
    running = [Answer(engine, Request(some(4), 690), pause=0.005) for _ in range(3)]
    for answer in running:
        answer.wait(1)
    waiting = asked(engine, Request(some(600), 5), Request(some(7), 5))
    waiting[0].ticket.cancel()
    running[1].ticket.cancel()
    assert running[1].wait().reason == "cancelled"
    assert waiting[0].wait().reason == "cancelled"
    waiting[1].wait()
    for answer in (running[0], running[2]):
        answer.ticket.cancel()
        assert answer.wait().reason == "cancelled"
    assert waiting[1].ids == alone(model, waiting[1].ticket.request)
    for answer in running:
        assert 0 < len(answer.ids) < 690
        expected = alone(model, answer.ticket.request._replace(max_new_tokens=len(answer.ids)))
        assert answer.ids == expected
    assert engine.statistics().running == 0


def test_a_full_queue_refuses(engine):
    answers = []

    def too_many():
        for _ in range(20):
            answers.append(Answer(engine, Request(some(4), 600), pause=0.005))

    with pytest.raises(QueueFull, match="requests are waiting: try again later"):
        too_many()
    assert 4 <= len(answers) <= 3 + 4
    for answer in answers:
        answer.ticket.cancel()
    assert {answer.wait().reason for answer in answers} == {"cancelled"}


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (Request((), 5), "the prompt is empty"),
        (Request((320,), 5), "token 320 of the prompt is outside the model's vocabulary of 320"),
        (Request((5,), 0), "0 new tokens: ask for at least 1"),
        (Request((5,) * 600, 101), "600 tokens and 101 new ones don't fit a context of 700"),
        (Request((5,), 1, top_logprobs=21), "21 alternatives: ask for 0 … 20"),
        (Request((5,), 1, end_ids=frozenset(range(17))), "17 end ids: at most 16 can be given"),
    ],
)
def test_what_can_not_be_served_is_refused_in_a_sentence(engine, request_, sentence):
    with pytest.raises(InputError, match=sentence):
        engine.submit([Request((5,), 1), request_], lambda *_: None)
    assert engine.statistics().waiting == 0


def test_many_requests_from_many_threads_are_not_mixed_up(engine, model):
    requests = [Request(some(n % 30 + 1), n % 7 + 1, DRAWN, seed=n) for n in range(24)]
    wrong = []

    def ask(request):
        while True:
            try:
                (answer,) = asked(engine, request)
                break
            except QueueFull:
                time.sleep(0.01)
        wrong.extend([request] if answer.wait().ids != alone(model, request) else [])

    threads = [threading.Thread(target=ask, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_closing_ends_what_runs_and_refuses_what_comes(model):
    with jax.set_mesh(one_device_mesh()):
        engine = Engine(CONFIG, model, rows=3, context=700)
    answer = Answer(engine, Request(some(4), 690), pause=0.005)
    answer.wait(1)
    engine.close()
    assert answer.wait().reason == "cancelled"
    with pytest.raises(EngineStopped, match="the engine is closed"):
        engine.submit([Request((5,), 1)], lambda *_: None)


PROGRAMS = ["engine.copy_row", "row_programs.prefill_chunk", "row_programs.decode_rows"]


@pytest.mark.parametrize("failure", [MemoryError, SystemExit])
@pytest.mark.parametrize("place", PROGRAMS)
def test_a_failure_ends_all_requests_and_is_logged_once(model, failure, place, monkeypatch, caplog):
    with jax.set_mesh(one_device_mesh()):
        engine = Engine(CONFIG, model, rows=3, context=700)
    first = Answer(engine, Request((5,) * 40, 690 - 40), pause=0.005)
    first.wait(1)
    submitted = threading.Event()

    def fail(*_, **__):
        submitted.wait(60)
        raise failure("no room")

    monkeypatch.setattr(f"llama_jax.inference.engine.{place}", fail)
    deliveries = queue.Queue()
    engine.submit([Request((5,) * 60, 9)] * 8, lambda *event: deliveries.put(event))
    submitted.set()
    said = f"{failure.__name__}: no room"
    assert first.wait().reason == "error"
    ended = set()
    while len(ended) < 8:
        index, event = deliveries.get(timeout=60)
        ended |= {(index, event)} if isinstance(event, RequestEnded) else set()
    assert ended == {(i, RequestEnded("error", said)) for i in range(8)}
    assert engine.failure == said
    with pytest.raises(EngineStopped, match=f"the engine has failed: {said}"):
        engine.submit([Request((5,), 1)], lambda *_: None)
    assert [record.message for record in caplog.records] == ["the engine has failed"]
    assert caplog.text.count("Traceback") == 1
    assert caplog.text.count(said) == 1


def test_a_request_that_is_given_up_leaves_the_queue_at_once(model):
    with jax.set_mesh(one_device_mesh()):
        engine = Engine(CONFIG, model, rows=3, context=700, queue=4)
    held, reached = threading.Event(), threading.Event()

    def hold(index, event):  # the engine stands still, as while it makes one long step
        reached.set()
        held.wait(60)

    engine.submit([Request(some(4), 9)], hold)
    assert reached.wait(60)
    events = queue.Queue()
    for _ in range(16):
        tickets = engine.submit([Request(some(4), 9)] * 20, lambda *event: events.put(event))
        with pytest.raises(QueueFull):
            engine.submit([Request(some(4), 9)], lambda *_: None)
        for ticket in tickets:
            ticket.cancel()
        assert sorted(events.get_nowait() for _ in range(20)) == [
            (i, RequestEnded("cancelled")) for i in range(20)
        ]
    assert engine.statistics().waiting == 0
    held.set()
    engine.close()


def test_more_texts_than_the_queue_has_room_for_are_taken_together(engine, model):
    request = Request(some(5), 3)
    events = queue.Queue()
    engine.submit([request] * 100, lambda *event: events.put(event))
    with pytest.raises(QueueFull):
        engine.submit([request], lambda *_: None)
    made = {i: [] for i in range(100)}
    ended = []
    while len(ended) < 100:
        index, event = events.get(timeout=60)
        if isinstance(event, GeneratedToken):
            made[index].append(event.id)
        elif isinstance(event, RequestEnded):
            ended.append((index, event.reason))
    assert sorted(ended) == [(i, "length") for i in range(100)]
    assert list(made.values()) == [alone(model, request)] * 100
