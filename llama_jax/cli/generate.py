"""`llama-jax generate`."""

import argparse
import contextlib
import gc
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from llama_jax.cli.arguments import (
    add_folder,
    add_hosts,
    add_int8,
    add_lora,
    add_sampling,
    check_equal_on_hosts,
    exit_all_at_sigterm,
    read_pairs,
    read_sampling,
)
from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath, parse_path

if TYPE_CHECKING:
    from llama_jax.config.model import ModelConfig
    from llama_jax.inference.sampling import Sampling

MANUAL = """\
Continue a text with the model in a run folder or model folder.

Standard output receives only the text, while it is generated; everything else goes to standard
error. The default is the most likely token each time. A --temperature above 0 samples among the
tokens that --top-k, --top-p and --min-p leave, in this order and after the penalties, as in
transformers. Compiled programs are cached in JAX_COMPILATION_CACHE_DIR, or ~/.cache/llama_jax.

A model that is too large for one host: on a TPU pod, under SLURM, Open MPI or a Kubernetes JobSet,
run the command on every host, as for `llama-jax train`. Host 0 prints the text.

example:
  llama-jax generate runs/quickstart --prompt 'def '
  llama-jax generate runs/quickstart --prompt 'import ' --temperature 0.8 --top-p 0.95 --seed 1
  llama-jax generate models/llama3.1-8b-instruct --chat --prompt 'Why is the sky blue?'
  llama-jax generate models/llama3.1-8b --lora runs/lora --chat --prompt 'Why is the sky blue?'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_folder(parser)
    parser.add_argument("--prompt", default="", metavar="TEXT", help="text to continue (empty)")
    parser.add_argument(
        "--chat", action="store_true", help="render the prompt in the model's chat format"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N",
        help="at most N tokens (200, or fewer if the context is shorter)",
    )  # fmt: skip
    add_sampling(parser)
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT",
        help="end the output before this text; repeatable",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of sampling (0)")
    parser.add_argument(
        "--ignore-eos", action="store_true", help="continue after an end-of-text token"
    )
    parser.add_argument(
        "--stats", action="store_true", help="print tokens/s and the share of memory bandwidth"
    )
    add_int8(parser)
    add_lora(parser)
    add_hosts(parser)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Saves 0.15 s while JAX and Flax are imported. Reference counts free the arrays of a text."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@_no_garbage_collection()
def run(args: argparse.Namespace) -> int:
    """Continues the text on standard output; returns the exit code."""
    from llama_jax.runtime import hosts
    from llama_jax.runtime.console import print_status

    start = time.monotonic()
    with hosts.join(args.coordinator, args.processes, args.process), exit_all_at_sigterm():
        n_tokens = continue_text(
            parse_path(args.folder),
            args.prompt,
            args.max_new_tokens,
            read_sampling(args),
            seed=args.seed,
            ignore_eos=args.ignore_eos,
            chat=args.chat,
            stops=args.stop,
            quantize=args.quantize,
            cache=args.cache,
            lora=args.lora,
            unmerged=args.unmerged,
            stats=args.stats,
        )
        seconds = time.monotonic() - start
        print_status(f"{n_tokens} tokens in {seconds:.1f} s, including loading and compilation")
    return 0


def continue_text(
    folder: AnyPath,
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
    lora: str | None = None,
    unmerged: bool = False,
    stats: bool = False,
) -> int:
    """Streams prompt and continuation to standard output; returns the number of new tokens.

    On several hosts all call this with the same arguments, and host 0 prints.
    """
    import jax

    from llama_jax.checkpoint import folders
    from llama_jax.inference.complete import default_max_new_tokens, prompt_ids
    from llama_jax.inference.detokenize import stream_text
    from llama_jax.inference.load import choose_compute_dtype, load
    from llama_jax.inference.stop_strings import cut_at_stop
    from llama_jax.inference.stream import cache_slots, stream
    from llama_jax.parallel.mesh import serving_mesh
    from llama_jax.runtime import hosts
    from llama_jax.runtime.compile_cache import compile_statistics, enable_compile_cache
    from llama_jax.runtime.console import print_status
    from llama_jax.runtime.program_store import stored_programs
    from llama_jax.tokenizer.tokenizer import load_tokenizer

    if max_new_tokens is not None and max_new_tokens < 1:
        raise InputError(f"--max-new-tokens must be at least 1, not {max_new_tokens}")
    if "" in (stops or []):
        raise InputError("--stop '' would end every text immediately: give a text")
    stored = folders.read_model_config(folder)
    enable_compile_cache()
    if cache:
        stored = replace(stored, cache_dtype=cache)
    start = "generate", str(folder), quantize, cache, lora, unmerged
    # Programs are read while the tokenizer and the weights are loaded.
    with stored_programs(*start), jax.set_mesh(serving_mesh(stored)):
        tokenizer, pairs = load_tokenizer(folder), read_pairs(lora, folder, stored)
        ids = prompt_ids(tokenizer, [{"role": "user", "content": prompt}] if chat else prompt)
        if max_new_tokens is None:
            max_new_tokens = default_max_new_tokens(stored, ids)
        config = choose_compute_dtype(stored)
        values = {
            "the hash of the prompt": hashlib.sha256(repr(ids).encode()).hexdigest(),
            "the sampling": asdict(sampling),
            "--max-new-tokens": max_new_tokens, "--ignore-eos": ignore_eos, "--seed": seed,
            "--stop": stops, "--quantize": quantize, "--cache": cache, "--lora": lora,
            "--unmerged": unmerged, "--stats": stats,
        }  # fmt: skip
        check_equal_on_hosts(folder, config, values)
        config, model = load(folder, config, quantize, pairs=pairs, unmerged=unmerged)
        compile_start = compile_statistics().seconds
        timer = _TokenTimer(lambda: compile_statistics().seconds - compile_start)
        tokens = stream(
            config, model, ids, max_new_tokens=max_new_tokens, sampling=sampling,
            end_ids=frozenset() if ignore_eos else tokenizer.end_ids, seed=seed,
        )  # fmt: skip
        texts = stream_text(tokenizer, ids, timer.time_tokens(tokens))
        prompt_text = next(texts)
        shown = [prompt_text] if not chat else []
        for text in chain(shown, cut_at_stop(stops or (), texts), "\n"):
            if hosts.is_host_zero():
                _print(text)
        if stats:
            print_status(timer.report_speed(len(ids)))
            slots = cache_slots(len(ids), max_new_tokens)
            print_status(timer.report_bandwidth(config, model, slots))
    return timer.n_tokens


def _print(text: str) -> None:
    """Prints on standard output; on several hosts, ends all if its reader has exited ('| head')."""
    from llama_jax.runtime import hosts, stop_signal

    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        if not hosts.is_multi_host():
            raise  # `main` ends the command
        stop_signal.exit_run("the reader of standard output has exited")


class _TokenTimer:
    """Measures the times at which tokens arrive, without the time of compilation.

    Args:
        compile_seconds: returns the seconds of compilation so far.
    """

    def __init__(self, compile_seconds: Callable[[], float]):
        self.n_tokens = 0
        self._compile_seconds = compile_seconds
        self._start = self._first = self._last = time.perf_counter()
        self._compiled = self._compiled_at_first = 0.0  # compilation seconds until last, first

    def time_tokens(self, tokens: Iterator[int]) -> Iterator[int]:
        """Yields the tokens and records the time of each."""
        for token in tokens:
            self._last, self._compiled = time.perf_counter(), self._compile_seconds()
            if not self.n_tokens:
                self._first, self._compiled_at_first = self._last, self._compiled
            self.n_tokens += 1
            yield token

    def report_speed(self, n_prompt: int) -> str:
        """Returns the speeds of prefill, with a prompt of `n_prompt` tokens, and of decoding."""
        seconds = self._first - self._start - self._compiled_at_first
        text = (
            f"prompt: {n_prompt} tokens, first new token after {seconds:.3f} s"
            f" ({n_prompt / seconds:,.0f} tokens/s), plus {self._compiled:.1f} s of compilation"
        )
        return text + (f"\ndecoding: {self._rate:,.1f} tokens/s" if self._rate else "")

    def report_bandwidth(self, config: "ModelConfig", model: Any, slots: int) -> str:
        """Returns the achieved memory bandwidth, and its share of the measured copy bandwidth."""
        from llama_jax.inference.bandwidth import step_bytes, stored_copy_bandwidth

        bytes_per_step, limit = step_bytes(config, model, 1, slots), stored_copy_bandwidth()
        achieved = bytes_per_step * self._rate
        return (
            f"memory: a step reads {bytes_per_step / 1e6:,.0f} MB: {achieved / 1e9:.1f} GB/s,"
            f" {achieved / limit:.0%} of this machine's copy bandwidth, {limit / 1e9:.1f} GB/s"
        )

    @property
    def _rate(self) -> float:
        """Tokens per second after the first token; 0 if there are none."""
        seconds = self._last - self._first - (self._compiled - self._compiled_at_first)
        return (self.n_tokens - 1) / seconds if self.n_tokens > 1 else 0.0
