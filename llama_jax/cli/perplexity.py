"""`llama-jax perplexity`."""

import argparse
import math
from pathlib import Path

from llama_jax.cli.arguments import add_folder, add_lora, read_pairs
from llama_jax.errors import InputError
from llama_jax.runtime.storage import parse_path

MANUAL = """\
Measure how well a model predicts a text: nats per token, and perplexity, which is exp(nats).

The text is split into windows of 2048 tokens, or of the model's context if that is shorter. The
model predicts each token from the earlier tokens of its window. With --quantize, the model is
measured twice, as it is and with quantized weights, and the difference is printed.

example:
  llama-jax perplexity models/llama3.2-1b book.txt
  llama-jax perplexity models/llama3.2-1b book.txt --quantize int8
  llama-jax perplexity models/llama3.2-1b book.txt --lora runs/lora
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_folder(parser)
    parser.add_argument("text", metavar="TEXT_FILE", help="text in UTF-8")
    parser.add_argument("--quantize", choices=["int8"], help="compare with quantized weights")
    add_lora(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the perplexity of the model on the text; returns the exit code."""
    import jax

    from llama_jax.checkpoint import folders
    from llama_jax.evaluation.perplexity import nats_per_token
    from llama_jax.inference.load import choose_compute_dtype, load
    from llama_jax.model.weights import check_not_quantized
    from llama_jax.parallel.mesh import tensor_mesh
    from llama_jax.tokenizer.tokenizer import load_tokenizer

    stored, tokenizer = folders.read_model_config(args.folder), load_tokenizer(args.folder)
    pairs = read_pairs(args.lora, parse_path(args.folder), stored)
    if args.quantize:
        check_not_quantized(stored)
    try:
        text = Path(args.text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"{args.text} can't be read ({reason}): give a text file") from error
    ids = tokenizer.encode(text, bos=tokenizer.add_bos)

    def measure(quantize: str | None) -> float:
        config, model = load(
            args.folder,
            choose_compute_dtype(stored),
            quantize,
            pairs=pairs,
            unmerged=args.unmerged,
        )
        storage = config.param_dtype if config.quantized == "none" else config.quantized
        nats = nats_per_token(config, model, ids)
        print(
            f"{storage:8}  {nats:.5f} nats per token, perplexity {math.exp(nats):.4f}, of"
            f" {len(ids) - 1:,} tokens"
        )
        return nats

    with jax.set_mesh(tensor_mesh(stored)):
        nats = measure(None)
        if not args.quantize:
            return 0
        change = measure(args.quantize) - nats
    print(f"change    {change:+.5f} nats per token, perplexity {100 * math.expm1(change):+.3f} %")
    return 0
