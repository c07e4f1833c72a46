"""Encodes chats in the formats of Llama 2 and Llama 3, turn by turn.

`chat_template` encodes chats with a template instead; all have the interface `ChatFormat`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, NotRequired, Protocol, TypedDict

from llama_jax.errors import InputError

ROLES = ("system", "user", "assistant")
TOOL_ROLES = ("tool", "ipython")  # results of tools; only training data have them

# The formats of `Llama2Chats` and `Llama3Chats`, for programs that need a template.
# A template doesn't separate a message from the format: the program that renders it must check that
# no message contains the format's marks.
LLAMA2_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}
        {{- raise_exception('after a system message, user and assistant must take turns') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- set content = (system if loop.first else '') + message['content'] %}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'].strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""
LLAMA3_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'].strip() + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


class Message(TypedDict):
    """One message of a chat; the role is `system`, `user` or `assistant`, in examples also a tool.

    Each call of `tool_calls` is {"type": "function", "function": {"name", "arguments": {…}}}.
    """

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]  # of the assistant, in examples
    name: NotRequired[str]
    tool_call_id: NotRequired[str]


class EncodedChat(NamedTuple):
    """The ids of a chat that the model learns from.

    Attributes:
        ids: of the complete chat.
        answers: for each message of the assistant, the range [start, stop) of the ids that the
            model generates: the answer with its end token.
    """

    ids: list[int]
    answers: list[tuple[int, int]]


class ChatFormat(Protocol):
    """How the messages of a chat become the ids that a model reads and learns."""

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids of a chat that ends with the user, up to the model's answer."""
        ...

    def encode_example(
        self, messages: Sequence[Message], tools: Sequence[Any] | None
    ) -> EncodedChat:
        """Returns the ids of a chat that ends with an answer, and the ranges of the answers."""
        ...

    def render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        """Returns the text of a chat."""
        ...


class ChatTokenizer:
    """The methods for chats of a tokenizer, whose format the subclass determines."""

    @cached_property
    def _chat_format(self) -> ChatFormat:
        """The model's chat format; raises InputError if there is none."""
        raise NotImplementedError

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids of a chat, up to the position of the model's answer.

        Raises:
            InputError: the messages don't match the chat format, or there is no chat format.
        """
        return self._chat_format.encode_prompt(messages)

    def render_chat(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
        """Returns the text of a chat in the model's format, for `parse`.

        Without the generation prompt, the text ends with the last message, to continue it.

        Raises:
            InputError: the messages don't match the chat format, or there is no chat format.
        """
        return self._chat_format.render(messages, generation_prompt=generation_prompt)

    def encode_example(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> EncodedChat:
        """Returns the ids of a chat to learn from, and the ranges of the assistant's answers.

        Raises:
            InputError: the messages don't match the chat format, or there is no chat format.
        """
        return self._chat_format.encode_example(messages, tools)


def check_messages(messages: Sequence[Message]) -> None:
    """Checks the rules for a chat that the model continues, which all formats share.

    Raises:
        InputError: there is no message, a message has no valid role or no text, or the last message
            is not the user's.
    """
    _check_each(messages, ROLES, "system, user or assistant")
    if messages[-1]["role"] != "user":
        raise InputError(
            f"the chat ends with a message of the {messages[-1]['role']}: end it with a message of"
            " the user, which the model answers"
        )


def check_example(messages: Sequence[Message]) -> None:
    """Checks the rules for a chat that the model learns from, which all formats share.

    Raises:
        InputError: there is no message, a message has no valid role or no text, or the last message
            is not the assistant's.
    """
    _check_each(messages, ROLES + TOOL_ROLES, "system, user, assistant, tool or ipython")
    if messages[-1]["role"] != "assistant":
        raise InputError(
            f"the chat ends with a message of the {messages[-1]['role']}: end it with an answer of"
            " the assistant"
        )


def _check_each(messages: Sequence[Message], roles: Sequence[str], listed: str) -> None:
    if not messages:
        raise InputError("the chat is empty: give at least one message of the user")
    for number, message in enumerate(messages, 1):
        role, content = message.get("role"), message.get("content")
        if role not in roles:
            raise InputError(f"message {number} of the chat has the role {role!r}: use {listed}")
        if not isinstance(content, str):
            raise InputError(f"message {number} of the chat has no text: give content as a string")


def _check_no_tools(tools: Sequence[Any] | None) -> None:
    """Checks that a chat lists no tools: only a template defines how.

    Raises:
        InputError: it lists some.
    """
    if tools:
        raise InputError(
            "the chat lists tools, but the model's format has no place for them: describe them in"
            " the system message, or use a model with a chat template"
        )


class Llama2Chats(NamedTuple):
    """The format of Llama 2 Chat (Meta's llama/generation.py, `chat_completion`).

    Each turn (user message and answer) is between the begin and the end token; a last turn that has
    no answer has no end token.

    Attributes:
        encode: `Tokenizer.encode`.
        template: the format as a template, which renders chats.
    """

    encode: Callable[..., list[int]]
    template: ChatFormat

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids of a chat, up to the model's answer.

        Raises:
            InputError: user and assistant don't take turns, or a message contains a mark of the
                format.
        """
        check_messages(messages)
        ids = []
        for prompt, answer in _llama2_turns(messages):
            text = prompt if answer is None else prompt + answer
            ids += self.encode(text, bos=True, eos=answer is not None)
        return ids

    def encode_example(
        self, messages: Sequence[Message], tools: Sequence[Any] | None
    ) -> EncodedChat:
        """Returns the ids of a chat, and its answers, which have a space on both sides.

        Raises:
            InputError: as `encode_prompt`; there are tools; or the vocabulary has a piece that
                joins a prompt and its answer, which no model generates.
        """
        _check_no_tools(tools)
        check_example(messages)
        encoded = EncodedChat([], [])
        for prompt, answer in _llama2_turns(messages):
            assert answer is not None  # the last message is the assistant's
            prompt_ids = self.encode(prompt, bos=True)
            turn = self.encode(prompt + answer, bos=True, eos=True)
            if turn[: len(prompt_ids)] != prompt_ids:
                raise InputError(
                    f"answer {len(encoded.answers) + 1} of the chat starts within a token of its"
                    " prompt ([/INST]): use a tokenizer that splits at spaces, as LLaMA's"
                )
            start = len(encoded.ids)
            encoded.answers.append((start + len(prompt_ids), start + len(turn)))
            encoded.ids.extend(turn)
        return encoded

    def render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        """Returns the text of a chat."""
        return self.template.render(messages, generation_prompt=generation_prompt)


def _llama2_turns(messages: Sequence[Message]) -> Iterator[tuple[str, str | None]]:
    """Yields the text of each user message and of its answer; the last may have no answer."""
    for number, message in enumerate(messages, 1):
        for mark in ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"):
            if mark in message["content"]:
                raise InputError(
                    f"message {number} of the chat contains {mark}, which marks turns: remove it"
                )
    turns = list(messages)
    if turns[0]["role"] == "system" and len(turns) > 1:
        system = f"<<SYS>>\n{turns[0]['content']}\n<</SYS>>\n\n"
        turns[:2] = [Message(role=turns[1]["role"], content=system + turns[1]["content"])]
    for i, message in enumerate(turns):
        number = i + 1 + len(messages) - len(turns)
        if message["role"] != ROLES[1 + i % 2]:
            raise InputError(
                f"message {number} of the chat is out of order: after at most one system message,"
                " user and assistant must take turns"
            )
        if "tool_calls" in message:
            raise InputError(
                f"message {number} of the chat calls tools, for which Llama 2's format has no"
                " place: use a model with a chat template for them, or leave the chat out"
            )
    for i in range(0, len(turns), 2):
        prompt = f"[INST] {turns[i]['content'].strip()} [/INST]"
        yield prompt, f" {turns[i + 1]['content'].strip()} " if i + 1 < len(turns) else None


class Llama3Chats(NamedTuple):
    """The format of Llama 3 (Meta's llama3, `ChatFormat`), with the tools of Llama 3.1.

    Each message is stripped. An answer ends with <|eot_id|>; one that calls tools, or is followed
    by the result of a tool, with <|eom_id|> if the model has it. Calls are written as JSON after
    <|python_tag|> (Meta's llama-models, llama3_1/prompt_format.md).

    Attributes:
        encode: returns the ids of plain text.
        special: ids of the special tokens.
        template: the format as a template, which renders chats.
    """

    encode: Callable[[str], list[int]]
    special: Mapping[str, int]
    template: ChatFormat

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids of a chat, up to the model's answer.

        Raises:
            InputError: a message has no valid role or no text, or the last is not the user's.
        """
        check_messages(messages)
        return self._encode(messages).ids + self._header("assistant")

    def encode_example(
        self, messages: Sequence[Message], tools: Sequence[Any] | None
    ) -> EncodedChat:
        """Returns the ids of a chat, and its answers.

        Raises:
            InputError: a message has no valid role or no text, the last is not the assistant's, or
                there are tools.
        """
        _check_no_tools(tools)
        check_example(messages)
        return self._encode(messages)

    def render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        """Returns the text of a chat."""
        return self.template.render(messages, generation_prompt=generation_prompt)

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
