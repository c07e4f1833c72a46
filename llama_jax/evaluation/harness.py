"""lm-evaluation-harness over our own model: the `LM` to which its tasks send their requests.

Texts are encoded, and contexts truncated, as lm-eval's `hf` model does, so that each answer equals
that of transformers on the same weights. This module needs the extra `eval`: import it in
functions, after `check_installed`.
"""

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from pydantic import ValidationError
from rich.progress import BarColumn

from llama_jax.config.validation import first_problem
from llama_jax.errors import InputError
from llama_jax.evaluation.answers import Answers, request_key
from llama_jax.evaluation.jobs import Evaluated, run_job
from llama_jax.inference.complete import prompt_ids
from llama_jax.inference.generate_batches import GenerateRequest
from llama_jax.inference.sampling import Sampling
from llama_jax.inference.score import ScoreRequest
from llama_jax.runtime.console import TEXT_COLUMN, TaskProgress
from llama_jax.runtime.duration import format_duration

_MAX_NEW_TOKENS = 256  # of a task that sets no limit, as in lm-eval
# Settings of lm-eval's generation that `Sampling` has; others must not change the result.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_HANDLED = ("until", "max_gen_toks", "do_sample", *_SAMPLING)
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}


def read_generation(settings: dict[str, Any], context: int) -> tuple[int, list[str], Sampling]:
    """Returns the most tokens to generate, the stop strings and the sampling of a task's settings.

    Raises:
        InputError: a setting is not supported, or no room is left for a prompt in the context.
    """
    kwargs: dict[str, Any] = {**normalize_gen_kwargs(settings, _MAX_NEW_TOKENS)}
    for name in kwargs.keys() - {*_HANDLED}:
        if kwargs[name] not in (None, False, _NEUTRAL.get(name)):
            raise InputError(
                f"a generation with {name} {kwargs[name]} is not supported: choose another task"
            )
    n = kwargs["max_gen_toks"]
    if n >= context:
        raise InputError(
            f"a generation of up to {n} tokens leaves no room for its prompt in the model's context"
            f" of {context}: choose another task"
        )
    values = {name: kwargs[name] for name in _SAMPLING if kwargs.get(name) is not None}
    try:
        sampling = Sampling(**values) if kwargs["do_sample"] else Sampling()
    except ValidationError as error:
        raise InputError(f"a generation's {first_problem(error).sentence()}") from error
    return n, kwargs["until"], sampling


class HarnessModel(LM):
    """Answers the requests of lm-eval's tasks. Each answer is saved as soon as it is computed.

    Args:
        evaluated: the model, on the current mesh of all hosts.
        answers: those so far; a request whose answer is among them isn't computed again.
        shown: whether to show progress.
    """

    def __init__(self, evaluated: Evaluated, answers: Answers, shown: bool = True):
        super().__init__()
        self._evaluated, self._answers, self._shown = evaluated, answers, shown
        self._tokenizer, self._context = evaluated.tokenizer, evaluated.config.context

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Returns log P(continuation | context) [nats], and whether greedy decoding yields it.

        Args:
            requests: with the arguments (context, continuation).
        """
        pairs = [self._encode_pair(*request.args) for request in requests]
        found = self._answer([self._score_request(*p) for p in pairs], "log-likelihoods")
        return [(total, greedy) for total, greedy in found]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Returns the log-probability of each text [nats], in windows that don't overlap.

        Args:
            requests: with the argument (text,).
        """
        windows = [
            [
                make_disjoint_window(pair)
                for pair in get_rolling_token_windows(
                    self._encode(request.args[0]), self._tokenizer.bos_id, self._context, 1
                )
            ]
            for request in requests
        ]
        flat = [self._score_request(*pair) for text in windows for pair in text]
        found = iter(self._answer(flat, "windows of texts"))
        return [sum(next(found)[0] for _ in text) for text in windows]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Returns the text that the model generates after each context, up to a stop string.

        Args:
            requests: with the arguments (context, settings of the generation). Of several equal
                requests that sample, each has its own draws.
        """
        occurrences = Counter[str]()
        encoded = []
        for request in requests:
            arguments: Any = request.args
            context, settings = arguments
            occurrence = occurrences[key := request_key(context, settings)]
            occurrences[key] += 1
            encoded.append(self._generate_request(context, settings, occurrence))
        texts = map(self._tokenizer.decode, self._answer(encoded, "generated answers"))
        return [_cut(text, r.stops) for text, r in zip(texts, encoded, strict=True)]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns the text of a chat in the model's format.

        Args:
            chat_history: messages with role and content.
            add_generation_prompt: end with the start of the model's answer; False: end with the
                last message, which the model continues.

        Raises:
            InputError: the model has no chat format, or it rejects the messages.
        """
        messages: Any = chat_history
        return self._tokenizer.render_chat(messages, generation_prompt=add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer, by which lm-eval distinguishes cached requests."""
        return str(self._tokenizer.path)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the chat template if chats are asked for; None if the format is Llama's own."""
        return self._tokenizer.template if chat_template else None

    def _encode(self, text: str) -> list[int]:
        """Returns the ids of a text, after the begin token if the model's prompts start with it."""
        if not text:
            return [self._tokenizer.bos_id] * self._tokenizer.add_bos
        return prompt_ids(self._tokenizer, text, parse_special=True)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Returns the ids of a context, and of its continuation with the spaces between them."""
        if not context:
            ids, prefix = self._tokenizer.parse(continuation), self._tokenizer.bos_id
            return (ids[:1], ids[1:]) if ids[:1] == [prefix] else ([prefix], ids)
        stripped = context.rstrip()
        both = self._encode(context + continuation)
        n = len(self._encode(stripped))
        return both[:n] or [self._tokenizer.bos_id], both[n:]

    def _score_request(self, context: Sequence[int], continuation: Sequence[int]) -> ScoreRequest:
        """Returns the request for a continuation; the model reads all tokens but the last."""
        if len(continuation) > self._context:
            raise InputError(
                f"a continuation of {len(continuation)} tokens doesn't fit the model's context of"
                f" {self._context}: choose other tasks"
            )
        tokens = (*context, *continuation)[-self._context - 1 :]
        return ScoreRequest(tokens, len(tokens) - len(continuation))

    def _generate_request(
        self, context: str, settings: dict[str, Any], occurrence: int
    ) -> GenerateRequest:
        """Returns the request for a generation: the end of the context that leaves room for it."""
        n, until, sampling = read_generation(settings, self._context)
        end_text = [t for t, i in self._tokenizer.special.items() if i == self._tokenizer.eos_id]
        stops = tuple(stop for stop in (*until, *end_text) if stop)
        tokens = tuple(self._encode(context)[n - self._context :] or [self._tokenizer.bos_id])
        seed = 0
        if sampling.temperature:  # the draws don't depend on the other requests
            seed = int(request_key(tokens, occurrence)[:8], 16)
        return GenerateRequest(tokens, n, stops, sampling, seed)

    def _answer(
        self, requests: Sequence[ScoreRequest] | Sequence[GenerateRequest], title: str
    ) -> list[Any]:
        """Returns the answers to the requests; computes those that are missing."""
        keys = [_key(request) for request in requests]
        missing: Any = {
            key: request
            for key, request in zip(keys, requests, strict=True)
            if key not in self._answers
        }
        if missing:
            unique, n_before, first = [*missing], len({*keys}) - len(missing), 0.0
            total = n_before + len(missing)
            progress = TaskProgress(
                BarColumn(bar_width=20), TEXT_COLUMN, total=total, completed=n_before,
                text=f"{title}: compiling …", shown=self._shown,
            )  # fmt: skip
            with closing(progress):
                jobs = run_job(self._evaluated, [*missing.values()])
                for n, (i, answer) in enumerate(jobs, 1):
                    self._answers.add(unique[i], answer)
                    text = f"{title}: {n_before + n:,} of {total:,}"
                    # The time before the first answer is mostly that of compiling.
                    first = first or time.monotonic()
                    if (seconds := time.monotonic() - first) > 2:
                        text += f"  left {format_duration(seconds / n * (len(missing) - n))}"
                    progress.update(n_before + n, text)
        return [self._answers[key] for key in keys]


def _key(request: ScoreRequest | GenerateRequest) -> str:
    if isinstance(request, ScoreRequest):
        return request_key("score", *request)
    tokens, n, stops, sampling, seed = request
    return request_key("generate", tokens, n, stops, asdict(sampling), seed)


def _cut(text: str, stops: Sequence[str]) -> str:
    """Returns the text before the stop strings, cut at each in turn, as lm-eval does."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text
