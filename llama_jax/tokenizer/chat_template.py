"""Encodes chats with a model's own template, a Jinja program that runs in a separate process."""

import atexit
import contextlib
import functools
import json
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

from llama_jax.errors import InputError
from llama_jax.tokenizer import template_process
from llama_jax.tokenizer.chat import EncodedChat, Message, check_example, check_messages
from llama_jax.tokenizer.special_text import encode_around_special, special_pattern
from llama_jax.tokenizer.tool_format import ToolFormat, find_tool_format

_RENDERINGS = 64  # in one job: the process limits the time of a job


class ChatTemplate:
    """Encodes chats in the format of a template.

    Only the template can write special tokens: the text of a special token in a message is encoded
    as ordinary text.

    Args:
        template: Jinja source.
        tokens: texts of special tokens, by the names that templates use (`bos_token`, …).
        special: ids of the special tokens, by their text.
        end_ids: each ends an answer.
        encode: returns the ids of a text; it encodes the text of special tokens as ordinary text.
        parse: returns the ids of a text; it encodes the text of a special token as that token.
    """

    def __init__(
        self,
        template: str,
        tokens: Mapping[str, str],
        *,
        special: Mapping[str, int],
        end_ids: Collection[int],
        encode: Callable[[str], list[int]],
        parse: Callable[[str], list[int]],
    ):
        self._template, self._tokens = template, tokens
        self._special, self._end_ids = special, end_ids
        self._encode, self._parse = encode, parse
        self._pattern = special_pattern(special)
        self._tool_format: ToolFormat | None = None
        # A random mark, which no message can contain, splits special tokens in messages before the
        # template is rendered. The mark is removed afterwards.
        self._mark = "".join(chr(0xE000 + secrets.randbelow(0x1900)) for _ in range(4))

    def encode_prompt(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Returns the ids of a chat up to the position of the model's answer.

        Raises:
            InputError: see `render_prefixes`; a text contains half of a surrogate pair; or there
                are tools, for which the template has no place.
        """
        check_messages(messages)
        if tools:
            self.tool_format()
        guarded = self._guard(messages), self._tokens, self._guard(tools)
        text = render_template(self._template, *guarded)
        return self._encode_rendering(text, guarded=self._mark in text)

    def tool_format(self) -> ToolFormat:
        """Returns how the template writes calls of tools.

        Raises:
            InputError: it has no place for tools, or doesn't write calls as JSON objects.
        """
        if self._tool_format is None:
            ends = [text for text, token in self._special.items() if token in self._end_ids]
            self._tool_format = find_tool_format(self._render_answer, ends)
        return self._tool_format

    def _render_answer(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None
    ) -> tuple[str, str]:
        n = len(messages)
        prefixes = [(n - 1, True), (n, False)]
        prompt, text = render_prefixes(self._template, messages, self._tokens, prefixes, tools)
        return prompt, text

    def encode_example(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> EncodedChat:
        """Returns the ids of a complete chat, and its answers.

        An answer consists of the tokens of the chat after those of the messages before it with the
        generation prompt, up to the first end token.

        Args:
            messages: the last message is the assistant's.
            tools: that the assistant can call, for templates that list them.

        Raises:
            InputError: see `render_prefixes`; the template renders the messages before an answer,
                or up to it, differently from the complete chat; or an answer has no end token.
        """
        check_example(messages)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        prefixes = [(len(messages), False)]
        for i in answers:
            prefixes += [(i, True), (i + 1, False)]
        guarded_messages, guarded_tools = self._guard(messages), self._guard(tools)
        texts = render_prefixes(
            self._template, guarded_messages, self._tokens, prefixes, guarded_tools
        )
        chat, *parts = self._encode_prefixes(texts)
        encoded = EncodedChat(chat, [])
        for i, prompt, answered in zip(answers, parts[::2], parts[1::2], strict=True):
            self._check_prefix(chat, prompt, f"the generation prompt of message {i + 1}")
            self._check_prefix(chat, answered, f"the messages up to message {i + 1}")
            start, stop = len(prompt), len(answered)
            end = next((at for at in range(start, stop) if chat[at] in self._end_ids), None)
            if end is None:
                raise InputError(
                    f"the chat template writes no end token after message {i + 1} of the chat, so"
                    " the model would never learn to stop: add the id of its end token to"
                    " eos_token_id in generation_config.json, or correct the template"
                )
            encoded.answers.append((start, end + 1))
        return encoded

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
        """Returns the text of a chat; special tokens in messages are not marked as ordinary text.

        Without the generation prompt, the text ends with the last message, to continue it.

        Raises:
            InputError: see `render_prefixes`.
        """
        prefix = [(len(messages), generation_prompt)]
        [text] = render_prefixes(self._template, messages, self._tokens, prefix)
        if generation_prompt:
            return text
        last = messages[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def _encode_prefixes(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of a rendered chat and of its prefixes.

        Each part between special tokens is encoded once, instead of once for each prefix. If these
        ids of the complete chat are not those of its text, every text is encoded completely.
        """
        encode = functools.cache(lambda part: self._encode(part.replace(self._mark, "")))
        ids = [encode_around_special(encode, self._special, text) for text in texts]
        guarded = any(self._mark in text for text in texts)
        if guarded or ids[0] == self._encode_rendering(texts[0], guarded=False):
            return ids
        return [self._encode_rendering(text, guarded=False) for text in texts]

    def _check_prefix(self, chat: list[int], prefix: list[int], name: str) -> None:
        """Raises `InputError` if `chat` doesn't start with the ids of `prefix`."""
        n = len(prefix)
        if chat[:n] == prefix:
            return
        at = next((i for i, pair in enumerate(zip(chat, prefix, strict=False)) if len({*pair}) > 1),
                  len(chat))  # fmt: skip
        raise InputError(
            f"the chat template encodes {name} alone differently from the same part of the complete"
            f" chat, from token {at + 1} on, so it is unknown which tokens the model generates:"
            " remove white space at the start of this message, or correct the template"
        )

    def _guard(self, value: Any) -> Any:
        """Returns `value` with the mark in the text of each special token, in all of its parts."""
        if isinstance(value, str) and self._pattern:
            return self._pattern.sub(lambda m: m[0][:1] + self._mark + m[0][1:], value)
        if isinstance(value, Mapping):
            return {self._guard(name): self._guard(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [self._guard(part) for part in value]
        return value

    def _encode_rendering(self, text: str, guarded: bool) -> list[int]:
        """Returns the ids of a rendered text.

        Args:
            text: the text, with marks.
            guarded: whether to encode each part between special tokens as a separate text, which
                the text of a special token in a message requires.
        """
        if not guarded:
            return self._parse(text)
        return encode_around_special(
            lambda part: self._encode(part.replace(self._mark, "")), self._special, text
        )


def render_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tokens: Mapping[str, str],
    tools: Sequence[Any] | None = None,
) -> str:
    """Returns the text of a chat template up to the position of the model's answer.

    Args:
        template, messages, tokens, tools: as for `render_prefixes`.

    Raises:
        InputError: see `render_prefixes`.
    """
    [text] = render_prefixes(template, messages, tokens, [(len(messages), True)], tools)
    return text


def render_prefixes(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tokens: Mapping[str, str],
    prefixes: Sequence[tuple[int, bool]],
    tools: Sequence[Any] | None = None,
) -> list[str]:
    """Returns the text of a chat template for several prefixes of a chat.

    Templates follow Hugging Face's `apply_chat_template`. They run in Jinja's sandbox, in a
    separate process with limits on time and memory.

    Args:
        template: Jinja source.
        messages: of the chat.
        tokens: texts of special tokens, by the names that templates use (`bos_token`, …).
        prefixes: for each text, the number of its messages, and whether the generation prompt, up
            to the position of the model's answer, follows them.
        tools: that the assistant can call.

    Raises:
        InputError: the template has a syntax error, exceeds the limits, or rejects these messages.
    """
    context = {"messages": [*messages], "tools": tools, "documents": None, **tokens}
    texts = list[str]()
    for first in range(0, len(prefixes), _RENDERINGS):
        job = {"template": template, "context": context}
        job["prefixes"] = prefixes[first : first + _RENDERINGS]
        result = _run_job(json.dumps(job))
        texts += result["texts"] if "texts" in result else _raise_problem(result)
    return texts


def _raise_problem(result: Mapping[str, Any]) -> NoReturn:
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
