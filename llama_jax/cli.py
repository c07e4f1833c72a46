"""The command line: `llama-jax train | tokenize | generate | perplexity | convert | info`."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llama_jax import config_file
from llama_jax.errors import InputError
from llama_jax.manual import parser

if TYPE_CHECKING:
    from llama_jax.data.tokenizer import Tokenizer
    from llama_jax.family import ModelConfig
    from llama_jax.model.transformer import Llama

# What needs JAX is imported by the command that uses it: `--help` and typing errors answer at once.


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 1 for a failed run, 2 for bad input."""
    made = parser()
    args, rest = made.parse_known_args(argv)
    # argparse takes overrides in one piece only; they may also stand after the flags.
    if "overrides" in args and not any(word.startswith("-") for word in rest):
        args.overrides += rest
    elif rest:
        made.error(f"unrecognized arguments: {' '.join(rest)}")
    # Orbax and asyncio log tracebacks of errors that are told in a sentence here.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        return _COMMANDS[args.name](args)
    except InputError as error:
        print(f"llama-jax {args.name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of standard output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _train(args: argparse.Namespace) -> int:
    from llama_jax import distributed

    with distributed.hosts(args.coordinator, args.processes, args.process):
        return _train_together(args)


def _train_together(args: argparse.Namespace) -> int:
    resolved = config_file.load(args.config, args.overrides)
    from llama_jax import distributed
    from llama_jax.training import loop
    from llama_jax.training.progress import tell

    try:
        outcome = loop.run(resolved)
    except loop.RunStopped as error:
        tell(f"llama-jax train: {error}")
        return 1
    if not outcome.finished:
        again = " ".join(["llama-jax train", args.config, *args.overrides])
        tell(f"saved after step {outcome.step}; go on with: {again}")
        return 0
    if not distributed.leads():
        return 0
    if outcome.validation_loss is not None and outcome.unigram_entropy is not None:
        print(
            f"validation loss {outcome.validation_loss:.3f} nats per token; unigram entropy of the"
            f" held-out text {outcome.unigram_entropy:.3f}"
        )
    # Several hosts would have to load and continue together: `generate` does it on one.
    prompts = () if distributed.several() else resolved.logging.samples
    for i, prompt in enumerate(prompts):
        print(f"\n--- sample {i + 1} of {len(prompts)}: {prompt!r}")
        _continue(outcome.folder, prompt, 80, temperature=0.7, top_p=0.95, seed=i)
    print(f"\nlosses: {outcome.folder / 'loss.png'}")
    print(f'continue with: llama-jax generate {outcome.folder} --prompt "def "')
    return 0


def _plan(args: argparse.Namespace) -> int:
    import json

    config = config_file.load(args.config, args.overrides)
    from llama_jax.plan import estimate, pod, search, show
    from llama_jax.training.progress import tell

    place = pod.parse(args.topology)
    if args.compile < 1:
        raise InputError(f"--compile must be at least 1, not {args.compile}")
    if args.search:
        plans = search.search(config, place, args.compile, tell)
    else:
        plans = [estimate.make(config, place, tell)]
    if args.json:
        dicts = [show.as_dict(plan) for plan in plans]
        print(json.dumps(dicts if args.search else dicts[0], indent=1))
    else:
        show.show(plans[0])
    if args.search and not args.json:
        show.ranking(plans)
        print(f"\nthe fastest, for the configuration file:\n{search.yaml(plans[0].config)}")
    return 0 if plans[0].fits else 1


def _tokenize(args: argparse.Namespace) -> int:
    from llama_jax.data import corpus

    if not 0 <= args.validation_fraction < 1:
        raise InputError("--validation-fraction must be at least 0 and below 1")
    meta = corpus.build(
        args.sources,
        args.out,
        n_vocab=args.vocab_size,
        tokenizer=args.tokenizer,
        validation_fraction=args.validation_fraction,
        workers=args.workers,
    )
    for split, about in meta["splits"].items():
        print(f"{args.out}/{split}: {about['documents']:,} documents, {about['tokens']:,} tokens")
    return 0


def _generate(args: argparse.Namespace) -> int:
    begun = time.monotonic()
    made = _continue(
        Path(args.folder),
        args.prompt,
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        ignore_eos=args.ignore_eos,
        chat=args.chat,
    )
    seconds = time.monotonic() - begun
    print(f"{made} tokens in {seconds:.1f} s, loading and compiling included", file=sys.stderr)
    return 0


def _continue(
    folder: Path,
    prompt: str,
    max_new_tokens: int | None,
    *,
    temperature: float,
    top_p: float,
    seed: int,
    top_k: int = 0,
    ignore_eos: bool = False,
    chat: bool = False,
) -> int:
    """Streams prompt and continuation to standard output; returns the number of new tokens."""
    from pydantic import ValidationError

    from llama_jax.inference.sampling import Sampling

    try:
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = "--" + str(problem["loc"][0]).replace("_", "-")
        message = problem["msg"].removeprefix("Input should be ")
        raise InputError(f"{name} must be {message}, not {problem['input']}") from error
    import jax

    from llama_jax import checkpoint, folders, sharding
    from llama_jax.data.tokenizer import load_tokenizer
    from llama_jax.inference.generate import stream, stream_text

    shape = folders.read_model_config(folder)
    tokenizer = load_tokenizer(folder)
    ids = _prompt_ids(tokenizer, prompt, chat)
    if max_new_tokens is not None and max_new_tokens < 1:
        raise InputError(f"--max-new-tokens must be at least 1, not {max_new_tokens}")
    if max_new_tokens is None:
        max_new_tokens = max(1, min(200, shape.context - len(ids)))
    with jax.set_mesh(sharding.tensor_mesh(shape)):
        _, model = checkpoint.load_model(folder)
        tokens = list[int]()
        made = stream(
            shape,
            model,
            ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            end_ids=frozenset() if ignore_eos else tokenizer.end_ids,
            seed=seed,
        )
        counted = (tokens.append(token) or token for token in made)
        pieces = stream_text(tokenizer, ids, counted)
        if chat:
            next(pieces)  # what was asked, in the format of the model
        for piece in pieces:
            print(piece, end="", flush=True)
    print()
    return len(tokens)


def _prompt_ids(tokenizer: "Tokenizer", prompt: str, chat: bool) -> list[int]:
    if chat:
        return tokenizer.encode_chat([{"role": "user", "content": prompt}])
    # An empty text begins somewhere too.
    return tokenizer.encode(prompt, bos=tokenizer.add_bos or not prompt)


def _perplexity(args: argparse.Namespace) -> int:
    import math

    import jax

    from llama_jax import checkpoint, folders, sharding
    from llama_jax.data.tokenizer import load_tokenizer
    from llama_jax.inference.perplexity import nats_per_token
    from llama_jax.model.quantize import quantized

    shape, tokenizer = folders.read_model_config(args.folder), load_tokenizer(args.folder)
    try:
        text = Path(args.text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"{args.text} can't be read ({reason}): give a text file") from error
    ids = tokenizer.encode(text, bos=tokenizer.add_bos)

    def tell(config: "ModelConfig", model: "Llama") -> float:
        kind = config.param_dtype if config.quantized == "none" else config.quantized
        nats = nats_per_token(config, model, ids)
        print(
            f"{kind:8}  {nats:.5f} nats per token, perplexity {math.exp(nats):.4f}, of"
            f" {len(ids) - 1:,} tokens"
        )
        return nats

    with jax.set_mesh(sharding.tensor_mesh(shape)):
        config, model = checkpoint.load_model(args.folder)
        if not args.quantize:
            tell(config, model)
            return 0
        other_config, other = quantized(config, model)
        more = -tell(config, model) + tell(other_config, other)
    print(f"change    {more:+.5f} nats per token, perplexity {100 * math.expm1(more):+.3f} %")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from llama_jax.convert.conversion import convert, parse_mesh, parse_size
    from llama_jax.convert.stream import give_freed_memory_back
    from llama_jax.convert.verification import verify

    if args.verify:
        counts = verify(Path(args.source), args.folder and Path(args.folder))
        print(f"{args.source}: {_proof(**counts)}")
        return 0
    if args.folder is None:
        raise InputError("name the folder to make: llama-jax convert SRC DST")
    begun = time.monotonic()
    give_freed_memory_back()
    outcome = convert(
        args.source,
        args.folder,
        to=args.to,
        dtype=args.dtype,
        max_ram=args.max_ram and parse_size(args.max_ram),
        model=args.model,
        tokenizer=args.tokenizer,
        shards=args.shards,
        mesh=args.mesh and parse_mesh(args.mesh),
        quantize=args.quantize,
    )
    seconds = time.monotonic() - begun
    for note in outcome.notes:
        print(f"warning: {note}", file=sys.stderr)
    print(
        f"{outcome.folder}: {outcome.bytes_written / 1e9:.3f} GB in {seconds:.1f} s"
        f" ({outcome.bytes_written / 1e6 / seconds:.0f} MB/s, with the proof), peak memory"
        f" {outcome.peak / 2**30:.2f} GiB"
    )
    print(f"{outcome.folder}: {_proof(outcome.identical, outcome.converted)}")
    if args.quantize:
        print(f"measure what that loses: llama-jax perplexity {outcome.folder} TEXT_FILE")
    return 0


def _proof(identical: int, converted: int) -> str:
    """Returns what a verification has shown."""
    parts = [f"{identical} weights give back the source's bits"] if identical else []
    parts += [f"{converted} equal the source's after the change of type"] if converted else []
    return ", ".join(parts)


def _info(args: argparse.Namespace) -> int:
    from llama_jax import info

    print(info.describe(Path(args.folder)))
    return 0


_COMMANDS = {
    "train": _train,
    "plan": _plan,
    "tokenize": _tokenize,
    "generate": _generate,
    "perplexity": _perplexity,
    "convert": _convert,
    "info": _info,
}
