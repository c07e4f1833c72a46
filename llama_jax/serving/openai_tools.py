"""The tools of a chat request: checks them, and finds the grammar of calls that are required.

Source: OpenAI's API reference, Chat Completions, `tools` and `tool_choice`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llama_jax.inference.grammars import json_rule
from llama_jax.tokenizer.special_text import special_pattern
from llama_jax.tokenizer.tool_format import ToolFormat

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_TOOLS = 128
_MAX_CALLS = 16  # of one answer that must call a tool


class ToolChoice(NamedTuple):
    """The tools that a model may call.

    Attributes:
        tools: listed in the prompt, in OpenAI's form; () for none.
        required: names of the tools of which the answer must call one; () if it needn't.
        several: whether an answer may have several calls.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    required: Sequence[str] = ()
    several: bool = True

    @property
    def names(self) -> list[str]:
        """The names of the tools."""
        return [tool["function"]["name"] for tool in self.tools]


def validate_tools(value: Any) -> list[dict[str, Any]]:
    """Returns the tools of a request; raises ValueError if one is invalid."""
    if not isinstance(value, list) or len(value) > _MAX_TOOLS:
        raise ValueError(f"tools must be a list of at most {_MAX_TOOLS} tools")
    for i, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type") != "function":
            raise ValueError(f"tools[{i}] must be an object of the type function with a function")
        if not _NAME.fullmatch(str(function.get("name"))):
            raise ValueError(
                f"tools[{i}].function.name must be 1 to 64 letters, digits, '_', '-' or '.'"
            )
        if not isinstance(function.get("parameters") or {}, dict):
            raise ValueError(f"tools[{i}].function.parameters must be a JSON schema")
    names = [tool["function"]["name"] for tool in value]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"tools has {repeated!r} twice")
    return value


def choose_tools(
    tools: Sequence[Mapping[str, Any]], tool_choice: Any, *, several: bool
) -> ToolChoice:
    """Returns the tools that `tool_choice` selects; raises ValueError if it is invalid."""
    everything = ToolChoice(tools, several=several)
    if tool_choice == "none" or (not tools and tool_choice in (None, "auto")):
        return ToolChoice()
    if tool_choice in (None, "auto"):
        return everything
    if not tools:
        raise ValueError("tool_choice requires tools")
    if tool_choice == "required":
        return everything._replace(required=everything.names)
    function = tool_choice.get("function") if isinstance(tool_choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if name is None:
        raise ValueError(
            "tool_choice must be none, auto, required or an object that names a function"
        )
    if name not in everything.names:
        raise ValueError(f"tool_choice names {str(name)[:64]!r}, which is not one of the tools")
    return everything._replace(required=[name], several=False)


def calls_grammar(choice: ToolChoice, form: ToolFormat, special: Mapping[str, int]) -> str:
    """Returns the grammar of an answer that calls at least one of the required tools.

    Args:
        choice: the tools.
        form: how the model writes calls.
        special: ids of special tokens, by their text.
    """
    parts = [_terminals(form.opening, special), "call", _terminals(form.closing, special)]
    if choice.several and form.separator is not None:
        separator = _terminals(form.separator, special)
        parts.insert(2, f"({separator} call){{0,{_MAX_CALLS - 1}}}")
    functions = [t["function"] for t in choice.tools if t["function"]["name"] in choice.required]
    rules = [f"start: {' '.join(filter(None, parts))}"]
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        head = f'{{"name": "{function["name"]}", "{form.arguments_key}": '
        schema = {"type": "object"} | (function.get("parameters") or {})
        rules.append(f'call_{i}: {json.dumps(head)} arguments_{i} "}}"')
        rules.append(f"arguments_{i}: {json_rule(schema)}")
    return "\n".join(rules)


def _terminals(text: str, special: Mapping[str, int]) -> str:
    """Returns a text that may contain special tokens as symbols of a grammar."""
    pattern = special_pattern(special)
    parts = pattern.split(text) if pattern else [text]
    symbols = [f"<[{special[p]}]>" if i % 2 else json.dumps(p) for i, p in enumerate(parts) if p]
    return " ".join(symbols)


def call_marker(form: ToolFormat, special: Mapping[str, int]) -> str:
    """Returns the text before the first call, as it is detokenized: without special tokens."""
    pattern = special_pattern(special)
    return (pattern.sub("", form.opening) if pattern else form.opening).strip()
