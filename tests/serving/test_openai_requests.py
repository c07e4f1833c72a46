"""Invalid requests get an error message; neutral values of unsupported fields are accepted."""

import json

import openai
import pytest
from fake_engine import CHAT, COMPLETION, HELLO, chat, complete

pytest_plugins = ["server_fixtures"]


def function(name):
    return {"type": "function", "function": {"name": name}}


def calling(call):
    user = HELLO["messages"][0]
    assistant = {"role": "assistant", "content": None, "tool_calls": [{"function": call}]}
    return {"messages": [user, assistant, user]}


ADD, NAMED = function("add"), function("sub")

# Path, body, status, and a part of the error message.
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
    (COMPLETION, {"prompt": []}, 400, "prompt must be a string, a list of strings"),
    (COMPLETION, {"prompt": ["a", [1]]}, 400, "prompt must be a string, a list of strings"),
    (COMPLETION, {"prompt": [[]]}, 400, "no list may be empty"),
    (COMPLETION, {"prompt": [True]}, 400, "prompt must be a string"),
    (
        COMPLETION,
        {"prompt": [5, 512]},
        400,
        "token 512 of the prompt is outside the vocabulary of 512",
    ),
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
    (
        COMPLETION,
        {"prompt": ["a"] * 65, "n": 2},
        400,
        "65 prompts with n=2 are 130 texts: one request may ask for at most 128",
    ),
    (COMPLETION, {"prompt": "a", "seed": 2**63}, 400, "seed must be less than"),
    (COMPLETION, {"prompt": "a", "stop": ""}, 400, "stop must be a non-empty string or a list"),
    (
        COMPLETION,
        {"prompt": "a", "stop": ["a", 1]},
        400,
        "stop must be a non-empty string or a list",
    ),
    (
        COMPLETION,
        {"prompt": "a", "stop": ["a"] * 17},
        400,
        "at most 16 strings, each of at most 256",
    ),
    (COMPLETION, {"prompt": "a", "logprobs": 21}, 400, "logprobs must be less than or equal to 20"),
    (COMPLETION, {"prompt": "a", "stream": "yes"}, 400, "stream must be a valid boolean"),
    (COMPLETION, {"prompt": "a", "stream_options": {}}, 400, "stream_options requires stream"),
    (COMPLETION, {"prompt": "a", "best_of": 2}, 400, "best_of is not supported"),
    (COMPLETION, {"prompt": "a", "suffix": "b"}, 400, "suffix is not supported"),
    (COMPLETION, {"prompt": "a", "logit_bias": {"5": 101}}, 400, "numbers from -100 to 100"),
    (COMPLETION, {"prompt": "a", "logit_bias": {"a": 1}}, 400, "logit_bias must be an object of"),
    (COMPLETION, {"prompt": "a", "logit_bias": {"5": "1"}}, 400, "logit_bias must be an object of"),
    (COMPLETION, {"prompt": "a", "logit_bias": [5]}, 400, "logit_bias must be an object of token"),
    (COMPLETION, {"prompt": "a", "logit_bias": {"512": 1}}, 400, "token 512 of logit_bias is"),
    (COMPLETION, {"prompt": "a", "tempratur": 1}, 400, "tempratur is not a field of this request"),
    (COMPLETION, {"prompt": "a", "model": "gpt"}, 404, "there is no model 'gpt' on this server"),
    (COMPLETION, {"prompt": "a", "model": 5}, 400, "model must be a valid string"),
    (CHAT, {}, 400, "messages is missing"),
    (CHAT, {"messages": []}, 400, "messages must be a list of at least one message"),
    (CHAT, {"messages": ["a"]}, 400, "messages[0] must be an object with a role"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0].content must be a string"),
    (CHAT, {"messages": [{"role": "bot", "content": "a"}]}, 400, "has the role 'bot'"),
    (
        CHAT,
        {"messages": [{"role": "tool", "content": "a"}]},
        400,
        "message 1 of the chat is out of",
    ),
    (CHAT, {"messages": [{"role": "assistant", "content": "a"}]}, 400, "the chat ends with"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages[0].content may contain only text parts",
    ),
    (CHAT, HELLO | {"max_tokens": 0}, 400, "max_tokens must be greater than or equal to 1"),
    (
        CHAT,
        HELLO | {"max_tokens": 1, "max_completion_tokens": 2},
        400,
        "differ: send only one of them",
    ),
    (CHAT, HELLO | {"top_logprobs": 2}, 400, "top_logprobs requires logprobs to be true"),
    (
        CHAT,
        HELLO | {"tools": [{"type": "function"}]},
        400,
        "tools[0] must be an object of the type",
    ),
    (CHAT, HELLO | {"tools": {}}, 400, "tools must be a list of at most 128"),
    (CHAT, HELLO | {"tools": [ADD] * 2}, 400, "tools has 'add' twice"),
    (CHAT, HELLO | {"tools": [ADD]}, 400, "the model's format has no place for them"),
    (CHAT, HELLO | {"tools": [ADD], "tool_choice": "any"}, 400, "must be none, auto, required or"),
    (CHAT, HELLO | {"tools": [ADD], "tool_choice": NAMED}, 400, "'sub', which is not one of the"),
    (CHAT, HELLO | {"tool_choice": "required"}, 400, "tool_choice requires tools"),
    (
        CHAT,
        HELLO | {"tools": [ADD], "response_format": {"type": "json_object"}},
        400,
        "tools can't be combined with a format",
    ),
    (CHAT, calling({"name": "add", "arguments": "{"}), 400, "arguments must be a JSON object"),
    (
        CHAT,
        calling({"arguments": "{}"}),
        400,
        "[1].tool_calls[0] must be an object with a function",
    ),
    (CHAT, calling({"name": "add", "arguments": "{}"}), 400, "message 2 of the chat calls tools"),
    ("/tokenize", {}, 400, "send either prompt or messages"),
    ("/tokenize", {"prompt": 5}, 400, "prompt must be a valid string"),
    ("/detokenize", {"tokens": [512]}, 400, "token 512 of tokens is outside the vocabulary"),
    (CHAT, HELLO | {"messages": [{"role": "user", "content": "a " * 400}]}, 400, "doesn't fit"),
    ("/v1/embeddings", {"input": "a"}, 404, "there is no route /v1/embeddings"),
    ("/v1/models", {}, 405, "/v1/models does not support POST"),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), BAD)
def test_an_invalid_request_gets_an_error_message(http, engine, path, body, status, message):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = http.post(path, content=content)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
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


def test_neutral_values_of_unsupported_fields_are_accepted(client):
    neutral = {"tools": [], "tool_choice": "none", "functions": [], "store": False}
    neutral |= {"response_format": {"type": "text"}, "metadata": {"a": "b"}, "stop": None}
    response = chat(client, max_tokens=2, extra_body=neutral)
    assert response.usage.completion_tokens == 2
