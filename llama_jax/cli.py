"""The command line: `llama-jax train | tokenize | generate | info`."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llama_jax import __version__, config_file
from llama_jax.errors import InputError

# What needs JAX is imported by the command that uses it: `--help` and typing errors answer at once.

_TRAIN = """\
Train a model as a configuration file says, or go on where its run folder stopped.

The run folder (training.out) receives config.yaml, checkpoints/, metrics.jsonl, TensorBoard
files, loss.png and the tokenizer. The same command resumes: the run continues with the very
batches and losses that it would have had, also on another mesh. SIGTERM and Ctrl-C save and exit.
A folder of token shards that is missing is made from data.corpus first.

example:
  llama-jax train configs/quickstart.yaml
  llama-jax train configs/quickstart.yaml training.steps=600 optimizer.peak_lr=1e-3
"""

_TOKENIZE = """\
Turn text or JSONL (one {"text": …} a line; also .gz and .zst) into a folder of token shards.

A tokenizer is trained as LLaMA's was (BPE, split digits, bytes for the unknown, nothing
normalised) with --vocab-size, or taken with --tokenizer. All cores work. Every 1/fraction-th
document is held out for validation. The folder appears when it is whole, or not at all.

example:
  llama-jax tokenize 'corpus/*.jsonl.zst' --out data/mine --vocab-size 32000
  llama-jax tokenize books/ --out data/books --tokenizer llama/tokenizer.model
"""

_GENERATE = """\
Continue a text with the model in a run folder or model folder.

Standard output carries the text alone, as it is made; everything else goes to standard error.
The default is the most likely token each time; --temperature above 0 draws instead, among the
tokens that --top-k and --top-p leave (in this order).

example:
  llama-jax generate runs/quickstart --prompt 'def '
  llama-jax generate runs/quickstart --prompt 'import ' --temperature 0.8 --top-p 0.95 --seed 1
"""

_INFO = """\
Show in one screen what a folder holds: a run, a model, or token shards.

example:
  llama-jax info runs/quickstart
  llama-jax info data/quickstart
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 1 for a failed run, 2 for bad input."""
    args = _parser().parse_args(argv)
    # Orbax and asyncio log tracebacks of errors that are told in a sentence here.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        return args.command(args)
    except InputError as error:
        print(f"llama-jax {args.name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of standard output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama-jax", description="LLaMA in JAX: train it, run it, look inside."
    )
    parser.add_argument("--version", action="version", version=f"llama_jax {__version__}")
    commands = parser.add_subparsers(dest="name", metavar="COMMAND", required=True)

    def command(name: str, manual: str, function, **more) -> argparse.ArgumentParser:
        raw = argparse.RawDescriptionHelpFormatter
        summary = manual.split("\n")[0]
        made = commands.add_parser(
            name, help=summary, description=manual, formatter_class=raw, **more
        )
        made.set_defaults(command=function)
        return made

    keys = "The keys of a configuration file (type, default):\n" + config_file.manual()
    train = command("train", _TRAIN, _train, epilog=keys)
    train.add_argument("config", metavar="CONFIG", help="YAML file")
    train.add_argument(
        "overrides", metavar="section.key=value", nargs="*", help="changes a key of the file"
    )

    tokenize = command("tokenize", _TOKENIZE, _tokenize)
    tokenize.add_argument("sources", metavar="SOURCE", nargs="+", help="file, folder or glob")
    tokenize.add_argument("--out", required=True, metavar="FOLDER", help="folder to make")
    kind = tokenize.add_mutually_exclusive_group(required=True)
    kind.add_argument("--vocab-size", type=int, metavar="N", help="train a tokenizer of N tokens")
    kind.add_argument("--tokenizer", metavar="FILE", help="use this tokenizer.model")
    tokenize.add_argument(
        "--validation-fraction", type=float, default=0.05, metavar="X", help="held out (0.05)"
    )
    tokenize.add_argument("--workers", type=int, metavar="N", help="processes (one a core)")

    generate = command("generate", _GENERATE, _generate)
    generate.add_argument("folder", metavar="FOLDER", help="run folder or model folder")
    generate.add_argument("--prompt", default="", metavar="TEXT", help="text to continue (none)")
    generate.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="at most N (200, or what the context holds)"
    )
    generate.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0: greedy")
    generate.add_argument("--top-k", type=int, default=0, metavar="K", help="0: all (default)")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1: all (default)")
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (0)")
    generate.add_argument(
        "--ignore-eos", action="store_true", help="go on after an end-of-text token"
    )

    info = command("info", _INFO, _info)
    info.add_argument("folder", metavar="FOLDER")
    return parser


def _train(args: argparse.Namespace) -> int:
    resolved = config_file.load(args.config, args.overrides)
    from llama_jax.training import loop
    from llama_jax.training.progress import tell

    try:
        outcome = loop.run(resolved)
    except loop.RunStopped as error:
        print(f"llama-jax train: {error}", file=sys.stderr)
        return 1
    if not outcome.finished:
        again = " ".join(["llama-jax train", args.config, *args.overrides])
        tell(f"saved after step {outcome.step}; go on with: {again}")
        return 0
    if outcome.validation_loss is not None and outcome.unigram_entropy is not None:
        print(
            f"validation loss {outcome.validation_loss:.3f} nats per token; unigram entropy of the"
            f" held-out text {outcome.unigram_entropy:.3f}"
        )
    for i, prompt in enumerate(resolved.logging.samples):
        print(f"\n--- sample {i + 1} of {len(resolved.logging.samples)}: {prompt!r}")
        _continue(outcome.folder, prompt, 80, temperature=0.7, top_p=0.95, seed=i)
    print(f"\nlosses: {outcome.folder / 'loss.png'}")
    print(f'continue with: llama-jax generate {outcome.folder} --prompt "def "')
    return 0


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

    from llama_jax import checkpoint, sharding
    from llama_jax.data.tokenizer import load_tokenizer
    from llama_jax.inference.generate import stream, stream_text

    shape = checkpoint.read_model_config(folder)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(prompt, bos=True)
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
        for piece in stream_text(tokenizer, ids, counted):
            print(piece, end="", flush=True)
    print()
    return len(tokens)


def _info(args: argparse.Namespace) -> int:
    from llama_jax import info

    print(info.describe(Path(args.folder)))
    return 0
