import queue
import threading
import time

import jax
import pytest
from engine_requests import CONFIG, DRAWN, Response, random_prompt, submit, tokens_alone

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
from llama_jax.inference.sampling import Sampling
from llama_jax.model.weights import Llama, unstack_layers
from llama_jax.parallel.mesh import one_device_mesh
from llama_jax.runtime.compile_cache import compile_statistics


@pytest.fixture(scope="module")
def model():
    with jax.set_mesh(one_device_mesh()):
        return unstack_layers(jax.jit(Llama, static_argnums=0)(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def engine(model):
    with jax.set_mesh(one_device_mesh()):
        calls = []
        engine = Engine(
            CONFIG, model, rows=3, context=700, queue=4, progress=lambda *args: calls.append(args)
        )
        names = [f"scores of {length} prompt tokens" for length in ("256", "1,024")]
        programs = (
            "prefill of 32 tokens",
            "prefill of 256 tokens",
            "decode",
            "cache resize and copy",
        )
        names += [f"{program}, 956 slots" for program in programs]
        expected = [(i / 6, f"{i + 1} of 6: {name}") for i, name in enumerate(names)]
        assert calls == expected
        yield engine
        engine.close()


def test_a_request_gets_the_same_tokens_alone_and_in_a_batch(engine, model):
    requests = [
        Request(random_prompt(5), 20),
        Request(random_prompt(300), 12, DRAWN, seed=7),
        Request(random_prompt(40), 30, DRAWN, seed=8),
        Request(random_prompt(1), 9),
        Request(random_prompt(257), 5, Sampling(repetition_penalty=1.5)),
        Request(random_prompt(600), 20, DRAWN, seed=9),
    ]
    responses = submit(engine, *requests)
    for response, request in zip(responses, requests, strict=True):
        assert response.wait().ids == tokens_alone(model, request)
        assert response.reason == "length"
        assert response.prompt_done == PromptDone()


def test_nothing_is_compiled_while_requests_join_and_leave(engine):
    submit(engine, Request(random_prompt(3), 2))[0].wait()
    before = compile_statistics().programs
    requests = [
        Request(random_prompt(n), m, DRAWN, n) for n, m in ((1, 1), (33, 9), (256, 3), (500, 150))
    ]
    for response in submit(
        engine, *requests, Request(random_prompt(9), 3, logprobs=True, prompt_logprobs=True)
    ):
        response.wait()
    assert compile_statistics().programs == before


def test_a_common_prefix_is_not_prefilled_again(engine, model):
    prefix = random_prompt(100)
    first, second = Request(prefix + random_prompt(10), 4), Request(prefix + random_prompt(20), 4)
    submit(engine, first)[0].wait()
    before = engine.statistics()
    together = submit(engine, second, second)
    expected = tokens_alone(model, second)
    assert [response.wait().ids for response in together] == [expected, expected]
    after = engine.statistics()
    assert after.reused_tokens - before.reused_tokens >= 200
    assert after.prompt_tokens - before.prompt_tokens <= 40


def test_an_end_id_ends_the_text(engine, model):
    request = Request(random_prompt(6), 20)
    ids = tokens_alone(model, request)
    ends = frozenset({ids[4], 300})
    (response,) = submit(engine, request._replace(end_ids=ends))
    assert response.wait().ids == ids[: ids.index(ids[4]) + 1]
    assert response.reason == "stop"


def test_a_request_can_be_cancelled_in_the_queue_in_prefill_and_in_decode(engine, model):
    running = [Response(engine, Request(random_prompt(4), 690), pause=0.005) for _ in range(3)]
    for response in running:
        response.wait(1)
    waiting = submit(engine, Request(random_prompt(600), 5), Request(random_prompt(7), 5))
    waiting[0].ticket.cancel()
    running[1].ticket.cancel()
    assert running[1].wait().reason == "cancelled"
    assert waiting[0].wait().reason == "cancelled"
    waiting[1].wait()
    for response in (running[0], running[2]):
        response.ticket.cancel()
        assert response.wait().reason == "cancelled"
    assert waiting[1].ids == tokens_alone(model, waiting[1].ticket.request)
    for response in running:
        assert 0 < len(response.ids) < 690
        expected = tokens_alone(
            model, response.ticket.request._replace(max_new_tokens=len(response.ids))
        )
        assert response.ids == expected
    assert engine.statistics().running == 0


def test_a_full_queue_refuses_requests(engine):
    responses = []

    def submit_too_many():
        for _ in range(20):
            responses.append(Response(engine, Request(random_prompt(4), 600), pause=0.005))

    with pytest.raises(QueueFull, match="requests are waiting: try again later"):
        submit_too_many()
    assert 4 <= len(responses) <= 3 + 4
    for response in responses:
        response.ticket.cancel()
    assert {response.wait().reason for response in responses} == {"cancelled"}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), 5), "the prompt is empty"),
        (Request((320,), 5), "token 320 of the prompt is outside the model's vocabulary of 320"),
        (Request((5,), 0), "0 new tokens: ask for at least 1"),
        (Request((5,) * 600, 101), "600 tokens and 101 new ones don't fit a context of 700"),
        (Request((5,), 1, top_logprobs=21), "top_logprobs is 21: ask for 0 … 20"),
        (Request((5,), 1, end_ids=frozenset(range(17))), "17 end ids: at most 16 can be given"),
    ],
)
def test_invalid_requests_are_refused_with_a_reason(engine, request_, message):
    with pytest.raises(InputError, match=message):
        engine.submit([Request((5,), 1), request_], lambda *_: None)
    assert engine.statistics().waiting == 0


def test_requests_from_many_threads_get_their_own_tokens(engine, model):
    requests = [Request(random_prompt(n % 30 + 1), n % 7 + 1, DRAWN, seed=n) for n in range(24)]
    wrong = []

    def check(request):
        while True:
            try:
                (response,) = submit(engine, request)
                break
            except QueueFull:
                time.sleep(0.01)
        wrong.extend([request] if response.wait().ids != tokens_alone(model, request) else [])

    threads = [threading.Thread(target=check, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_closing_ends_running_requests_and_refuses_new_ones(model):
    with jax.set_mesh(one_device_mesh()):
        engine = Engine(CONFIG, model, rows=3, context=700)
    response = Response(engine, Request(random_prompt(4), 690), pause=0.005)
    response.wait(1)
    engine.close()
    assert response.wait().reason == "cancelled"
    with pytest.raises(EngineStopped, match="the engine is closed"):
        engine.submit([Request((5,), 1)], lambda *_: None)


PROGRAMS = ["device_batch.cache.copy_row", "row_programs.prefill_chunk", "row_programs.decode_rows"]


@pytest.mark.parametrize("failure", [MemoryError, SystemExit])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_failure_ends_all_requests_and_is_logged_once(
    model, failure, program, monkeypatch, caplog
):
    with jax.set_mesh(one_device_mesh()):
        engine = Engine(CONFIG, model, rows=3, context=700)
    first = Response(engine, Request((5,) * 40, 690 - 40), pause=0.005)
    first.wait(1)
    submitted = threading.Event()

    def fail(*_, **__):
        submitted.wait(60)
        raise failure("no room")

    monkeypatch.setattr(f"llama_jax.inference.engine.{program}", fail)
    deliveries = queue.Queue()
    engine.submit([Request((5,) * 60, 9)] * 8, lambda *event: deliveries.put(event))
    submitted.set()
    message = f"{failure.__name__}: no room"
    assert first.wait().reason == "error"
    ended = set()
    while len(ended) < 8:
        index, event = deliveries.get(timeout=60)
        ended |= {(index, event)} if isinstance(event, RequestEnded) else set()
    assert ended == {(i, RequestEnded("error", message)) for i in range(8)}
    assert engine.failure == message
    with pytest.raises(EngineStopped, match=f"the engine has failed: {message}"):
        engine.submit([Request((5,), 1)], lambda *_: None)
    assert [record.message for record in caplog.records] == ["the engine has failed"]
    assert caplog.text.count("Traceback") == 1
    assert caplog.text.count(message) == 1


def test_a_cancelled_request_leaves_the_queue_at_once(model):
    with jax.set_mesh(one_device_mesh()):
        engine = Engine(CONFIG, model, rows=3, context=700, queue=4)
    released, reached = threading.Event(), threading.Event()

    def hold(index, event):  # blocks the engine, as one long step would
        reached.set()
        released.wait(60)

    engine.submit([Request(random_prompt(4), 9)], hold)
    assert reached.wait(60)
    events = queue.Queue()
    for _ in range(16):
        tickets = engine.submit(
            [Request(random_prompt(4), 9)] * 20, lambda *event: events.put(event)
        )
        with pytest.raises(QueueFull):
            engine.submit([Request(random_prompt(4), 9)], lambda *_: None)
        for ticket in tickets:
            ticket.cancel()
        assert sorted(events.get_nowait() for _ in range(20)) == [
            (i, RequestEnded("cancelled")) for i in range(20)
        ]
    assert engine.statistics().waiting == 0
    released.set()
    engine.close()


def test_a_group_may_be_larger_than_the_queue(engine, model):
    request = Request(random_prompt(5), 3)
    events = queue.Queue()
    engine.submit([request] * 100, lambda *event: events.put(event))
    with pytest.raises(QueueFull):
        engine.submit([request], lambda *_: None)
    generated = {i: [] for i in range(100)}
    ended = []
    while len(ended) < 100:
        index, event = events.get(timeout=60)
        if isinstance(event, GeneratedToken):
            generated[index].append(event.id)
        elif isinstance(event, RequestEnded):
            ended.append((index, event.reason))
    assert sorted(ended) == [(i, "length") for i in range(100)]
    assert list(generated.values()) == [tokens_alone(model, request)] * 100
