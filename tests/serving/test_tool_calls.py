"""Calls of tools are found in a generated text, however it is cut into pieces."""

import random

import pytest
from fake_engine import new_client, serving
from tool_templates import HERMES

from llama_jax.serving.tool_calls import ToolCallParser
from llama_jax.tokenizer.tokenizer import load_tokenizer


def parse(marker, pieces, *, several=True):
    """Returns the content, and the calls as pairs of name and arguments."""
    parser, content, calls = ToolCallParser(marker, ["add", "f"], several=several), "", {}
    for piece in pieces:
        text, deltas = parser.add(piece)
        content += text
        for delta in deltas:
            name, arguments = calls.get(delta.index, ("", ""))
            calls[delta.index] = name + (delta.name or ""), arguments + delta.arguments
    assert parser.n_calls == len(calls)
    return content + parser.finish(), list(calls.values())


A, EMPTY = ("add", '{"a": 1}'), ("f", "{}")
HERMES_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
# Marker, text, content, calls.
TABLE = [
    ("", '{"name": "add", "parameters": {"a": 1}}', "", [A]),
    ("", ' \n{"type": "function", "name": "f", "parameters": {}}', "", [EMPTY]),
    ("", '{"name": "f", "parameters": {}}; {"name": "add", "parameters": {"a": 1}} x {',
     "", [EMPTY, A]),
    ("", '{"name": "f", "parameters": {"s": "}\\"{", "l": [{}]}}', "",
     [("f", '{"s": "}\\"{", "l": [{}]}')]),
    ("", '{"name": "add", "parameters": {"a": 1', "", [("add", '{"a": 1')]),
    ("", '{"name": "unknown", "parameters": {}}', '{"name": "unknown", "parameters": {}}', []),
    ("", '{"a": 1, "name": "add"}', '{"a": 1, "name": "add"}', []),
    ("", '{"name": "add"}', '{"name": "add"}', []),
    ("", 'So {"name": "f", "parameters": {}}', 'So {"name": "f", "parameters": {}}', []),
    ("", "{", "{", []),
    ("", "", "", []),
    ("[", ' [{"name": "add", "arguments": {"a": 1}, "id": "1"}, {"name": "f", "arguments": {}}]',
     "", [A, EMPTY]),
    ("[", "[1, 2]", "[1, 2]", []),
    ("<tool_call>", f"Wait.\n{HERMES_CALL}\n{HERMES_CALL}", "Wait.\n", [A, A]),
    ("<tool_call>", f"\n {HERMES_CALL}", "", [A]),
    ("<tool_call>", "\n x", "\n x", []),
    ("<tool_call>", "a < b <tool", "a < b <tool", []),
    ("<tool_call>", "<tool_call>\nno", "<tool_call>\nno", []),
]  # fmt: skip


@pytest.mark.parametrize(("marker", "text", "content", "calls"), TABLE)
def test_calls_are_separated_from_content(marker, text, content, calls):
    assert parse(marker, [text]) == (content, calls)
    assert parse(marker, text) == (content, calls)  # character by character
    rng = random.Random(0)
    for _ in range(20):
        cuts = sorted(rng.choices(range(len(text) + 1), k=4))
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert parse(marker, pieces) == (content, calls)


def test_only_the_first_call_counts_if_one_is_allowed():
    text = f"{HERMES_CALL}\n{HERMES_CALL}"
    assert parse("<tool_call>", text, several=False) == ("", [A])


def test_arguments_arrive_piece_by_piece():
    parser = ToolCallParser("", ["add"], several=True)
    pieces = ['{"name": "add", "par', 'ameters": {"a"', ": [1", "2]}", "}"]
    deltas = [parser.add(piece)[1] for piece in pieces]
    assert [[d.arguments for d in each] for each in deltas] == [[], ['{"a"'], [": [1"], ["2]}"], []]


@pytest.fixture(scope="module")
def tokenizer(shared_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hermes")
    data = (shared_data / "stories260K" / "hf" / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(data)
    (folder / "chat_template.jinja").write_text(HERMES)
    return load_tokenizer(folder)


ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
MESSAGES = [{"role": "user", "content": "hello"}]


def test_the_client_gets_calls_that_the_model_chose_streamed_and_complete(tokenizer):
    with serving(tokenizer, max_tokens=150) as (engine, url), new_client(url) as client:
        engine.context = 1000
        engine.script = lambda request: f"Wait.\n{HERMES_CALL}\n{HERMES_CALL}"
        fields = {"model": "stories", "messages": MESSAGES, "tools": [ADD], "logprobs": True}
        choice = client.chat.completions.create(**fields).choices[0]
        calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls]
        # The fake engine's SentencePiece puts a space before each text.
        assert (choice.message.content, calls) == (" Wait.\n", [A, A])
        assert choice.finish_reason == "tool_calls"
        assert len({call.id for call in choice.message.tool_calls}) == 2
        with client.chat.completions.stream(**fields) as stream:
            streamed = stream.get_final_completion().choices[0]
        again = [(c.function.name, c.function.arguments) for c in streamed.message.tool_calls]
        assert (streamed.message.content, again) == (" Wait.\n", [A, A])
        assert streamed.finish_reason == "tool_calls"
        assert len(streamed.logprobs.content) == len(choice.logprobs.content)
        # Without tools, and with tool_choice none, the same text is content.
        for free in ({}, {"tools": [ADD], "tool_choice": "none"}):
            plain = client.chat.completions.create(model="stories", messages=MESSAGES, **free)
            assert plain.choices[0].message.content == f" Wait.\n{HERMES_CALL}\n{HERMES_CALL}"
            assert plain.choices[0].message.tool_calls is None
            assert engine.requests[-1].prompt == tuple(tokenizer.encode_chat(MESSAGES))
        assert engine.requests[0].prompt == tuple(tokenizer.encode_chat(MESSAGES, [ADD]))


def test_calls_and_results_become_the_prompt_of_the_template(tokenizer):
    function = {"name": "add", "arguments": '{"a": 1}'}
    call = {"id": "call_1", "type": "function", "function": function}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "2"}]},
    ]
    with serving(tokenizer, max_tokens=150) as (engine, url), new_client(url) as client:
        engine.context = 1000
        client.chat.completions.create(model="stories", messages=messages, tools=[ADD])
    prompt = tokenizer.decode(engine.requests[-1].prompt)
    assert HERMES_CALL in prompt
    assert prompt.endswith("<|im_start|>tool\n2 \n<|im_start|>assistant\n")
