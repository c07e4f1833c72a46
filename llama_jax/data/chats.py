"""Rows of chats and preferences, in the formats of common data sets, recognized by their fields.

| fields | format |
|---|---|
| `messages` | OpenAI: `role`, `content`, `tool_calls`; in the row `tools` |
| `conversations` | ShareGPT: `from` (human, gpt, system, tool, …), `value` |
| `instruction`, `output` | Alpaca, with an optional `input` and `system` |
| `prompt`, `completion` | texts, or lists of messages |
| `chosen`, `rejected` | a preference: texts with a `prompt`, or lists of messages |
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llama_jax.errors import InputError
from llama_jax.tokenizer.chat import Message

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "ipython",
    "function_call": "assistant",  # ShareGPT: the value is the call in JSON
}


class Chat(NamedTuple):
    """A chat that ends with an answer of the assistant."""

    messages: list[Message]
    tools: list[Any] | None  # that the assistant can call
    untrained: frozenset[int]  # indices of the assistant's messages that the model must not learn


class Preference(NamedTuple):
    """Two chats with the same prompt and different answers."""

    chosen: Chat
    rejected: Chat


def parse_row(row: Any, location: str) -> Chat | Preference:
    """Returns the chat or the preference of a row.

    Messages after the last answer of the assistant are left out: no answer depends on them.

    Args:
        row: the parsed JSON.
        location: file and row, for messages.

    Raises:
        InputError: the row has none of the formats, or a field of it is wrong.
    """
    if not isinstance(row, dict):
        raise InputError(f"{location}: a row must be a JSON object, not {type(row).__name__}")
    try:
        return _parse(row)
    except _FieldError as error:
        raise InputError(f"{location}: {error}") from error


class _FieldError(ValueError):
    """A field of a row is wrong; the message names the field."""


def _parse(row: Mapping[str, Any]) -> Chat | Preference:
    if "chosen" in row and "rejected" in row:
        return _parse_preference(row)
    tools = _read_tools(row)
    if "messages" in row or "conversations" in row:
        field = "messages" if "messages" in row else "conversations"
        return _to_chat(_read_messages(row, field), field, tools)
    if "instruction" in row and "output" in row:
        return _to_chat(_read_alpaca(row), "output", tools)
    if "prompt" in row and "completion" in row:
        prompt = _read_side(row, "prompt", "user")
        messages = prompt + _read_side(row, "completion", "assistant")
        return _to_chat(messages, "completion", tools, n_prompt=len(prompt))
    raise _FieldError(
        'a row needs the field "messages", or "conversations", or "instruction" and "output", or'
        ' "prompt" and "completion", or "chosen" and "rejected"; this one has: '
        + (", ".join(map(str, row))[:200] or "none")
    )


def _parse_preference(row: Mapping[str, Any]) -> Preference:
    tools = _read_tools(row)
    prompt = _read_side(row, "prompt", "user") if "prompt" in row else []
    sides = []
    for field in ("chosen", "rejected"):
        messages = _read_side(row, field, "assistant")
        # A list that starts with an answer continues the prompt; any other contains it.
        if messages[0]["role"] == "assistant":
            if not prompt:
                raise _FieldError(f'{field} starts with an answer, and the row has no "prompt"')
            messages = prompt + messages
        sides.append(messages)
    equal = [a == b for a, b in zip(*sides, strict=False)]
    n_prompt = min([*map(len, sides), [*equal, False].index(False) + 1]) - 1
    chosen, rejected = (
        _to_chat(messages, field, tools, n_prompt)
        for messages, field in zip(sides, ("chosen", "rejected"), strict=True)
    )
    return Preference(chosen, rejected)


def _to_chat(
    messages: Sequence[dict[str, Any]], field: str, tools: list[Any] | None, n_prompt: int = 0
) -> Chat:
    """Returns a chat; the model doesn't learn the answers among its first `n_prompt` messages."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    untrained = frozenset(i for i in answers if i < n_prompt or messages[i].get("weight") == 0)
    if not set(answers) - untrained:
        raise _FieldError(f"{field} has no answer of the assistant to learn")
    parts = [{k: v for k, v in m.items() if k != "weight"} for m in messages[: answers[-1] + 1]]
    return Chat([Message(**part) for part in parts], tools, untrained)


def _read_tools(row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):  # some data sets have JSON in a string
        tools = _parse_json(tools, "tools")
    if tools is not None and not isinstance(tools, list):
        raise _FieldError("tools must be a list")
    return tools or None


def _read_alpaca(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    if row.get("history"):
        raise _FieldError('history is not supported: write the chat as "messages"')
    for field in ("instruction", "input", "output", "system"):
        is_missing = field in ("input", "system") and row.get(field) is None
        if not (is_missing or isinstance(row[field], str)):
            raise _FieldError(f"{field} must be a text")
    user = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": row["output"]}]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": row["system"]})
    return messages


def _read_side(row: Mapping[str, Any], field: str, role: str) -> list[dict[str, Any]]:
    """Returns the messages of a field, which is a list, or the text of one message of `role`."""
    if isinstance(row[field], str):
        return [{"role": role, "content": row[field]}]
    return _read_messages(row, field)


def _read_messages(row: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    messages = row[field]
    if not isinstance(messages, list) or not messages:
        raise _FieldError(f"{field} must be a list of messages")
    return [_read_message(message, f"{field}[{i}]") for i, message in enumerate(messages)]


def _read_message(message: Any, field: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _FieldError(f"{field} must be an object with a role and a content")
    role_field, text_field = ("role", "content") if "role" in message else ("from", "value")
    role = message.get(role_field)
    if not isinstance(role, str) or role not in _ROLES:
        raise _FieldError(
            f"{field} has the {role_field} {str(role)[:80]!r}: use {', '.join(sorted(_ROLES))}"
        )
    calls = _read_calls(message, field)
    content = message.get(text_field)
    if role == "function_call":
        calls, content = [_read_call(_parse_json(content, f"{field}.{text_field}"), field)], ""
    if calls and _ROLES[role] != "assistant":
        raise _FieldError(f"{field}.tool_calls: only the assistant calls tools")
    if isinstance(content, list):
        content = "".join(_read_part(p, f"{field}.{text_field}") for p in content)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise _FieldError(f"{field}.{text_field} must be a text")
    if message.get("weight") not in (None, 0, 1):
        raise _FieldError(f"{field}.weight must be 0 or 1")
    result: dict[str, Any] = {"role": _ROLES[role], "content": content}
    optional = ("name", "tool_call_id", "weight")
    result |= {k: message[k] for k in optional if message.get(k) is not None}
    return result | ({"tool_calls": calls} if calls else {})


def _read_part(part: Any, field: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise _FieldError(f"{field} has a part that is no text: only texts are supported")


def _read_calls(message: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    calls = message.get("tool_calls") or []
    if message.get("function_call"):  # OpenAI's older form
        calls = [{"function": message["function_call"]}]
    if not isinstance(calls, list):
        raise _FieldError(f"{field}.tool_calls must be a list")
    return [
        _read_call(call.get("function", call) if isinstance(call, dict) else call, field)
        for call in calls
    ]


def _read_call(function: Any, field: str) -> dict[str, Any]:
    """Returns a tool call whose arguments are an object, as chat templates expect."""
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise _FieldError(f"{field}.tool_calls has a call without a name")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _parse_json(arguments or "{}", f"{field}.tool_calls")
    if not isinstance(arguments, dict):
        raise _FieldError(f"{field}.tool_calls: the arguments of {name!r} must be an object")
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _parse_json(text: Any, field: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise _FieldError(f"{field} must be JSON, and is not ({error})") from error
