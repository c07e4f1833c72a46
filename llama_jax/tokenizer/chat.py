"""Encodes chats: in the formats of Llama 2 and Llama 3, or with a Jinja template."""

import atexit
import contextlib
import functools
import json
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

from llama_jax.errors import InputError
from llama_jax.tokenizer import template_process

ROLES = ("system", "user", "assistant")

# The formats of `format_llama2_turns` and `encode_llama3_chat`, for programs that need a template.
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
    """One message of a chat; the role is `system`, `user` or `assistant`."""

    role: str
    content: str


def check_messages(messages: Sequence[Message]) -> None:
    """Checks the rules that all formats share.

    Raises:
        InputError: there is no message, a message has no valid role or no text, or the last message
            is not the user's.
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
            f"the chat ends with a message of the {messages[-1]['role']}: end it with a message of"
            " the user, which the model answers"
        )


def format_llama2_turns(messages: Sequence[Message]) -> Iterator[tuple[str, bool]]:
    """Yields the text of each turn (user message and answer), and whether it has an answer.

    In the format of Llama 2 Chat, each turn is between the begin and the end token; the last turn,
    which has no answer, has no end token (Meta's llama/generation.py, `chat_completion`).

    Raises:
        InputError: user and assistant don't take turns, or a message contains a mark of the format.
    """
    check_messages(messages)
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
        if message["role"] != ROLES[1 + i % 2]:
            raise InputError(
                f"message {i + 1 + len(messages) - len(turns)} of the chat is out of order: after"
                " at most one system message, user and assistant must take turns"
            )
    for user, assistant in zip(turns[0:-1:2], turns[1::2], strict=True):
        yield f"[INST] {user['content'].strip()} [/INST] {assistant['content'].strip()} ", True
    yield f"[INST] {turns[-1]['content'].strip()} [/INST]", False


def encode_llama3_chat(
    encode: Callable[[str], list[int]], special: Callable[[str], int], messages: Sequence[Message]
) -> list[int]:
    """Returns the ids of a chat in the format of Llama 3 (Meta's llama3, `ChatFormat`).

    Args:
        encode: returns the ids of plain text.
        special: returns the id of a special token.
        messages: the last message is the user's.

    Raises:
        InputError: a message has no valid role or no text, or the last message is not the user's.
    """
    check_messages(messages)
    start, end, end_of_turn = map(
        special, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    )

    def header(role: str) -> list[int]:
        return [start, *encode(role), end, *encode("\n\n")]

    ids = [special("<|begin_of_text|>")]
    for message in messages:
        ids += [*header(message["role"]), *encode(message["content"].strip()), end_of_turn]
    return ids + header("assistant")


def encode_with_template(
    template: str,
    messages: Sequence[Message],
    tokens: Mapping[str, str],
    *,
    special: Mapping[str, int],
    encode: Callable[[str], list[int]],
    parse: Callable[[str], list[int]],
) -> list[int]:
    """Returns the ids of a chat in the format of a template.

    Only the template can write special tokens: the text of a special token in a message is encoded
    as ordinary text.

    Args:
        template, messages, tokens: see `render_template`.
        special: ids of the special tokens, by their text.
        encode: returns the ids of a text; it encodes the text of special tokens as ordinary text.
        parse: returns the ids of a text; it encodes the text of a special token as that token.

    Raises:
        InputError: see `render_template`; or a text contains half of a surrogate pair.
    """
    pattern = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    # A random mark, which no message can contain, splits special tokens in messages before the
    # template is rendered. The mark is removed afterwards.
    mark = "".join(chr(0xE000 + secrets.randbelow(0x1900)) for _ in range(4))

    def insert_mark(match: re.Match[str]) -> str:
        return match[0][:1] + mark + match[0][1:]

    def guard(message: Message) -> Message:
        content = re.sub(pattern, insert_mark, message["content"])
        return Message(role=message["role"], content=content)

    check_messages(messages)
    guarded = list(map(guard, messages)) if pattern else messages
    text = render_template(template, guarded, tokens)
    if mark not in text:
        return parse(text)
    ids = []
    for i, part in enumerate(re.split(f"({pattern})", text)):
        ids += [special[part]] if i % 2 else encode(part.replace(mark, ""))
    return ids


def render_template(template: str, messages: Sequence[Message], tokens: Mapping[str, str]) -> str:
    """Returns the text of a chat template up to the position of the model's answer.

    Templates follow Hugging Face's `apply_chat_template`. They run in Jinja's sandbox, in a
    separate process with limits on time and memory.

    Args:
        template: Jinja source.
        messages: the last message is the user's.
        tokens: texts of special tokens, by the names that templates use (`bos_token`, …).

    Raises:
        InputError: the template has a syntax error, exceeds the limits, or rejects these messages.
    """
    check_messages(messages)
    context = {
        "messages": [dict(message) for message in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
    }
    result = _run_job(json.dumps({"template": template, "context": context | dict(tokens)}))
    if "text" in result:
        return result["text"]
    if "line" in result:
        raise InputError(
            f"the model's chat template has a syntax error at line {result['line']}"
            f" ({result['error']}): correct chat_template"
        )
    if "limit" in result:
        raise InputError(
            f"the model's chat template exceeds the limits for rendering ({result['limit']}):"
            " correct chat_template"
        )
    raise InputError(
        f"the model's chat template rejects these messages ({result['error']}): change them, or the"
        " template"
    )


_render_lock = threading.Lock()


def _run_job(job: str) -> dict[str, Any]:
    """Sends a job to `template_process` and returns the result.

    Raises:
        RuntimeError: the process can't start, or exits for another reason than its limits.
    """
    with _render_lock:
        if _renderer_process().poll() is not None:  # it was killed between two jobs
            _renderer_process.cache_clear()
        process = _renderer_process()
        assert process.stdin is not None
        assert process.stdout is not None
        line = ""
        try:
            with contextlib.suppress(BrokenPipeError):  # the process ended before it read the job
                print(job, file=process.stdin, flush=True)
            line = process.stdout.readline()
        finally:
            if not line.endswith("\n"):
                _renderer_process.cache_clear()
                _kill(process)
    if line.endswith("\n"):
        return json.loads(line)
    if process.returncode == -signal.SIGPROF:
        return {"limit": f"more than {template_process.CPU_SECONDS} s of processor time"}
    if process.returncode in (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT):
        return {"limit": "more stack than its process has"}
    raise RuntimeError(f"the process that renders chat templates ended: {process.returncode}")


@functools.cache
def _renderer_process() -> subprocess.Popen[str]:
    """Starts the rendering process. It exits when this process exits, which closes its input."""
    process = subprocess.Popen(
        [sys.executable, "-P", template_process.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="ascii",
        # Ctrl-C must reach only this process, which may still have to answer chats.
        start_new_session=True,
    )
    atexit.register(_kill, process)
    return process


def _kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    with contextlib.suppress(BrokenPipeError):
        process.communicate()
    atexit.unregister(_kill)
