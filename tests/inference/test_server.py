import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from fake_engine import FakeEngine, serving
from prometheus_client.parser import text_string_to_metric_families

from llama_jax.data.tokenizer import load_tokenizer
from llama_jax.inference.server import Settings, greeting, listen

ANSWER = " hello: é🦙, said with the seed 7.\nThat is all."


@pytest.fixture(scope="module")
def tokenizer(shared_data):
    return load_tokenizer(shared_data / "stories260K" / "hf")


def new_client(url, key="none"):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def served(tokenizer):
    with serving(tokenizer) as (engine, url):
        yield engine, url


@pytest.fixture
def engine(served):
    engine = served[0]
    engine.wait_until_idle()
    engine.requests.clear()
    engine.reasons.clear()
    return engine


@pytest.fixture
def client(served, engine):
    with new_client(served[1]) as client:
        yield client


@pytest.fixture
def http(served, engine):
    with httpx.Client(base_url=served[1]) as http:
        yield http


def complete(client, prompt="hello", **fields):
    fields = {"model": "stories", "max_tokens": 150, "seed": 7} | fields
    return client.completions.create(prompt=prompt, **fields)


def chat(client, content="hello", **fields):
    fields = {"model": "stories", "max_tokens": 150, "seed": 7} | fields
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(messages=messages, **fields)


class TestCompletions:
    def test_a_text_is_continued(self, client, engine, tokenizer):
        made = complete(client)
        assert made.choices[0].text == ANSWER
        assert made.choices[0].finish_reason == "stop"
        assert made.choices[0].logprobs is None
        assert (made.object, made.model) == ("text_completion", "stories")
        n = len(tokenizer.encode(ANSWER)) + 1
        counts = made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens
        assert counts == (len(engine.requests[0].prompt), n, len(engine.requests[0].prompt) + n)
        assert engine.requests[0].prompt == tuple(tokenizer.encode("hello", bos=True))
        assert engine.requests[0].end_ids == tokenizer.end_ids

    def test_a_stream_gives_the_same_text_in_whole_characters(self, client, tokenizer):
        chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
        *texts, last = chunks
        pieces = [chunk.choices[0].text for chunk in texts]
        assert "".join(pieces) == ANSWER
        assert len(pieces) > 10
        assert not any("\ufffd" in piece for piece in pieces)
        reasons = [chunk.choices[0].finish_reason for chunk in texts]
        assert reasons == [None] * (len(texts) - 1) + ["stop"]
        assert (last.choices, last.usage.prompt_tokens) == ([], 4)
        assert last.usage.completion_tokens == len(tokenizer.encode(ANSWER)) + 1
        assert all(chunk.usage is None for chunk in texts)
        assert len({chunk.id for chunk in chunks}) == 1

    def test_the_events_of_a_stream_are_openais(self, http):
        body = {"prompt": "hello", "max_tokens": 2, "stream": True}
        answer = http.post("/v1/completions", json=body)
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        *events, done, nothing = answer.text.split("\n\n")
        assert (done, nothing) == ("data: [DONE]", "")
        told = [json.loads(event.removeprefix("data: ")) for event in events]
        assert told[-1]["choices"][0]["finish_reason"] == "length"
        assert all("usage" not in one for one in told)

    def test_prompts_may_be_texts_or_tokens_and_several(self, client, engine, tokenizer):
        ids = tokenizer.encode("two")
        for prompt, expected in [
            (["one", "two"], [tokenizer.encode(text, bos=True) for text in ("one", "two")]),
            (ids, [ids]),
            ([ids, [1]], [ids, [1]]),
            ("", [[1]]),
        ]:
            engine.requests.clear()
            made = complete(client, prompt, max_tokens=3, n=2)
            assert [list(r.prompt) for r in engine.requests[::2]] == expected
            assert [choice.index for choice in made.choices] == list(range(2 * len(expected)))
            assert [choice.finish_reason for choice in made.choices] == ["length"] * len(
                made.choices
            )
            assert made.usage.prompt_tokens == sum(map(len, expected))
            assert made.usage.completion_tokens == 6 * len(expected)

    def test_each_of_n_texts_has_a_seed_of_its_own(self, client, engine):
        made = complete(client, n=3)
        assert [r.seed for r in engine.requests] == [7, 8, 9]
        assert [choice.text[choice.text.index("seed") :][:6] for choice in made.choices] == [
            "seed 7",
            "seed 8",
            "seed 9",
        ]
        assert complete(client, n=3, stream=False).choices == made.choices
        drawn = {complete(client, max_tokens=1, seed=None) and engine.requests[-1].seed} | {
            complete(client, max_tokens=1, seed=None) and engine.requests[-1].seed
        }
        assert len(drawn) == 2

    def test_texts_of_one_stream_are_told_apart(self, client):
        texts = {}
        for chunk in complete(client, ["hello", "you"], n=2, stream=True):
            index = chunk.choices[0].index
            texts[index] = texts.get(index, "") + chunk.choices[0].text
        assert texts == {
            0: ANSWER,
            1: ANSWER.replace("7", "8"),
            2: ANSWER.replace("hello", "you"),
            3: ANSWER.replace("hello", "you").replace("7", "8"),
        }

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_stop_string_ends_a_text_and_its_ticket(self, client, engine, stream):
        made = complete(client, stop=["with the s", "zzz"], stream=stream, logprobs=0)
        choices = [chunk.choices[0] for chunk in made] if stream else made.choices
        assert "".join(choice.text for choice in choices) == " hello: é🦙, said "
        assert choices[-1].finish_reason == "stop"
        tokens = [t for c in choices if c.logprobs for t in c.logprobs.tokens]
        assert "".join(tokens).endswith(" said with")  # a space of the last is still shown
        engine.wait_until_idle()
        assert engine.reasons == ["cancelled"]

    def test_all_settings_reach_the_engine(self, client, engine):
        extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True}
        complete(
            client, temperature=0.5, top_p=0.9, presence_penalty=0.3, frequency_penalty=-0.4,
            extra_body=extra, user="somebody", max_tokens=60,
        )  # fmt: skip
        request = engine.requests[0]
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 5)
        assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.2)
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.3, -0.4)
        assert (request.max_new_tokens, request.end_ids) == (60, frozenset())
        complete(client, max_tokens=None, temperature=None)
        assert (engine.requests[1].max_new_tokens, engine.requests[1].sampling.temperature) == (
            16,
            1,
        )

    def test_log_probabilities_stand_beside_their_tokens(self, client, tokenizer):
        said = complete(client, logprobs=2).choices[0]
        scores = said.logprobs
        assert len(scores.tokens) == len(tokenizer.encode(ANSWER)) + 1
        assert set(scores.token_logprobs) == {-0.25}
        assert scores.tokens[:2] == [" ", " h"] or "".join(scores.tokens[:3]).startswith(" h")
        for token, top, at in zip(
            scores.tokens, scores.top_logprobs, scores.text_offset, strict=True
        ):
            assert len(top) <= 2
            assert top[token] == -0.25 == max(top.values())
            assert "\ufffd" in token or said.text[at:].startswith(token)

    def test_an_echo_brings_the_prompts_own_log_probabilities(self, client, engine, tokenizer):
        ids = tokenizer.encode("hello", bos=True)
        for made in (complete(client, ids, echo=True, logprobs=1, max_tokens=k) for k in (0, 1)):
            said, k = made.choices[0], made.usage.completion_tokens
            assert said.finish_reason == "length"
            assert said.text.startswith("hello")
            scores = said.logprobs
            assert len(scores.tokens) == len(ids) + k
            assert "".join(scores.tokens[: len(ids)]) == "hello"
            assert scores.token_logprobs == [None] + [-0.25] * (len(ids) - 1 + k)
            assert scores.top_logprobs[0] is None
            assert scores.text_offset[:2] == [0, 0]
            assert scores.text_offset[-1] == len("hello") if k else True
        assert [request.prompt_logprobs for request in engine.requests] == [True, True]
        assert complete(client, echo=True, max_tokens=150).choices[0].text == "hello" + ANSWER
        chunks = complete(client, echo=True, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == "hello" + ANSWER
        chunks = list(complete(client, echo=True, stream=True, logprobs=0))
        assert "".join(chunk.choices[0].text for chunk in chunks) == "hello" + ANSWER
        assert chunks[0].choices[0].logprobs.token_logprobs[0] is None


class TestChat:
    def test_a_message_is_answered(self, client, engine, tokenizer):
        made = chat(client)
        said = made.choices[0]
        assert (made.object, said.message.role) == ("chat.completion", "assistant")
        assert said.message.content.endswith("é🦙, said with the seed 7.\nThat is all.")
        assert said.finish_reason == "stop"
        ids = tokenizer.encode_chat([{"role": "user", "content": "hello"}])
        assert engine.requests[0].prompt == tuple(ids)
        assert made.usage.prompt_tokens == len(ids)
        assert chat(client).choices == made.choices

    def test_a_stream_begins_with_the_role_and_ends_with_the_reason(self, client, engine):
        whole = chat(client).choices[0].message.content
        *chunks, last = chat(client, stream=True, stream_options={"include_usage": True})
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert (deltas[0].role, deltas[0].content) == ("assistant", "")
        assert "".join(delta.content or "" for delta in deltas) == whole
        assert all(delta.role is None for delta in deltas[1:])
        assert deltas[-1].content is None
        reasons = [chunk.choices[0].finish_reason for chunk in chunks]
        assert reasons == [None] * (len(chunks) - 1) + ["stop"]
        assert (last.choices, last.object) == ([], "chat.completion.chunk")
        assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens

    def test_the_openai_clients_own_reading_of_a_stream_works(self, client):
        messages = [{"role": "user", "content": "hello"}]
        fields = {"model": "stories", "max_tokens": 150, "seed": 7, "n": 2}
        with client.chat.completions.stream(messages=messages, **fields) as stream:
            for _ in stream:
                pass
            made = stream.get_final_completion()
        contents = [choice.message.content for choice in made.choices]
        assert contents[0].replace("7", "8") == contents[1]

    def test_log_probabilities_have_bytes(self, client):
        made = chat(client, logprobs=True, top_logprobs=2).choices[0]
        text = made.message.content.encode()
        known = [token for token in made.logprobs.content if token.bytes is not None]
        assert all(token.token.encode() == bytes(token.bytes) for token in known)
        assert all(bytes(token.bytes) in text for token in known)
        assert {token.logprob for token in made.logprobs.content} == {-0.25}
        assert {len(token.top_logprobs) for token in made.logprobs.content} == {2}
        assert made.logprobs.content[0].top_logprobs[0].token == made.logprobs.content[0].token
        chunks = list(chat(client, logprobs=True, stream=True))
        streamed = [
            token
            for chunk in chunks
            if chunk.choices[0].logprobs
            for token in chunk.choices[0].logprobs.content
        ]
        assert [t.token for t in streamed] == [t.token for t in made.logprobs.content]

    def test_contents_may_come_in_parts_and_a_length_by_either_name(self, client, engine):
        parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
        chat(client, parts, max_tokens=None, max_completion_tokens=5)
        chat(client, max_tokens=5)
        first, second = engine.requests
        assert first == second
        assert first.max_new_tokens == 5
        chat(client, max_tokens=None)
        assert engine.requests[-1].max_new_tokens == min(150, engine.context - len(first.prompt))

    def test_an_answer_can_be_sent_back(self, client, engine, tokenizer):
        said = chat(client, max_tokens=1).choices[0].message
        ask = {"role": "user", "content": "hello"}
        kind = {"role": "developer", "content": "Be kind."}
        messages = [kind, ask, said, ask]
        client.chat.completions.create(model="stories", max_tokens=1, messages=messages)
        messages = [{"role": "system", "content": "Be kind."}, ask]
        messages += [{"role": "assistant", "content": said.content}, ask]
        assert engine.requests[-1].prompt == tuple(tokenizer.encode_chat(messages))


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["stories"]
    assert client.models.retrieve("stories").context == FakeEngine.context
    with pytest.raises(openai.NotFoundError, match="there is no model 'a/b' here"):
        client.models.retrieve("a/b")


COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
# Where, what is sent, the status, and a part of the sentence.
BAD = [
    (COMPLETION, b"", 400, "the body is not valid JSON"),
    (COMPLETION, b'{"prompt": "a"', 400, "the body is not valid JSON"),
    (COMPLETION, b'{"prompt": "\xff"}', 400, "the body is not valid JSON"),
    (COMPLETION, b'{"prompt": "a", "temperature": NaN}', 400, "the body is not valid JSON"),
    (COMPLETION, b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400, "is not valid JSON"),
    (COMPLETION, b'{"prompt": "\\ud800"}', 400, "the body is not valid JSON"),
    (COMPLETION, [1], 400, "the body must be a JSON object"),
    (COMPLETION, {}, 400, "prompt is missing"),
    (COMPLETION, {"prompt": None}, 400, "prompt is missing"),
    (COMPLETION, {"prompt": []}, 400, "prompt must be a text, a list of texts"),
    (COMPLETION, {"prompt": ["a", [1]]}, 400, "prompt must be a text, a list of texts"),
    (COMPLETION, {"prompt": [[]]}, 400, "none of them empty"),
    (COMPLETION, {"prompt": [True]}, 400, "prompt must be a text"),
    (COMPLETION, {"prompt": [5, 512]}, 400, "token 512 of the prompt is outside the model's 512"),
    (COMPLETION, {"prompt": [-1]}, 400, "token -1 of the prompt is outside"),
    (COMPLETION, {"prompt": [10**30]}, 400, "of the prompt is outside"),
    (COMPLETION, {"prompt": [5] * 200}, 400, "a prompt of 200 tokens doesn't fit the context of"),
    (COMPLETION, {"prompt": [5] * 99, "max_tokens": 102}, 400, "99 tokens and max_tokens of 102"),
    (COMPLETION, {"prompt": "a", "max_tokens": 151}, 400, "max_tokens must be at most 150"),
    (COMPLETION, {"prompt": "a", "max_tokens": 0}, 400, "max_tokens must be at least 1"),
    (COMPLETION, {"prompt": "a", "max_tokens": -1}, 400, "max_tokens must be greater than or"),
    (COMPLETION, {"prompt": "a", "max_tokens": "5"}, 400, "max_tokens must be a valid integer"),
    (COMPLETION, {"prompt": "a", "temperature": -1}, 400, "temperature must be greater than or"),
    (COMPLETION, b'{"prompt": "a", "temperature": 1e999}', 400, "temperature must be"),
    (COMPLETION, {"prompt": "a", "temperature": "hot"}, 400, "temperature must be a valid number"),
    (COMPLETION, {"prompt": "a", "top_p": 0}, 400, "top_p must be greater than 0"),
    (COMPLETION, {"prompt": "a", "top_p": 1.1}, 400, "top_p must be less than or equal to 1"),
    (COMPLETION, {"prompt": "a", "top_k": -1}, 400, "top_k must be greater than or equal to 0"),
    (COMPLETION, {"prompt": "a", "min_p": 2}, 400, "min_p must be less than or equal to 1"),
    (COMPLETION, {"prompt": "a", "presence_penalty": 3}, 400, "presence_penalty must be less"),
    (COMPLETION, {"prompt": "a", "n": 0}, 400, "n must be greater than or equal to 1"),
    (COMPLETION, {"prompt": "a", "n": 1.5}, 400, "n must be a valid integer"),
    (COMPLETION, {"prompt": ["a"] * 65, "n": 2}, 400, "are more than the 128 texts"),
    (COMPLETION, {"prompt": "a", "seed": 2**63}, 400, "seed must be less than"),
    (COMPLETION, {"prompt": "a", "stop": ""}, 400, "stop must be a text or a list of texts"),
    (COMPLETION, {"prompt": "a", "stop": ["a", 1]}, 400, "stop must be a text or a list"),
    (COMPLETION, {"prompt": "a", "stop": ["a"] * 17}, 400, "stop may hold 16 texts of 256"),
    (COMPLETION, {"prompt": "a", "logprobs": 21}, 400, "logprobs must be less than or equal to 20"),
    (COMPLETION, {"prompt": "a", "stream": "yes"}, 400, "stream must be a valid boolean"),
    (COMPLETION, {"prompt": "a", "stream_options": {}}, 400, "stream_options needs stream"),
    (COMPLETION, {"prompt": "a", "best_of": 2}, 400, "best_of is not supported"),
    (COMPLETION, {"prompt": "a", "suffix": "b"}, 400, "suffix is not supported"),
    (COMPLETION, {"prompt": "a", "logit_bias": {"5": 1}}, 400, "logit_bias is not supported"),
    (COMPLETION, {"prompt": "a", "tempratur": 1}, 400, "tempratur is not a field of this request"),
    (COMPLETION, {"prompt": "a", "model": "gpt"}, 404, "there is no model 'gpt' here"),
    (COMPLETION, {"prompt": "a", "model": 5}, 400, "model must be a valid string"),
    (CHAT, {}, 400, "messages is missing"),
    (CHAT, {"messages": []}, 400, "messages must be a list of at least one message"),
    (CHAT, {"messages": ["a"]}, 400, "messages[0] must be an object with a role"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0].content must be a text"),
    (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, 400, "has the role 'tool'"),
    (CHAT, {"messages": [{"role": "assistant", "content": "a"}]}, 400, "the chat ends with"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages[0].content may hold parts of text only",
    ),
    (CHAT, HELLO | {"max_tokens": 0}, 400, "max_tokens must be greater than or equal to 1"),
    (CHAT, HELLO | {"max_tokens": 1, "max_completion_tokens": 2}, 400, "differ: give one of them"),
    (CHAT, HELLO | {"top_logprobs": 2}, 400, "top_logprobs needs logprobs to be true"),
    (CHAT, HELLO | {"tools": [{"type": "function"}]}, 400, "tools is not supported"),
    (CHAT, HELLO | {"response_format": {"type": "json_object"}}, 400, "response_format is not"),
    (CHAT, HELLO | {"messages": [{"role": "user", "content": "a " * 400}]}, 400, "doesn't fit"),
    ("/v1/embeddings", {"input": "a"}, 404, "there is nothing at /v1/embeddings"),
    ("/v1/models", {}, 405, "/v1/models can't be used by POST"),
]


@pytest.mark.parametrize(("path", "body", "status", "sentence"), BAD)
def test_a_wrong_request_gets_its_sentence(http, engine, path, body, status, sentence):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = http.post(path, content=content)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert sentence in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert engine.requests == []


def test_errors_name_the_field(client):
    with pytest.raises(openai.BadRequestError) as raised:
        complete(client, temperature=-1)
    assert (raised.value.param, raised.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as raised:
        complete(client, [5] * 200, max_tokens=None)
    assert (raised.value.param, raised.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(openai.NotFoundError) as raised:
        complete(client, model="gpt")
    assert raised.value.code == "model_not_found"


def test_fields_that_ask_for_nothing_are_taken(client):
    nothing = {"tools": [], "tool_choice": "none", "logit_bias": {}, "store": False}
    nothing |= {"response_format": {"type": "text"}, "metadata": {"a": "b"}, "stop": None}
    made = chat(client, max_tokens=2, extra_body=nothing)
    assert made.usage.completion_tokens == 2


def test_bodies_over_the_limit_are_refused(http):
    body = json.dumps({"prompt": "a" * 20_000}).encode()
    for content in (body, iter([body[:9_000], body[9_000:], b" " * 9_000])):
        answer = http.post(COMPLETION, content=content)
        assert answer.status_code == 413
        assert answer.json()["error"]["message"] == "the body is longer than 20000 bytes"


def test_a_key_is_asked_for(tokenizer):
    with serving(tokenizer, api_key="correct horse") as (_, url):
        for key, sentence in [("", "is missing"), ("wrong", "is wrong"), ("é", "is wrong")]:
            headers = [(b"authorization", b"Bearer " + key.encode())] if key else []
            for path in ("/v1/models", "/metrics", "/nowhere"):
                answer = httpx.get(url + path, headers=headers)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                assert sentence in answer.json()["error"]["message"]
        with new_client(url, "wrong") as client, pytest.raises(openai.AuthenticationError):
            complete(client)
        with new_client(url, "correct horse") as client:
            assert complete(client, max_tokens=2).usage.completion_tokens == 2
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        assert "llama_jax" in httpx.get(url).text


def test_a_full_queue_says_when_to_come_again(client, engine):
    engine.hold.clear()
    try:
        with pytest.raises(openai.RateLimitError) as raised:
            complete(client, n=FakeEngine.rows + FakeEngine.queue + 1)
        assert int(raised.value.response.headers["retry-after"]) > 0
        assert raised.value.code == "queue_full"
        engine.wait_until_idle()  # those that had a place have left it
        assert set(engine.reasons) == {"cancelled"}
    finally:
        engine.hold.set()


@pytest.fixture(scope="module")
def short(tokenizer):
    with serving(tokenizer, timeout=0.2) as (engine, url), new_client(url) as client:
        yield engine, client


class TestTimeLimit:
    @pytest.mark.parametrize("stream", [False, True])
    def test_nothing_in_time_is_an_error(self, short, stream):
        engine, client = short
        engine.hold.clear()
        with pytest.raises(openai.InternalServerError) as raised:
            complete(client, stream=stream)
        assert raised.value.status_code == 504
        engine.wait_until_idle()
        engine.hold.set()

    def test_what_is_there_in_time_is_given(self, short):
        engine, client = short
        engine.script = lambda request: "x" * 150
        engine.seconds = 0.03
        made = complete(client)
        assert made.choices[0].finish_reason == "length"
        assert 0 < made.usage.completion_tokens < 100
        assert made.choices[0].text.strip("x ") == ""
        chunks = list(complete(client, stream=True))
        assert chunks[-1].choices[0].finish_reason == "length"
        engine.wait_until_idle()
        assert set(engine.reasons[-2:]) == {"cancelled"}


def test_an_engine_that_fails_is_told(client, engine):
    engine.failing = True
    try:
        with pytest.raises(openai.InternalServerError, match="the engine has failed: out of mem"):
            complete(client)
    finally:
        engine.failing = False


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_texts(served, engine, stream):
    port = int(served[1].rpartition(":")[2])
    body = json.dumps(
        {"prompt": "hello", "n": 3, "max_tokens": 150, "ignore_eos": True, "stream": stream}
    )
    engine.script = lambda request: "a" * 100
    try:
        if not stream:
            engine.hold.clear()
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = f"POST {COMPLETION} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            connection.sendall((head + body).encode())
            if stream:
                assert b"200 OK" in connection.recv(100)
            else:
                while len(engine.requests) < 3:
                    time.sleep(0.002)
        engine.wait_until_idle()
        assert engine.reasons == ["cancelled"] * 3
    finally:
        del engine.script
        engine.hold.set()


def test_those_who_wait_are_told_that_the_server_ends(tokenizer, monkeypatch):
    monkeypatch.setattr("llama_jax.inference.server._GRACE", 0.2)
    with ThreadPoolExecutor(2) as pool:
        with serving(tokenizer) as (engine, url):
            engine.hold.clear()
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


def test_requests_at_once_are_not_mixed_up(client, engine):
    def ask(i):
        stream = i % 2 == 0
        made = complete(client, f"number {i}", seed=i, stream=stream)
        if stream:
            return "".join(chunk.choices[0].text for chunk in made)
        return made.choices[0].text

    numbers = range(24)
    with ThreadPoolExecutor(engine.rows + engine.queue) as pool:
        texts = list(pool.map(ask, numbers))
    assert texts == [ANSWER.replace("7", str(i)).replace("hello", f"number {i}") for i in numbers]


def test_metrics_count_what_was_answered(tokenizer):
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
    assert samples["llama_jax_made_tokens_total", None] == 22
    assert samples["llama_jax_decode_seconds_total", None] == 1.5
    assert samples["llama_jax_finished_total", None] == 2
    assert samples["llama_jax_running", None] == 0


def test_pages_of_other_sites_are_refused(http):
    for site, status in [("cross-site", 403), ("same-site", 403), ("same-origin", 200)]:
        body = {"prompt": "a", "max_tokens": 1}
        answer = http.post(COMPLETION, json=body, headers={"sec-fetch-site": site})
        assert answer.status_code == status
    assert http.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200  # a link


def test_an_error_of_the_server_is_told_and_logged_without_the_request(http, engine, caplog):
    def broken(request):
        raise RuntimeError(f"secret {request.prompt}")

    engine.submit, submit = (lambda request, deliver: broken(request)), engine.submit
    try:
        answer = http.post(COMPLETION, json={"prompt": "secret"})
    finally:
        engine.submit = submit
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the server has failed"
    assert "RuntimeError at" in caplog.text
    assert "secret" not in caplog.text.replace('f"secret', "")


def test_the_greeting_warns_where_everybody_can_come():
    with listen("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        said = greeting(bound, Settings("m"))
        assert (
            said
            == f"m is served at http://127.0.0.1:{port} (a page) and http://127.0.0.1:{port}/v1"
        )
    with listen("0.0.0.0", 0) as bound:
        assert "warning: there is no key" in greeting(bound, Settings("m"))
        assert "warning" not in greeting(bound, Settings("m", api_key="k"))
