"""Checks the messages of a chat request, and converts them to the chat format's.

Source: OpenAI's API reference, Chat Completions, `messages`.
"""

import json
from collections.abc import Mapping
from typing import Any

from llama_jax.tokenizer.chat import Message


def validate_messages(value: Any) -> list[Message]:
    """Returns the messages of a request; raises ValueError if one is invalid."""
    if not isinstance(value, list) or not value:
        raise ValueError("messages must be a list of at least one message")
    return [_validate_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _validate_message(message: Any, path: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"{path} must be an object with a role and a content")
    if message.get("function_call"):
        raise ValueError(f"{path} contains function_call, which is not supported: use tool_calls")
    calls, role = message.get("tool_calls"), message["role"]
    if calls and role != "assistant":
        raise ValueError(f"{path} contains tool calls, but only the assistant's messages may")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                raise ValueError(f"{path}.content may contain only text parts")
        content = "".join(part["text"] for part in content)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"{path}.content must be a string or a list of text parts")
    if role == "tool":
        return _tool_message(message, content)
    converted = Message(role="system" if role == "developer" else role, content=content)
    if calls:
        converted["tool_calls"] = _validate_tool_calls(calls, f"{path}.tool_calls")
    return converted


def _validate_tool_calls(value: Any, path: str) -> list[dict[str, Any]]:
    """Returns the calls in a message, with their arguments as objects, as templates expect them."""
    calls = []
    for i, call in enumerate(value if isinstance(value, list) else [value]):
        call = call if isinstance(call, dict) else {}
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{path}[{i}] must be an object with a function that has a name")
        arguments = function.get("arguments") or "{}"
        try:
            parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            raise ValueError(f"{path}[{i}].function.arguments must be a JSON object, as text")
        parsed_function = {"name": function["name"], "arguments": parsed}
        calls.append({"type": "function", "function": parsed_function})
        if isinstance(call.get("id"), str):
            calls[-1]["id"] = call["id"]
    return calls


def _tool_message(message: Mapping[str, Any], content: str) -> Message:
    """Returns the result of a tool; templates may use its optional fields."""
    result = Message(role=message["role"], content=content)
    if isinstance(call_id := message.get("tool_call_id"), str):
        result["tool_call_id"] = call_id
    if isinstance(name := message.get("name"), str):
        result["name"] = name
    return result
