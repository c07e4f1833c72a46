"""The interface of chat formats, and the format of Llama 2.

`llama3_chat` has the format of Llama 3, `chat_template` encodes chats with a template.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, NotRequired, Protocol, TypedDict

from llama_jax.errors import InputError
from llama_jax.tokenizer.tool_format import ToolFormat

ROLES = ("system", "user", "assistant")
TOOL_ROLES = ("tool", "ipython")  # results of tools

NO_TOOLS = (
    "the chat lists tools, but the model's format has no place for them: describe them in the"
    " system message, or use a model with a chat template that takes tools"
)

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
    """One message of a chat; the role is `system`, `user`, `assistant`, or `tool` for a result.

    Each call of `tool_calls` is {"type": "function", "function": {"name", "arguments": {…}}}.
    """

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]  # of the assistant
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

    def encode_prompt(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Returns the ids of a chat that ends with the user or a tool, up to the model's answer."""
        ...

    def tool_format(self) -> ToolFormat:
        """Returns how the model writes its calls of tools."""
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

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Returns the ids of a chat, up to the position of the model's answer.

        Args:
            messages: the last one is of the user or of a tool.
            tools: that the model may call, in OpenAI's form.

        Raises:
            InputError: the messages don't match the chat format, there is no chat format, or it has
                no place for tools.
        """
        return self._chat_format.encode_prompt(messages, tools)

    def tool_format(self) -> ToolFormat:
        """Returns how the model writes its calls of tools.

        Raises:
            InputError: the chat format has no place for tools, or doesn't write calls in JSON.
        """
        return self._chat_format.tool_format()

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
            is neither the user's nor a tool's.
    """
    _check_each(messages, "system, user, assistant or tool")
    if messages[-1]["role"] not in ("user", *TOOL_ROLES):
        raise InputError(
            f"the chat ends with a message of the {messages[-1]['role']}: end it with a message of"
            " the user or of a tool, which the model answers"
        )


def check_example(messages: Sequence[Message]) -> None:
    """Checks the rules for a chat that the model learns from, which all formats share.

    Raises:
        InputError: there is no message, a message has no valid role or no text, or the last message
            is not the assistant's.
    """
    _check_each(messages, "system, user, assistant, tool or ipython")
    if messages[-1]["role"] != "assistant":
        raise InputError(
            f"the chat ends with a message of the {messages[-1]['role']}: end it with an answer of"
            " the assistant"
        )


def _check_each(messages: Sequence[Message], listed: str) -> None:
    if not messages:
        raise InputError("the chat is empty: give at least one message of the user")
    for number, message in enumerate(messages, 1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES + TOOL_ROLES:
            raise InputError(f"message {number} of the chat has the role {role!r}: use {listed}")
        if not isinstance(content, str):
            raise InputError(f"message {number} of the chat has no text: give content as a string")


def _check_no_tools(tools: Sequence[Any] | None) -> None:
    """Checks that a chat lists no tools: only a template defines how.

    Raises:
        InputError: it lists some.
    """
    if tools:
        raise InputError(NO_TOOLS)


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

    def encode_prompt(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Returns the ids of a chat, up to the model's answer.

        Raises:
            InputError: user and assistant don't take turns, a message contains a mark of the
                format, or there are tools.
        """
        _check_no_tools(tools)
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

    def tool_format(self) -> ToolFormat:
        """Raises `InputError`: the format has no place for tools."""
        raise InputError(NO_TOOLS)


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
