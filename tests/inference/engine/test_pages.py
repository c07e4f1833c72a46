"""An engine whose rows share a pool of pages."""

from contextlib import closing
from dataclasses import replace

import jax
import pytest
from engine_requests import CONFIG, DRAWN, Response, random_prompt, submit, tokens_alone

from llama_jax.checkpoint.model_folders import save_model
from llama_jax.errors import InputError
from llama_jax.inference.engine import page_pool
from llama_jax.inference.engine.engine import Engine
from llama_jax.inference.engine.page_pool import Pool, pool_pages
from llama_jax.inference.engine.pages import pages_needed
from llama_jax.inference.engine.requests import Request
from llama_jax.inference.load import load
from llama_jax.inference.sampling import Sampling
from llama_jax.model import attention as model_attention
from llama_jax.model.cache import PAGE
from llama_jax.model.weights import Llama, unstack_layers
from llama_jax.parallel.mesh import one_device_mesh, tensor_mesh
from llama_jax.runtime.compile_cache import compile_statistics

POOL = 8  # pages: a text of the engine's context of 700 tokens needs six


@pytest.fixture(scope="module")
def model():
    with jax.set_mesh(one_device_mesh()):
        return unstack_layers(jax.jit(Llama, static_argnums=0)(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def engine(model):
    with jax.set_mesh(one_device_mesh()):
        programs = []
        engine = Engine(
            CONFIG, model, rows=6, context=700, queue=9, cache_tokens=POOL * PAGE,
            progress=lambda share, text: programs.append(text),
        )  # fmt: skip
        assert programs[2:] == [
            "3 of 5: prefill of 32 tokens, 956 slots",
            "4 of 5: prefill of 256 tokens, 956 slots",
            "5 of 5: decode, 9 pages",
        ]
        yield engine
        engine.close()


def pool_of(engine):
    return engine._storage._pools[0]


def test_a_request_gets_the_same_tokens_alone_and_in_company(engine, model):
    """Together the requests need more pages than there are: some wait for others to end."""
    requests = [
        Request(random_prompt(5), 20),
        Request(random_prompt(300), 12, DRAWN, seed=7),
        Request(random_prompt(110), 40, DRAWN, seed=8),  # grows into a second page
        Request(random_prompt(1), 9),
        Request(random_prompt(257), 5, Sampling(repetition_penalty=1.5)),
        Request(random_prompt(600), 9, DRAWN, seed=9),
        Request(random_prompt(120), 8),  # its page is full
    ]
    assert sum(pages_needed(request, PAGE) for request in requests) > POOL
    expected = [tokens_alone(model, request) for request in requests]
    submit(engine, requests[0])[0].wait()
    before = compile_statistics().programs
    for _ in range(2):  # the second time with their prefixes
        responses = submit(engine, *requests)
        assert [response.wait().ids for response in responses] == expected
        assert {response.reason for response in responses} == {"length"}
    assert compile_statistics().programs == before
    assert engine.statistics().running == 0
    assert sum(pool_of(engine)._holders) == 0


def test_rows_share_the_complete_pages_of_a_common_prefix(engine, model):
    prefix = random_prompt(3 * PAGE + 50)
    request, other = (Request(prefix + random_prompt(n), 4) for n in (10, 20))
    before = engine.statistics()
    responses = submit(engine, request, request, other)  # 12 pages, of which they share three
    for response in responses:
        assert response.wait().ids == tokens_alone(model, response.ticket.request)
    after = engine.statistics()
    assert after.reused_tokens - before.reused_tokens == 2 * 3 * PAGE
    (again,) = submit(engine, request._replace(prompt=request.prompt[: 3 * PAGE]))
    assert again.wait().ids == tokens_alone(model, again.ticket.request)
    # The prompt's last token is prefilled: with it the third page is not reused.
    assert engine.statistics().reused_tokens - after.reused_tokens == 2 * PAGE


def test_generated_tokens_are_a_prefix_of_the_next_turn(engine, model):
    (first,) = submit(engine, Request(random_prompt(100), 60))
    turn = Request((*first.ticket.request.prompt, *first.wait().ids, *random_prompt(9)), 5)
    before = engine.statistics().reused_tokens
    assert submit(engine, turn)[0].wait().ids == tokens_alone(model, turn)
    assert engine.statistics().reused_tokens - before == PAGE


def test_prompt_logprobs_reuse_no_page_but_later_prompts_reuse_theirs(engine):
    request = Request(random_prompt(200), 2, prompt_logprobs=True)
    before = engine.statistics().reused_tokens
    found = [submit(engine, request)[0].wait() for _ in range(2)]
    first, second = (response.prompt_done.prompt_logprobs for response in found)
    assert first == second
    assert len(first) == 199
    assert engine.statistics().reused_tokens == before
    submit(engine, request._replace(prompt_logprobs=False))[0].wait()
    assert engine.statistics().reused_tokens - before == PAGE


def test_cancelled_requests_release_their_pages(engine, model):
    running = [Response(engine, Request(random_prompt(4), 690), pause=0.005) for _ in range(3)]
    running[0].wait(1)  # the others wait for its pages
    for response in (running[2], running[0], running[1]):
        response.ticket.cancel()
        assert response.wait().reason == "cancelled"
    (response,) = submit(engine, Request(random_prompt(650), 50))
    assert response.wait().ids == tokens_alone(model, response.ticket.request)
    assert sum(pool_of(engine)._holders) == 0


@pytest.mark.slow
def test_devices_with_the_same_head_share_its_pages(model, tmp_path):
    """Twice as many devices as key/value heads: each has a half of every page of 256 slots."""
    with jax.set_mesh(one_device_mesh()):
        stacked = jax.jit(Llama, static_argnums=0)(CONFIG, jax.random.key(0))
        save_model(tmp_path / "model", CONFIG, stacked, tokenizer=None)
    prefix = random_prompt(2 * PAGE + 9)
    requests = [Request(prefix + random_prompt(n), 20) for n in (10, 120)]
    requests.append(Request(random_prompt(PAGE - 5), 15, DRAWN))  # grows into the other half
    with jax.set_mesh(tensor_mesh(CONFIG, jax.devices()[:8])):
        config, copied = load(tmp_path / "model")
        with closing(Engine(config, copied, rows=3, context=512, cache_tokens=9 * PAGE)) as engine:
            assert pool_of(engine)._holders == [0] * 5
            expected = [tokens_alone(model, request) for request in requests]
            for _ in range(2):  # the second time with their prefixes
                responses = submit(engine, *requests)
                assert [response.wait().ids for response in responses] == expected
            assert engine.statistics().reused_tokens >= 2 * 2 * PAGE


def test_a_pool_retains_named_pages_until_it_needs_them():
    pool = Pool(4)
    held = [pool.take() for _ in range(3)]
    assert sorted(held) == [1, 2, 3]
    for page, name in zip(held, (b"a", b"b", b""), strict=True):
        if name:
            pool.name(page, name)
    pool.hold(held[0])
    assert not pool.can_hold([], 1)
    for page in reversed(held):
        pool.release(page)
    # One page is free, b stays, and a is still held once.
    assert pool.can_hold([held[0]], 2)
    assert not pool.can_hold([held[0]], 3)
    assert pool.can_hold([held[1]], 1)
    assert not pool.can_hold([held[1]], 2)
    pool.release(held[0])
    assert [pool.find(name) for name in (b"a", b"b")] == held[:2]
    assert [pool.take(), pool.take()] == [held[2], held[1]]  # b was released first
    assert pool.find(b"b") is None
    assert pool.find(b"a") == held[0]
    pool.name(held[2], b"a")  # another page has this name
    assert pool.find(b"a") == held[0]


@pytest.mark.parametrize(
    ("platform", "attention", "cache_tokens", "expected"),
    [
        ("cpu", "auto", None, None),
        ("tpu", "auto", None, 1 + 4 * 6),
        ("tpu", "xla", None, None),
        ("gpu", "auto", None, 1 + 4 * 6),
        ("gpu", "xla", None, None),
        ("cpu", "auto", 768, 1 + 6),
        ("cpu", "auto", 895, 1 + 6),
    ],
)
@pytest.mark.usefixtures("one_device")
def test_pages_are_the_default_where_a_kernel_reads_them(
    monkeypatch, platform, attention, cache_tokens, expected
):
    monkeypatch.setattr(model_attention, "platform", lambda: platform)
    config = replace(CONFIG, attention=attention, head_dim=128)
    assert pool_pages(config, 4, 700, cache_tokens) == expected


@pytest.mark.usefixtures("one_device")
def test_the_pool_has_room_for_the_longest_text():
    message = "a cache of 767 tokens has no room for a text of 700: ask for at least 768"
    with pytest.raises(InputError, match=message):
        pool_pages(CONFIG, 4, 700, 767)


@pytest.mark.usefixtures("one_device")
def test_the_table_of_pages_fits_the_scalar_memory(monkeypatch):
    for module in (model_attention, page_pool):
        monkeypatch.setattr(module, "platform", lambda: "tpu")
    config = replace(CONFIG, head_dim=128)
    rows = (
        page_pool.MAX_TABLE // 8
    )  # a row has 6 pages for 700 tokens, and 2 for the last chunk's padding
    assert pool_pages(config, rows, 700, None) == 1 + rows * 6
    with pytest.raises(InputError, match=f"ask for at most {rows} rows, or for a shorter"):
        pool_pages(config, rows + 1, 700, None)


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "cache_dtype"), [(1, "same"), (4, "int8"), (8, "same")])
def test_the_kernel_of_gpus_gives_the_tokens_of_xla(monkeypatch, tmp_path, devices, cache_dtype):
    """Alone and in company, in chunks, after a reused prefix; 8 devices have 4 heads."""
    config = replace(CONFIG, head_dim=16, cache_dtype=cache_dtype)
    with jax.set_mesh(one_device_mesh()):
        stacked = jax.jit(Llama, static_argnums=0)(config, jax.random.key(0))
        save_model(tmp_path / "model", config, stacked, tokenizer=None)
        alone = unstack_layers(stacked)
    prefix = random_prompt(260)
    requests = [
        Request(random_prompt(5), 20),
        Request(prefix + random_prompt(30), 12, DRAWN, seed=7),
        Request(prefix + random_prompt(9), 12),
    ]
    expected = [tokens_alone(alone, request, config) for request in requests]
    with jax.set_mesh(tensor_mesh(config, jax.devices()[:devices])):
        config, model = load(tmp_path / "model")
        monkeypatch.setattr(model_attention, "platform", lambda: "gpu")
        jax.clear_caches()  # the programs of the CPU
        with closing(Engine(config, model, rows=3, context=512)) as engine:
            assert submit(engine, requests[0])[0].wait().ids == expected[0]
            for _ in range(2):  # the second time with their prefixes
                responses = submit(engine, *requests)
                assert [response.wait().ids for response in responses] == expected
            assert engine.statistics().reused_tokens >= 2 * PAGE
