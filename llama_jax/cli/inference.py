"""The commands that run a model: `llama-jax generate | serve | perplexity`."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.errors import InputError, missing_extra

if TYPE_CHECKING:
    from llama_jax.config.model import ModelConfig
    from llama_jax.inference.sampling import Sampling

# What needs JAX is imported by the command that uses it: `--help` and typing errors answer at once.

_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty",
)  # fmt: skip


def generate(args: argparse.Namespace) -> int:
    """Continues a text on standard output."""
    begun = time.monotonic()
    made = continue_text(
        Path(args.folder),
        args.prompt,
        args.max_new_tokens,
        sampling_of(**{name: getattr(args, name) for name in _SAMPLING}),
        seed=args.seed,
        ignore_eos=args.ignore_eos,
        chat=args.chat,
        stops=args.stop,
        quantize=args.quantize,
        cache=args.cache,
        stats=args.stats,
    )
    seconds = time.monotonic() - begun
    print(f"{made} tokens in {seconds:.1f} s, loading and compiling included", file=sys.stderr)
    return 0


def sampling_of(**fields: float) -> "Sampling":
    """Returns settings from the flags of these names.

    Raises:
        InputError: a value is out of range.
    """
    from pydantic import ValidationError

    from llama_jax.config.validation import first_problem
    from llama_jax.inference.sampling import Sampling

    try:
        return Sampling(**fields)  # pyright: ignore[reportArgumentType] (checked by pydantic)
    except ValidationError as error:
        problem = first_problem(error)
        raise InputError(problem.sentence(f"--{problem.key.replace('_', '-')}")) from error


def continue_text(
    folder: Path,
    prompt: str,
    max_new_tokens: int | None,
    sampling: "Sampling",
    *,
    seed: int,
    ignore_eos: bool = False,
    chat: bool = False,
    stops: list[str] | None = None,
    quantize: str | None = None,
    cache: str | None = None,
    stats: bool = False,
) -> int:
    """Streams prompt and continuation to standard output; returns the number of new tokens."""
    import jax

    from llama_jax.checkpoint import folders
    from llama_jax.inference.complete import default_max_new_tokens, prompt_ids
    from llama_jax.inference.detokenize import cut_at_stop, stream_text
    from llama_jax.inference.load import choose_compute_dtype, load
    from llama_jax.inference.stream import stream
    from llama_jax.parallel.mesh import tensor_mesh
    from llama_jax.runtime.compile_cache import compile_statistics, enable_compile_cache
    from llama_jax.tokenizer.tokenizer import load_tokenizer

    shape = folders.read_model_config(folder)
    tokenizer = load_tokenizer(folder)
    ids = prompt_ids(tokenizer, [{"role": "user", "content": prompt}] if chat else prompt)
    if max_new_tokens is not None and max_new_tokens < 1:
        raise InputError(f"--max-new-tokens must be at least 1, not {max_new_tokens}")
    if max_new_tokens is None:
        max_new_tokens = default_max_new_tokens(shape, ids)
    if "" in (stops or []):
        raise InputError("--stop '' would end every text at once: give some text")
    enable_compile_cache()
    if cache:
        shape = replace(shape, cache_dtype=cache)
    with jax.set_mesh(tensor_mesh(shape)):
        config, model = load(folder, choose_compute_dtype(shape), quantize=quantize)
        before = compile_statistics().seconds
        watch = _Watch(lambda: compile_statistics().seconds - before)
        tokens = stream(
            config, model, ids, max_new_tokens=max_new_tokens, sampling=sampling,
            end_ids=frozenset() if ignore_eos else tokenizer.end_ids, seed=seed,
        )  # fmt: skip
        pieces = stream_text(tokenizer, ids, watch.watched(tokens))
        asked = next(pieces)
        if not chat:
            print(asked, end="", flush=True)
        for piece in cut_at_stop(stops or (), pieces):
            print(piece, end="", flush=True)
        print()
        if stats:
            _tell(watch.told(len(ids)))
            slots = 1 << max(5, (len(ids) + max_new_tokens).bit_length())
            _tell(watch.share(config, model, slots))
    return watch.made


class _Watch:
    """Times tokens as they come, compiling apart."""

    def __init__(self, compiling: Callable[[], float]):
        self._compiling = compiling
        self.made = 0
        self.begun = self.first = self.last = time.perf_counter()
        self.compiled = self.compiled_first = 0.0

    def watched(self, tokens: Iterator[int]) -> Iterator[int]:
        for token in tokens:
            self.last, self.compiled = time.perf_counter(), self._compiling()
            if not self.made:
                self.first, self.compiled_first = self.last, self.compiled
            self.made += 1
            yield token

    def told(self, read: int) -> str:
        """Returns what it took to read a prompt of `read` tokens, and to make the others."""
        waited = self.first - self.begun - self.compiled_first
        text = (
            f"prompt: {read} tokens, the first new one after {waited:.3f} s"
            f" ({read / waited:,.0f} tokens/s); compiling took {self.compiled:.1f} s more"
        )
        return text + (f"\ndecoding: {self._rate:,.1f} tokens/s" if self._rate else "")

    def share(self, config: "ModelConfig", model: Any, slots: int) -> str:
        """Returns how near that came to what the memory allows."""
        from llama_jax.inference.bandwidth import copy_bandwidth, step_bytes

        a_step, limit = step_bytes(config, model, 1, slots), copy_bandwidth()
        moved = a_step * self._rate
        return (
            f"memory: a step reads {a_step / 1e6:,.0f} MB: {moved / 1e9:.1f} GB/s,"
            f" {moved / limit:.0%} of the {limit / 1e9:.1f} GB/s that this machine copies"
        )

    @property
    def _rate(self) -> float:
        """Tokens a second after the first one; 0 if there are none."""
        seconds = self.last - self.first - (self.compiled - self.compiled_first)
        return (self.made - 1) / seconds if self.made > 1 else 0.0


def serve(args: argparse.Namespace) -> int:
    """Answers requests over HTTP until it is ended."""
    try:
        from llama_jax.serving import server
    except ModuleNotFoundError as error:
        raise missing_extra(f"the server needs {error.name}", "serve") from error
    from llama_jax.runtime.byte_size import parse_size

    for name, least in {"rows": 1, "context": 2, "queue": 0, "max_tokens": 1}.items():
        value = getattr(args, name)
        if value is not None and value < least:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} must be at least {least}, not {value}")
    if not 0 < args.timeout < float("inf"):
        raise InputError(f"--timeout must be above 0, not {args.timeout}")
    folder = Path(args.folder)
    settings = server.ServerSettings(
        name=args.model or folder.resolve().name,
        api_key=_api_key(args.api_key),
        max_tokens=args.max_tokens,
        max_body=parse_size(args.max_body, "--max-body"),
        timeout=args.timeout,
    )
    import jax

    from llama_jax.checkpoint import folders
    from llama_jax.inference.bandwidth import copy_bandwidth
    from llama_jax.inference.engine.engine import Engine
    from llama_jax.inference.engine.warm_up import n_programs
    from llama_jax.inference.load import choose_compute_dtype, load
    from llama_jax.parallel.mesh import tensor_mesh
    from llama_jax.runtime.compile_cache import enable_compile_cache
    from llama_jax.serving import start_progress
    from llama_jax.serving.middleware import allowed_hosts
    from llama_jax.tokenizer.tokenizer import load_tokenizer

    shape = folders.read_model_config(folder)
    context = args.context or min(shape.context, 8192)
    if context > shape.context:
        raise InputError(
            f"--context {context} is more than the model's {shape.context}: give that at most"
        )
    if args.cache:
        shape = replace(shape, cache_dtype=args.cache)
    tokenizer = load_tokenizer(folder)
    enable_compile_cache()
    with server.bind_socket(args.host, args.port) as bound, jax.set_mesh(tensor_mesh(shape)):
        hosts = allowed_hosts(args.host, args.allow_host, bound.getsockname()[0])
        settings = settings._replace(hosts=hosts)
        settings = settings._replace(copy_bandwidth=copy_bandwidth())  # while the memory is free
        kind = shape.param_dtype if shape.quantized == "none" else shape.quantized
        with start_progress.loading_progress(shape.n_params * jax.numpy.dtype(kind).itemsize):
            config, model = load(folder, choose_compute_dtype(shape), quantize=args.quantize)
        programs = f"{n_programs(context)} programs"
        with start_progress.stage_progress(
            f"compiling {programs}", f"compiled {programs}"
        ) as progress:
            engine = Engine(
                config, model, rows=args.rows, context=context, queue=args.queue, progress=progress
            )
        try:
            app = server.build_app(engine, tokenizer, settings)
            bound.listen()
            print(server.startup_message(bound, settings), file=sys.stderr, flush=True)
            server.serve(app, bound)
        finally:
            engine.close()
    return 0


def _tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _api_key(flag: str | None) -> str | None:
    key = os.environ.get("LLAMA_JAX_API_KEY") if flag is None else flag
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise InputError(
            "the API key must be printable ASCII characters, without spaces at its ends: give"
            " another in LLAMA_JAX_API_KEY"
        )
    return key


def perplexity(args: argparse.Namespace) -> int:
    """Measures a model on a text."""
    import math

    import jax

    from llama_jax.checkpoint import folders
    from llama_jax.evaluation.perplexity import nats_per_token
    from llama_jax.inference.load import choose_compute_dtype, load
    from llama_jax.model.weights import check_not_quantized
    from llama_jax.parallel.mesh import tensor_mesh
    from llama_jax.tokenizer.tokenizer import load_tokenizer

    shape, tokenizer = folders.read_model_config(args.folder), load_tokenizer(args.folder)
    if args.quantize:
        check_not_quantized(shape)
    try:
        text = Path(args.text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"{args.text} can't be read ({reason}): give a text file") from error
    ids = tokenizer.encode(text, bos=tokenizer.add_bos)

    def told(quantize: str | None) -> float:
        config, model = load(args.folder, choose_compute_dtype(shape), quantize=quantize)
        kind = config.param_dtype if config.quantized == "none" else config.quantized
        nats = nats_per_token(config, model, ids)
        print(
            f"{kind:8}  {nats:.5f} nats per token, perplexity {math.exp(nats):.4f}, of"
            f" {len(ids) - 1:,} tokens"
        )
        return nats

    with jax.set_mesh(tensor_mesh(shape)):
        before = told(None)
        if not args.quantize:
            return 0
        more = told(args.quantize) - before
    print(f"change    {more:+.5f} nats per token, perplexity {100 * math.expm1(more):+.3f} %")
    return 0
