"""Responses have OpenAI's form: completions, chats, streams, log-probabilities."""

import json

import openai
import pytest
from fake_engine import ANSWER, FakeEngine, chat, complete, new_client, serving

from llama_jax.tokenizer.tokenizer import load_tokenizer

pytest_plugins = ["server_fixtures"]


class TestCompletions:
    def test_a_completion_continues_the_prompt(self, client, engine, tokenizer):
        response = complete(client)
        assert response.choices[0].text == ANSWER
        assert response.choices[0].finish_reason == "stop"
        assert response.choices[0].logprobs is None
        assert (response.object, response.model) == ("text_completion", "stories")
        n = len(tokenizer.encode(ANSWER)) + 1
        usage = response.usage
        counts = usage.prompt_tokens, usage.completion_tokens, usage.total_tokens
        assert counts == (len(engine.requests[0].prompt), n, len(engine.requests[0].prompt) + n)
        assert engine.requests[0].prompt == tuple(tokenizer.encode("hello", bos=True))
        assert engine.requests[0].end_ids == tokenizer.end_ids

    def test_a_stream_has_the_same_text_in_complete_characters(self, client, tokenizer):
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

    def test_the_events_of_a_stream_have_openais_form(self, http):
        body = {"prompt": "hello", "max_tokens": 2, "stream": True}
        answer = http.post("/v1/completions", json=body)
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        *events, done, rest = answer.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert all("usage" not in chunk for chunk in chunks)

    def test_prompts_may_be_strings_or_token_ids_or_lists_of_them(self, client, engine, tokenizer):
        ids = tokenizer.encode("two")
        for prompt, expected in [
            (["one", "two"], [tokenizer.encode(text, bos=True) for text in ("one", "two")]),
            (ids, [ids]),
            ([ids, [1]], [ids, [1]]),
            ("", [[1]]),
        ]:
            engine.requests.clear()
            response = complete(client, prompt, max_tokens=3, n=2)
            assert [list(r.prompt) for r in engine.requests[::2]] == expected
            assert [choice.index for choice in response.choices] == list(range(2 * len(expected)))
            assert [choice.finish_reason for choice in response.choices] == ["length"] * len(
                response.choices
            )
            assert response.usage.prompt_tokens == sum(map(len, expected))
            assert response.usage.completion_tokens == 6 * len(expected)

    def test_special_tokens_in_a_prompt_are_parsed(self, client, engine, tokenizer):
        def prompt(text, **extra):
            complete(client, text, max_tokens=1, extra_body=extra)
            return list(engine.requests[-1].prompt)

        hello, there = tokenizer.encode("hello"), tokenizer.encode("there")
        assert prompt("hello</s>there") == [1, *hello, 2, *there]
        assert prompt("<s>hello") == [1, *hello]  # one begin token
        text = "<s>hello</s>there"
        assert prompt(text, parse_special=False) == [1, *tokenizer.encode(text)]
        chat(client, text, max_tokens=1)
        ids = tokenizer.encode("[INST] <s>hello</s>there [/INST]", bos=True)
        assert list(engine.requests[-1].prompt) == ids

    def test_each_of_n_texts_has_its_own_seed(self, client, engine):
        response = complete(client, n=3)
        assert [r.seed for r in engine.requests] == [7, 8, 9]
        assert [choice.text[choice.text.index("seed") :][:6] for choice in response.choices] == [
            "seed 7",
            "seed 8",
            "seed 9",
        ]
        assert complete(client, n=3, stream=False).choices == response.choices
        seeds = {complete(client, max_tokens=1, seed=None) and engine.requests[-1].seed} | {
            complete(client, max_tokens=1, seed=None) and engine.requests[-1].seed
        }
        assert len(seeds) == 2

    def test_chunks_of_a_stream_carry_the_index_of_their_text(self, client):
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
    def test_a_stop_string_ends_the_text_and_cancels_the_request(self, client, engine, stream):
        response = complete(client, stop=["with the s", "zzz"], stream=stream, logprobs=0)
        choices = [chunk.choices[0] for chunk in response] if stream else response.choices
        assert "".join(choice.text for choice in choices) == " hello: é🦙, said "
        assert choices[-1].finish_reason == "stop"
        tokens = [t for c in choices if c.logprobs for t in c.logprobs.tokens]
        assert "".join(tokens).endswith(
            " said with"
        )  # the space of this token precedes the stop string
        engine.wait_until_idle()
        assert engine.reasons == ["cancelled"]

    def test_all_parameters_reach_the_engine(self, client, engine):
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

    def test_log_probabilities_belong_to_their_tokens(self, client, tokenizer):
        choice = complete(client, logprobs=2).choices[0]
        scores = choice.logprobs
        assert len(scores.tokens) == len(tokenizer.encode(ANSWER)) + 1
        assert set(scores.token_logprobs) == {-0.25}
        assert scores.tokens[:2] == [" ", " h"] or "".join(scores.tokens[:3]).startswith(" h")
        for token, top, at in zip(
            scores.tokens, scores.top_logprobs, scores.text_offset, strict=True
        ):
            assert len(top) <= 2
            assert top[token] == -0.25 == max(top.values())
            assert "\ufffd" in token or choice.text[at:].startswith(token)

    def test_an_echo_includes_the_log_probabilities_of_the_prompt(self, client, engine, tokenizer):
        ids = tokenizer.encode("hello", bos=True)
        for response in (
            complete(client, ids, echo=True, logprobs=1, max_tokens=k) for k in (0, 1)
        ):
            choice, k = response.choices[0], response.usage.completion_tokens
            assert choice.finish_reason == "length"
            assert choice.text.startswith("hello")
            scores = choice.logprobs
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
        response = chat(client)
        choice = response.choices[0]
        assert (response.object, choice.message.role) == ("chat.completion", "assistant")
        assert choice.message.content.endswith("é🦙, said with the seed 7.\nThat is all.")
        assert choice.finish_reason == "stop"
        ids = tokenizer.encode_chat([{"role": "user", "content": "hello"}])
        assert engine.requests[0].prompt == tuple(ids)
        assert response.usage.prompt_tokens == len(ids)
        assert chat(client).choices == response.choices

    def test_a_stream_begins_with_the_role_and_ends_with_the_reason(self, client, engine):
        text = chat(client).choices[0].message.content
        *chunks, last = chat(client, stream=True, stream_options={"include_usage": True})
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert (deltas[0].role, deltas[0].content) == ("assistant", "")
        assert "".join(delta.content or "" for delta in deltas) == text
        assert all(delta.role is None for delta in deltas[1:])
        assert deltas[-1].content is None
        reasons = [chunk.choices[0].finish_reason for chunk in chunks]
        assert reasons == [None] * (len(chunks) - 1) + ["stop"]
        assert (last.choices, last.object) == ([], "chat.completion.chunk")
        assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens

    def test_the_stream_helper_of_openais_client_works(self, client):
        messages = [{"role": "user", "content": "hello"}]
        fields = {"model": "stories", "max_tokens": 150, "seed": 7, "n": 2}
        with client.chat.completions.stream(messages=messages, **fields) as stream:
            for _ in stream:
                pass
            response = stream.get_final_completion()
        contents = [choice.message.content for choice in response.choices]
        assert contents[0].replace("7", "8") == contents[1]

    def test_log_probabilities_have_bytes(self, client):
        choice = chat(client, logprobs=True, top_logprobs=2).choices[0]
        text = choice.message.content.encode()
        known = [token for token in choice.logprobs.content if token.bytes is not None]
        assert all(token.token.encode() == bytes(token.bytes) for token in known)
        assert all(bytes(token.bytes) in text for token in known)
        assert {token.logprob for token in choice.logprobs.content} == {-0.25}
        assert {len(token.top_logprobs) for token in choice.logprobs.content} == {2}
        assert choice.logprobs.content[0].top_logprobs[0].token == choice.logprobs.content[0].token
        chunks = list(chat(client, logprobs=True, stream=True))
        streamed = [
            token
            for chunk in chunks
            if chunk.choices[0].logprobs
            for token in chunk.choices[0].logprobs.content
        ]
        assert [t.token for t in streamed] == [t.token for t in choice.logprobs.content]

    def test_content_may_be_a_list_of_parts_and_max_tokens_has_two_names(self, client, engine):
        parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
        chat(client, parts, max_tokens=None, max_completion_tokens=5)
        chat(client, max_tokens=5)
        first, second = engine.requests
        assert first == second
        assert first.max_new_tokens == 5
        chat(client, max_tokens=None)
        assert engine.requests[-1].max_new_tokens == min(150, engine.context - len(first.prompt))

    def test_a_message_of_a_response_can_be_sent_back(self, client, engine, tokenizer):
        message = chat(client, max_tokens=1).choices[0].message
        ask = {"role": "user", "content": "hello"}
        kind = {"role": "developer", "content": "Be kind."}
        messages = [kind, ask, message, ask]
        client.chat.completions.create(model="stories", max_tokens=1, messages=messages)
        messages = [{"role": "system", "content": "Be kind."}, ask]
        messages += [{"role": "assistant", "content": message.content}, ask]
        assert engine.requests[-1].prompt == tuple(tokenizer.encode_chat(messages))


def test_a_chat_template_that_exceeds_its_limits_disables_only_chats(shared_data, tmp_path, caplog):
    for path in (shared_data / "stories260K" / "hf").glob("token*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ 'a' | center(2000000000) }}")
    message = "the model's chat template exceeds the limits for rendering"
    with serving(load_tokenizer(tmp_path)) as (_, url), new_client(url) as client:
        assert f"the server rejects chat requests: {message}" in caplog.text
        assert complete(client, max_tokens=2).usage.completion_tokens == 2
        with pytest.raises(openai.BadRequestError, match=message):
            chat(client)


def test_the_model_routes_return_the_model(client):
    assert [model.id for model in client.models.list()] == ["stories"]
    assert client.models.retrieve("stories").context == FakeEngine.context
    with pytest.raises(openai.NotFoundError, match="there is no model 'a/b' on this server"):
        client.models.retrieve("a/b")
