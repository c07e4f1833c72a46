"""Encodes chats in the format of Llama 3, with the tools of Llama 3.1, turn by turn."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from llama_jax.errors import InputError
from llama_jax.tokenizer.chat import (
    TOOL_ROLES,
    ChatFormat,
    EncodedChat,
    Message,
    check_example,
    check_messages,
)
from llama_jax.tokenizer.tool_format import ToolFormat

# Meta's words before the list of tools.
_TOOL_INSTRUCTIONS = """\
Given the following functions, please respond with a JSON for a function call with its proper \
arguments that best answers the given prompt.

Respond in the format {"name": function name, "parameters": dictionary of argument name and its \
value}. Do not use variables.

"""


class Llama3Chats(NamedTuple):
    """The format of Llama 3 (Meta's llama3, `ChatFormat`), with the tools of Llama 3.1.

    Each message is stripped. An answer ends with <|eot_id|>; one that calls tools, or is followed
    by the result of a tool, with <|eom_id|> if the model has it. Calls are written as JSON after
    <|python_tag|>. The tools stand in the first message of the user, after instructions (Meta's
    llama-models, llama3_1/prompt_format.md).

    Attributes:
        encode: returns the ids of plain text.
        special: ids of the special tokens.
        template: the format as a template, which renders chats.
    """

    encode: Callable[[str], list[int]]
    special: Mapping[str, int]
    template: ChatFormat

    def encode_prompt(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Returns the ids of a chat, up to the model's answer.

        Raises:
            InputError: a message has no valid role or no text, or the last is neither the user's
                nor a tool's; or there are tools, but no message of the user.
        """
        check_messages(messages)
        return self._encode(_add_tools(messages, tools)).ids + self._header("assistant")

    def encode_example(
        self, messages: Sequence[Message], tools: Sequence[Any] | None
    ) -> EncodedChat:
        """Returns the ids of a chat, and its answers.

        Raises:
            InputError: a message has no valid role or no text, or the last is not the assistant's;
                or there are tools, but no message of the user.
        """
        check_example(messages)
        return self._encode(_add_tools(messages, tools))

    def render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        """Returns the text of a chat."""
        return self.template.render(messages, generation_prompt=generation_prompt)

    def tool_format(self) -> ToolFormat:
        """Returns the format that the instructions before the tools ask for."""
        return ToolFormat("", "parameters", "", None)

    def _encode(self, messages: Sequence[Message]) -> EncodedChat:
        special = self.special
        ids, answers = [special["<|begin_of_text|>"]], []
        end_of_turn = special["<|eot_id|>"]
        end_of_message = special.get("<|eom_id|>", end_of_turn)
        for i, message in enumerate(messages):
            ids += self._header(message["role"])
            start, calls = len(ids), message.get("tool_calls", [])
            if calls and "<|python_tag|>" in special:
                ids.append(special["<|python_tag|>"])
            ids += self.encode(message["content"].strip())
            for call in calls:
                ids += self.encode(_llama3_call(call["function"]))
            waits = bool(calls) or any(m["role"] in TOOL_ROLES for m in messages[i + 1 : i + 2])
            if message["role"] == "assistant":
                ids.append(end_of_message if waits else end_of_turn)
                answers.append((start, len(ids)))
            else:
                ids.append(end_of_turn)
        return EncodedChat(ids, answers)

    def _header(self, role: str) -> list[int]:
        text = self.encode("ipython" if role == "tool" else role)
        start, end = self.special["<|start_header_id|>"], self.special["<|end_header_id|>"]
        return [start, *text, end, *self.encode("\n\n")]


def _llama3_call(function: Mapping[str, Any]) -> str:
    """Returns the text of a tool call: the code for the code interpreter, or else JSON."""
    name, arguments = function["name"], function["arguments"]
    if name == "code_interpreter" and isinstance(arguments.get("code"), str):
        return arguments["code"]
    call = {"type": "function", "name": name, "parameters": arguments}
    return json.dumps(call, ensure_ascii=False)


def _add_tools(messages: Sequence[Message], tools: Sequence[Any] | None) -> Sequence[Message]:
    """Returns the messages with a list of the tools in the user's first message."""
    if not tools:
        return messages
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
    if first is None:
        raise InputError(
            "the chat lists tools, which stand in the user's first message, but no message is the"
            " user's: add one"
        )
    listed = "".join(f"{json.dumps(tool, indent=4, ensure_ascii=False)}\n\n" for tool in tools)
    content = _TOOL_INSTRUCTIONS + listed + messages[first]["content"].strip()
    return [*messages[:first], {**messages[first], "content": content}, *messages[first + 1 :]]
