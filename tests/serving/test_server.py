"""The server over HTTP: limits, API keys, disconnects, failures, metrics."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from fake_engine import ANSWER, CHAT, COMPLETION, HELLO, FakeEngine, complete, new_client, serving
from prometheus_client.parser import text_string_to_metric_families

from llama_jax.errors import InputError
from llama_jax.serving.middleware import allowed_hosts
from llama_jax.serving.server import ServerSettings, bind_socket, startup_message

pytest_plugins = ["server_fixtures"]


def test_a_body_over_the_limit_is_rejected(http):
    body = json.dumps({"prompt": "a" * 20_000}).encode()
    for content in (body, iter([body[:9_000], body[9_000:], b" " * 9_000])):
        answer = http.post(COMPLETION, content=content)
        assert answer.status_code == 413
        assert answer.json()["error"]["message"] == "the body is longer than 20000 bytes"


def test_all_routes_except_health_and_the_page_require_the_key(tokenizer):
    with serving(tokenizer, api_key="correct horse") as (_, url):
        for key, problem in [("", "is missing"), ("wrong", "is wrong"), ("é", "is wrong")]:
            headers = [(b"authorization", b"Bearer " + key.encode())] if key else []
            for path in ("/v1/models", "/metrics", "/nowhere"):
                answer = httpx.get(url + path, headers=headers)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                assert problem in answer.json()["error"]["message"]
        with new_client(url, "wrong") as client, pytest.raises(openai.AuthenticationError):
            complete(client)
        with new_client(url, "correct horse") as client:
            assert complete(client, max_tokens=2).usage.completion_tokens == 2
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        assert "llama_jax" in httpx.get(url).text


def test_a_full_queue_returns_429_with_retry_after(client, engine):
    engine.may_generate.clear()
    try:
        with ThreadPoolExecutor(1) as pool:
            n = FakeEngine.rows + FakeEngine.queue
            first = pool.submit(complete, client, n=n, max_tokens=1)
            while len(engine.requests) < n:
                time.sleep(0.002)
            with pytest.raises(openai.RateLimitError) as raised:
                complete(client)
            assert int(raised.value.response.headers["retry-after"]) > 0
            assert raised.value.code == "queue_full"
            assert len(engine.requests) == n
            engine.may_generate.set()
            assert len(first.result().choices) == n
    finally:
        engine.may_generate.set()


def test_one_request_may_have_more_texts_than_the_queue(client):
    assert len(complete(client, n=100, max_tokens=1).choices) == 100


@pytest.fixture(scope="module")
def short(tokenizer):
    with serving(tokenizer, timeout=0.2) as (engine, url), new_client(url) as client:
        yield engine, client


class TestTimeLimit:
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_request_without_a_token_in_time_fails(self, short, stream):
        engine, client = short
        engine.may_generate.clear()
        with pytest.raises(openai.InternalServerError) as raised:
            complete(client, stream=stream)
        assert raised.value.status_code == 504
        engine.wait_until_idle()
        engine.may_generate.set()

    def test_a_text_ends_at_the_time_limit(self, short):
        engine, client = short
        engine.script = lambda request: "x" * 150
        engine.seconds = 0.03
        completion = complete(client)
        assert completion.choices[0].finish_reason == "length"
        assert 0 < completion.usage.completion_tokens < 100
        assert completion.choices[0].text.strip("x ") == ""
        chunks = list(complete(client, stream=True))
        assert chunks[-1].choices[0].finish_reason == "length"
        engine.wait_until_idle()
        assert set(engine.reasons[-2:]) == {"cancelled"}


def test_an_engine_failure_is_reported(client, engine):
    engine.failing = True
    try:
        with pytest.raises(openai.InternalServerError, match="the engine has failed: out of mem"):
            complete(client)
    finally:
        engine.failing = False
    engine.failure = "MemoryError: no room"
    try:
        with pytest.raises(openai.InternalServerError) as raised:
            complete(client)
    finally:
        del engine.failure
    assert raised.value.status_code == 500
    assert raised.value.code == "engine_failed"
    assert raised.value.body["message"] == "the engine has failed: MemoryError: no room"


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_cancels_the_texts_of_the_request(served, engine, stream):
    port = int(served[1].rpartition(":")[2])
    body = json.dumps(
        {"prompt": "hello", "n": 3, "max_tokens": 150, "ignore_eos": True, "stream": stream}
    )
    engine.script = lambda request: "a" * 100
    try:
        if not stream:
            engine.may_generate.clear()
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = f"POST {COMPLETION} HTTP/1.1\r\nhost: localhost\r\n"
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
            if stream:
                assert b"200 OK" in connection.recv(100)
            else:
                while len(engine.requests) < 3:
                    time.sleep(0.002)
        engine.wait_until_idle()
        assert engine.reasons == ["cancelled"] * 3
    finally:
        del engine.script
        engine.may_generate.set()


def test_waiting_requests_get_503_when_the_server_shuts_down(tokenizer, monkeypatch):
    monkeypatch.setattr("llama_jax.serving.server._SHUTDOWN_GRACE_SECONDS", 0.2)
    with ThreadPoolExecutor(2) as pool:
        with serving(tokenizer) as (engine, url):
            engine.may_generate.clear()
            bodies = ({"prompt": "hello", "stream": stream} for stream in (False, True))
            waiting = [pool.submit(httpx.post, url + COMPLETION, json=body) for body in bodies]
            while len(engine.requests) < 2:
                time.sleep(0.002)
        answers = [answer.result() for answer in waiting]
    assert [answer.status_code for answer in answers] == [503, 503]
    assert {answer.json()["error"]["message"] for answer in answers} == {
        "the server is shutting down"
    }
    engine.wait_until_idle()
    assert engine.reasons == ["cancelled"] * 2


def test_concurrent_requests_get_their_own_texts(client, engine):
    def generate(i):
        stream = i % 2 == 0
        completion = complete(client, f"number {i}", seed=i, stream=stream)
        if stream:
            return "".join(chunk.choices[0].text for chunk in completion)
        return completion.choices[0].text

    numbers = range(24)
    with ThreadPoolExecutor(engine.rows + engine.queue) as pool:
        texts = list(pool.map(generate, numbers))
    assert texts == [ANSWER.replace("7", str(i)).replace("hello", f"number {i}") for i in numbers]


def test_metrics_count_requests_and_tokens(tokenizer):
    with serving(tokenizer) as (engine, url), httpx.Client(base_url=url) as http:
        for path, body in [(COMPLETION, {"prompt": "a"}), (COMPLETION, {}), (CHAT, HELLO)]:
            http.post(path, json=body | {"max_tokens": 3})
        http.get("/secret/path")
        engine.wait_until_idle()
        families = {f.name: f for f in text_string_to_metric_families(http.get("/metrics").text)}
    requests = {
        (s.labels["route"], s.labels["status"]): s.value
        for s in families["llama_jax_http_requests"].samples
        if s.name.endswith("_total")
    }
    assert requests == {
        (COMPLETION, "200"): 1, (COMPLETION, "400"): 1, (CHAT, "200"): 1, ("other", "404"): 1,
    }  # fmt: skip
    samples = {
        (s.name, s.labels.get("route")): s.value for f in families.values() for s in f.samples
    }
    assert samples["llama_jax_time_to_first_token_seconds_count", COMPLETION] == 1
    assert samples["llama_jax_http_request_duration_seconds_count", COMPLETION] == 2
    assert samples["llama_jax_generated_tokens_total", None] == 22
    assert samples["llama_jax_decode_seconds_total", None] == 1.5
    assert samples["llama_jax_finished_total", None] == 2
    assert samples["llama_jax_running", None] == 0


def test_requests_from_pages_of_other_sites_are_rejected(http):
    for site, status in [("cross-site", 403), ("same-site", 403), ("same-origin", 200)]:
        body = {"prompt": "a", "max_tokens": 1}
        answer = http.post(COMPLETION, json=body, headers={"sec-fetch-site": site})
        assert answer.status_code == status
    assert http.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200  # a link


def page_headers(**headers):
    """Returns the headers that a browser sends for a page."""
    return {name.replace("_", "-"): value for name, value in headers.items()}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        # DNS rebinding: the browser treats the server as a part of evil.example.
        (page_headers(host="evil.example:8000", sec_fetch_site="same-origin"), 403),
        (page_headers(host="evil.example", origin="http://evil.example"), 403),
        (page_headers(host="127.0.0.1.evil.example"), 403),
        (page_headers(host="localhost.evil.example:80"), 403),
        (page_headers(host="[::1"), 403),
        (page_headers(host="llm:8000"), 403),
        (page_headers(host="localhost:8000"), 200),
        (page_headers(host="LocalHost."), 200),
        (page_headers(host="llama.localhost"), 200),
        (page_headers(host="127.0.0.1:1"), 200),
        (page_headers(host="[::1]:8000"), 200),
        (page_headers(host="192.168.1.5:8000"), 200),  # an address, which DNS rebinding can't fake
        # Browsers send no sec-fetch-site over plain HTTP to an address that is not loopback.
        (page_headers(host="192.168.1.5:8000", origin="http://192.168.1.5:8000"), 200),
        (page_headers(host="192.168.1.5:8000", origin="http://192.168.1.5:9000"), 403),
        (page_headers(host="192.168.1.5:8000", origin="http://evil.example"), 403),
        (page_headers(host="192.168.1.5:8000", origin="null"), 403),
        (page_headers(host="192.168.1.5:8000", origin="http://["), 403),
        # A proxy with TLS changes the host: sec-fetch-site shows the page's origin.
        (
            page_headers(
                host="127.0.0.1:8000", origin="https://x.org", sec_fetch_site="same-origin"
            ),
            200,
        ),
        (
            page_headers(
                host="127.0.0.1:8000", origin="https://x.org", sec_fetch_site="cross-site"
            ),
            403,
        ),
    ],
)
def test_only_pages_of_the_server_itself_may_send_requests(http, headers, status):
    answer = http.post(COMPLETION, json={"prompt": "a", "max_tokens": 1}, headers=headers)
    assert answer.status_code == status, answer.text
    if "evil" in headers["host"]:
        for path in ("/", "/health", "/metrics", "/v1/models"):
            assert http.get(path, headers=headers).status_code == 403
        assert "start the server with --allow-host " in answer.json()["error"]["message"]


def test_allowed_hosts(tokenizer):
    here = allowed_hosts("box.lan", ["Models.example.org"], "127.0.0.1")
    names = ("models.example.org", "box.lan", "llm", "evil.example")
    assert [here.allow(f"{name}:80") for name in names] == [True, True, False, False]
    network = allowed_hosts("0.0.0.0", [], "0.0.0.0")
    assert [network.allow(name) for name in names] == [False, False, True, False]
    assert allowed_hosts("::1", ["*"], "::1").allow("evil.example")
    for wrong in ("http://a.b", "a.b:80", "a.b/c", ""):
        with pytest.raises(InputError, match=r"is not a host name: give one such as"):
            allowed_hosts("localhost", [wrong], "127.0.0.1")
    body, evil = {"prompt": "a", "max_tokens": 1}, {"host": "evil.example"}
    with serving(tokenizer, hosts=here) as (_, url):
        own = {"host": "127.0.0.1:80", "origin": "http://models.example.org"}
        assert httpx.post(url + COMPLETION, json=body, headers=own).status_code == 200
        assert httpx.post(url + COMPLETION, json=body, headers=evil).status_code == 403
        no_host = b"GET /health HTTP/1.0\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            connection.sendall(no_host)
            assert b"200 OK" in connection.recv(100)
    with serving(tokenizer, api_key="k") as (_, url):  # a page of another site lacks the key
        key = evil | {"authorization": "Bearer k"}
        assert httpx.post(url + COMPLETION, json=body, headers=key).status_code == 200
        assert httpx.post(url + COMPLETION, json=body, headers=evil).status_code == 401


def test_an_internal_error_is_reported_and_logged_without_the_request(http, engine, caplog):
    def broken(request):
        raise RuntimeError(f"secret {request.prompt}")

    engine.submit, submit = (lambda requests, deliver: broken(requests[0])), engine.submit
    try:
        answer = http.post(COMPLETION, json={"prompt": "secret"})
    finally:
        engine.submit = submit
    assert answer.status_code == 500
    assert (
        answer.json()["error"]["message"]
        == "the server failed to answer this request: its log has the traceback"
    )
    assert "RuntimeError at" in caplog.text
    assert "secret" not in caplog.text.replace('f"secret', "")


def test_the_startup_message_warns_if_other_machines_need_no_key():
    with bind_socket("127.0.0.1", 0) as bound:
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        expected = f"m is served at {url} (web page) and {url}/v1 (API)"
        assert startup_message(bound, ServerSettings("m")) == expected
    with bind_socket("0.0.0.0", 0) as bound:
        warning = "warning: the server has no API key"
        assert warning in startup_message(bound, ServerSettings("m"))
        assert "warning" not in startup_message(bound, ServerSettings("m", api_key="k"))
