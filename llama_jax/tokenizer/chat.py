"""Chats as text for a model: the formats of Llama 2 and Llama 3, and the Jinja templates."""

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


def template_ids(
    template: str,
    messages: Sequence[Message],
    tokens: Mapping[str, str],
    *,
    special: Mapping[str, int],
    encode: Callable[[str], list[int]],
    parse: Callable[[str], list[int]],
) -> list[int]:
    """Returns the ids of a chat in the format of a template.

    Only the template writes special tokens: the text of one in a message is a text like any other.

    Args:
        template, messages, tokens: as of `render`.
        special: the ids of the special tokens, by their texts.
        encode: gives the ids of a text in which special tokens are text.
        parse: gives the ids of a text in which the text of a special token gives that token.

    Raises:
        InputError: as `render`; or a text holds half of a surrogate pair.
    """
    pattern = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    # A mark that no message can hold splits these texts while the template is at work.
    mark = "".join(chr(0xE000 + secrets.randbelow(0x1900)) for _ in range(4))

    def marked(found: re.Match[str]) -> str:
        return found[0][:1] + mark + found[0][1:]

    def guarded(message: Message) -> Message:
        return Message(role=message["role"], content=re.sub(pattern, marked, message["content"]))

    check_messages(messages)
    text = render(template, list(map(guarded, messages)) if pattern else messages, tokens)
    if mark not in text:
        return parse(text)
    ids = []
    for i, part in enumerate(re.split(f"({pattern})", text)):
        ids += [special[part]] if i % 2 else encode(part.replace(mark, ""))
    return ids


def render(template: str, messages: Sequence[Message], tokens: Mapping[str, str]) -> str:
    """Returns the text that a chat template makes, up to where the model is to answer.

    The templates are those of Hugging Face's `apply_chat_template`; they run in Jinja's sandbox, in
    a process with limits of time and memory.

    Args:
        template: Jinja source.
        messages: end with one of the user.
        tokens: the texts of special tokens by the names that templates use (`bos_token`, …).

    Raises:
        InputError: the template is broken, exceeds the limits, or refuses these messages.
    """
    check_messages(messages)
    context = {
        "messages": [dict(message) for message in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
    }
    result = _result(json.dumps({"template": template, "context": context | dict(tokens)}))
    if "text" in result:
        return result["text"]
    if "line" in result:
        raise InputError(
            f"the model's chat template is broken at line {result['line']} ({result['error']}):"
            " correct chat_template"
        )
    if "limit" in result:
        raise InputError(
            f"the model's chat template exceeds the limits of a rendering ({result['limit']}):"
            " correct chat_template"
        )
    raise InputError(
        f"the model's chat template refuses these messages ({result['error']}): change them, or the"
        " template"
    )


_rendering = threading.Lock()


def _result(job: str) -> dict[str, Any]:
    """Returns the result of a job of `template_process`.

    Raises:
        RuntimeError: the process can't be started, or something else ended it.
    """
    with _rendering:
        if _process().poll() is not None:  # ended from outside, between two jobs
            _process.cache_clear()
        process = _process()
        assert process.stdin is not None
        assert process.stdout is not None
        answer = ""
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended before it read the job
                print(job, file=process.stdin, flush=True)
            answer = process.stdout.readline()
        finally:
            if not answer.endswith("\n"):
                _process.cache_clear()
                _end(process)
    if answer.endswith("\n"):
        return json.loads(answer)
    if process.returncode == -signal.SIGPROF:
        return {"limit": f"more than {template_process.SECONDS} s of processor time"}
    if process.returncode in (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT):
        return {"limit": "more stack than its process has"}
    raise RuntimeError(f"the process that renders chat templates ended: {process.returncode}")


@functools.cache
def _process() -> subprocess.Popen[str]:
    """Starts the process that renders; it ends with this one, whose end closes its input."""
    process = subprocess.Popen(
        [sys.executable, "-P", template_process.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="ascii",
        start_new_session=True,  # Ctrl-C is for this process, which may still have chats to answer
    )
    atexit.register(_end, process)
    return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    with contextlib.suppress(BrokenPipeError):
        process.communicate()
    atexit.unregister(_end)
