"""Rows of every format become the same chats; anything else is refused with row and field."""

import json

import pytest

from llama_jax.data.chats import Chat, Preference, parse_row
from llama_jax.errors import InputError

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}

EQUAL_ROWS = [
    {"messages": [SYSTEM, USER, ANSWER], "id": 7},
    {"messages": [{"role": "developer", "content": "Be brief."}, USER, ANSWER, USER]},
    {"messages": [SYSTEM, {"role": "user", "content": [{"type": "text", "text": "2+2?"}]}, ANSWER]},
    {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "2+2?"},
            {"from": "gpt", "value": "4", "weight": None},
        ]
    },
    {"system": "Be brief.", "instruction": "2+2?", "input": "", "output": "4"},
    {"prompt": [SYSTEM, USER], "completion": "4"},
    {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
]


@pytest.mark.parametrize("row", EQUAL_ROWS, ids=lambda row: next(iter(row)))
def test_the_formats_give_the_same_chat(row):
    assert parse_row(row, "x:1") == Chat([SYSTEM, USER, ANSWER], None, frozenset())


def test_the_input_of_an_instruction_follows_it():
    row = {"instruction": "Add.", "input": "2+2", "output": "4"}
    user = {"role": "user", "content": "Add.\n\n2+2"}
    assert parse_row(row, "x:1") == Chat([user, ANSWER], None, frozenset())


def test_answers_of_a_prompt_and_of_weight_0_are_not_learned():
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER, USER, ANSWER]}
    assert parse_row(row, "x:1").untrained == {1}
    row = {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]}
    assert parse_row(row, "x:1") == Chat([USER, ANSWER, USER, ANSWER], None, frozenset({1}))


@pytest.mark.parametrize("arguments", [{"a": 2}, '{"a": 2}'])
def test_tool_calls_have_arguments_as_an_object(arguments):
    call = {"id": "c1", "function": {"name": "add", "arguments": arguments}}
    result = {"role": "tool", "content": "4", "tool_call_id": "c1"}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    older = {"role": "assistant", "content": "", "function_call": call["function"]}
    value = json.dumps({"name": "add", "arguments": {"a": 2}})
    expected = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    for message in (calling, older, {"from": "function_call", "value": value}):
        row = {"messages": [USER, message, result, ANSWER], "tools": [{"type": "function"}]}
        chat = parse_row(row, "x:1")
        assert chat == Chat([USER, expected, result, ANSWER], row["tools"], frozenset())
    row["tools"] = json.dumps(row["tools"])
    assert parse_row(row, "x:1") == chat


WRONG = {"role": "assistant", "content": "5"}
PREFERENCES = [
    {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    {"prompt": [USER], "chosen": [ANSWER], "rejected": [WRONG]},
    {"prompt": "2+2?", "chosen": [USER, ANSWER], "rejected": [USER, WRONG], "messages": [USER]},
    {"chosen": [USER, ANSWER], "rejected": [USER, WRONG], "score": 1},
]


@pytest.mark.parametrize("row", PREFERENCES)
def test_the_formats_of_preferences_give_the_same_pair(row):
    chosen, rejected = (Chat([USER, answer], None, frozenset()) for answer in (ANSWER, WRONG))
    assert parse_row(row, "x:1") == Preference(chosen, rejected)


def test_the_common_messages_of_a_preference_are_its_prompt():
    row = {"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, ANSWER, USER, WRONG]}
    assert [chat.untrained for chat in parse_row(row, "x:1")] == [{1}, {1}]
    row["rejected"] = row["chosen"]  # a tie compares the last answer with itself
    assert [chat.untrained for chat in parse_row(row, "x:1")] == [{1}, {1}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "a row must be a JSON object, not list"),
        ({"text": "a", "id": 1}, 'a row needs the field "messages", .* this one has: text, id'),
        ({}, "this one has: none"),
        ({"messages": "a"}, "messages must be a list of messages"),
        ({"messages": []}, "messages must be a list of messages"),
        ({"messages": [USER, "a"]}, r"messages\[1\] must be an object with a role and a content"),
        ({"messages": [{"role": "bot", "content": ""}]}, r"messages\[0\] has the role 'bot': use"),
        ({"messages": [{"role": ["user"]}]}, r"messages\[0\] has the role"),
        ({"messages": [{"role": "user", "content": 1}]}, r"messages\[0\].content must be a text"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content must be a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only texts are"),
        ({"messages": [USER]}, "messages has no answer of the assistant to learn"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "messages has no answer of the assistant"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, r"messages\[1\].weight must be 0 or 1"),
        ({"messages": [{**USER, "tool_calls": [CALL]}]}, "only the assistant calls tools"),
        ({"messages": [{**ANSWER, "tool_calls": [{}]}]}, "has a call without a name"),
        ({"messages": [{**ANSWER, "tool_calls": {"a": 1}}]}, "tool_calls must be a list"),
        (
            {"messages": [{**ANSWER, "tool_calls": [{"name": "f", "arguments": "x"}]}]},
            r"messages\[0\].tool_calls must be JSON, and is not",
        ),
        (
            {"messages": [{**ANSWER, "tool_calls": [{"name": "f", "arguments": [1]}]}]},
            "the arguments of 'f' must be an object",
        ),
        ({"messages": [USER, ANSWER], "tools": {"a": 1}}, "tools must be a list"),
        ({"conversations": [{"from": "human", "value": 1}]}, r"conversations\[0\].value must be"),
        ({"instruction": 1, "output": "a"}, "instruction must be a text"),
        ({"instruction": "a", "output": None}, "output must be a text"),
        ({"instruction": "a", "output": "b", "history": [["a", "b"]]}, "history is not supported"),
        ({"prompt": 1, "completion": "a"}, "prompt must be a list of messages"),
        ({"prompt": "a", "completion": [USER]}, "completion has no answer of the assistant"),
        ({"chosen": "a", "rejected": "b"}, 'chosen starts with an answer, .* has no "prompt"'),
        ({"prompt": "a", "chosen": "b", "rejected": 1}, "rejected must be a list of messages"),
        ({"prompt": "a", "chosen": "b", "rejected": [USER]}, "rejected has no answer of the"),
    ],
)
def test_a_row_with_a_wrong_field_is_refused_with_its_place(row, message):
    with pytest.raises(InputError, match="^chats.jsonl:7: .*" + message):
        parse_row(row, "chats.jsonl:7")
