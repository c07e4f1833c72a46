"""How a model writes its calls of tools: found by rendering a call with the chat template."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from llama_jax.errors import InputError

_NAME, _ARGUMENTS = "probe_tool", {"probe_key": "probe_value"}
_CALL = {
    "id": "callprobe",  # Mistral's templates require nine letters or digits
    "type": "function",
    "function": {"name": _NAME, "arguments": _ARGUMENTS},
}
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string"}}},
    },
}
_QUESTION = {"role": "user", "content": "question"}


class ToolFormat(NamedTuple):
    """The text of an answer that calls tools: each call is a JSON object with name and arguments.

    These texts include the texts of special tokens.

    Attributes:
        opening: text before the first object.
        arguments_key: name of the arguments in the object.
        closing: text after the last object, without end tokens.
        separator: text between two objects; None: an answer has one call.
    """

    opening: str
    arguments_key: str
    closing: str
    separator: str | None


def find_tool_format(
    render: Callable[[Sequence[Mapping[str, Any]], Sequence[Any] | None], tuple[str, str]],
    ends: Collection[str],
) -> ToolFormat:
    """Returns the tool format of a chat template.

    Args:
        render: returns the text of a chat that ends with an answer, up to this answer and complete;
            the second argument lists the tools.
        ends: texts of the end tokens.

    Raises:
        InputError: the template doesn't list tools, or doesn't write calls as JSON objects.
    """
    no_format = InputError(
        "the model's chat template doesn't write calls of tools as JSON objects: leave out the"
        " tools, or use a model whose template does"
    )

    def answer(calls: int) -> str:
        message = {"role": "assistant", "content": "", "tool_calls": [_CALL] * calls}
        prompt, text = render([_QUESTION, message], [_TOOL])
        if _NAME not in prompt:
            raise InputError(
                "the model's chat template has no place for tools: describe them in the system"
                " message, or use a model whose template takes tools"
            )
        if not text.startswith(prompt):
            raise no_format
        text = text[len(prompt) :]
        first_end = min((at for end in ends if (at := text.find(end)) >= 0), default=len(text))
        return text[:first_end]

    text = answer(1)
    call = _find_call(text, 0)
    if call is None:
        raise no_format
    start, end, key = call
    separator = None
    try:
        two = answer(2)
    except InputError:  # Llama 3.1's template rejects several calls
        two = ""
    first = _find_call(two, 0)
    if first is not None and (second := _find_call(two, first[1])) is not None:
        separator = two[first[1] : second[0]]
    return ToolFormat(text[:start], key, text[end:].rstrip(), separator)


def _find_call(text: str, start: int) -> tuple[int, int, str] | None:
    """Returns the range of the next object that calls the probe, and the key of its arguments."""
    decoder = json.JSONDecoder()
    while (start := text.find("{", start)) >= 0:
        try:
            found, end = decoder.raw_decode(text, start)
        except ValueError:
            found, end = {}, start
        if found.get("name") == _NAME and _ARGUMENTS in found.values():
            return start, end, next(key for key, value in found.items() if value == _ARGUMENTS)
        start += 1
    return None
