"""Chats as text for a model: the formats of Llama 2 and Llama 3, and the Jinja templates."""

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, TypedDict

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llama_jax.errors import InputError

ROLES = ("system", "user", "assistant")

# What `llama2_turns` and `llama3_ids` do, for programs that read a template. In these the content
# of a message can't be told from the format, so theirs is the reader's to check.
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
    """One message of a chat; the role is `system`, `user` or `assistant`."""

    role: str
    content: str


def check_messages(messages: Sequence[Message]) -> None:
    """Checks what every format asks for.

    Raises:
        InputError: there is no message, one is not a role and a text, or the last is not the
            user's.
    """
    if not messages:
        raise InputError("the chat is empty: give at least one message of the user")
    for number, message in enumerate(messages, 1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InputError(
                f"message {number} of the chat has the role {role!r}: use system, user or assistant"
            )
        if not isinstance(content, str):
            raise InputError(f"message {number} of the chat has no text: give content as a string")
    if messages[-1]["role"] != "user":
        raise InputError(
            f"the chat ends with a message of the {messages[-1]['role']}: end it with one of the"
            " user, which the model is to answer"
        )


def llama2_turns(messages: Sequence[Message]) -> Iterator[tuple[str, bool]]:
    """Yields the text of each turn (what the user said and the answer) and whether it is finished.

    Each stands between the begin and the end token, the last one without the end token: the format
    of Llama 2 Chat (Meta's llama/generation.py, `chat_completion`).

    Raises:
        InputError: user and assistant don't take turns, or a text holds a mark of the format.
    """
    check_messages(messages)
    for number, message in enumerate(messages, 1):
        for mark in ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"):
            if mark in message["content"]:
                raise InputError(
                    f"message {number} of the chat holds {mark}, which marks turns: remove it"
                )
    turns = list(messages)
    if turns[0]["role"] == "system" and len(turns) > 1:
        system = f"<<SYS>>\n{turns[0]['content']}\n<</SYS>>\n\n"
        turns[:2] = [Message(role=turns[1]["role"], content=system + turns[1]["content"])]
    for i, message in enumerate(turns):
        if message["role"] != ROLES[1 + i % 2]:
            raise InputError(
                f"message {i + 1 + len(messages) - len(turns)} of the chat is out of order: after"
                " at most one system message, user and assistant must take turns"
            )
    for user, assistant in zip(turns[0:-1:2], turns[1::2], strict=True):
        yield f"[INST] {user['content'].strip()} [/INST] {assistant['content'].strip()} ", True
    yield f"[INST] {turns[-1]['content'].strip()} [/INST]", False


def llama3_ids(
    encode: Callable[[str], list[int]], special: Callable[[str], int], messages: Sequence[Message]
) -> list[int]:
    """Returns the ids of a chat in the format of Llama 3 (Meta's llama3, `ChatFormat`).

    Args:
        encode: gives the ids of a plain text.
        special: gives the id of a special token.
        messages: ends with one of the user.

    Raises:
        InputError: a message is not a role and a text, or the last is not the user's.
    """
    check_messages(messages)
    start, end, done = map(special, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))

    def header(role: str) -> list[int]:
        return [start, *encode(role), end, *encode("\n\n")]

    ids = [special("<|begin_of_text|>")]
    for message in messages:
        ids += [*header(message["role"]), *encode(message["content"].strip()), done]
    return ids + header("assistant")


def render(template: str, messages: Sequence[Message], tokens: Mapping[str, str]) -> str:
    """Returns the text that a chat template makes, up to where the model is to answer.

    The templates are those of Hugging Face's `apply_chat_template`; they run in Jinja's sandbox.

    Args:
        template: Jinja source.
        messages: end with one of the user.
        tokens: the texts of special tokens by the names that templates use (`bos_token`, …).

    Raises:
        InputError: the template is broken, or refuses these messages.
    """
    check_messages(messages)
    try:
        return _compiled(template).render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **tokens,
        )
    except jinja2.TemplateSyntaxError as error:
        raise InputError(
            f"the model's chat template is broken at line {error.lineno} ({error.message}): mend"
            " chat_template"
        ) from error
    except Exception as error:  # a template can do whatever Python can fail at
        raise InputError(
            f"the model's chat template refuses these messages ({error}): change them, or the"
            " template"
        ) from error


class _Generation(jinja2.ext.Extension):
    """The block `{% generation %}`, which marks what the model said: it changes no text."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    def tojson(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
        # Jinja's own would escape what HTML gives a meaning to.
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(template)
