"""`llama-jax tokenize`."""

import argparse

from llama_jax.errors import InputError

MANUAL = """\
Convert text files or JSON lines (one {"text": …} per line) into a folder of token shards.

.jsonl and .ndjson files are JSON lines. A .txt, .md, .py or .rst file is one text, whatever its
content. For any other file, such as the .json.gz files of C4, the first line decides. Files may
be compressed (.gz, .zst).

--vocab-size trains a tokenizer as LLaMA's was trained (BPE, digits split, bytes for unknown
characters, no normalization); --tokenizer uses an existing one. All CPU cores work. One in
1/fraction documents is held out for validation. A long text is encoded in parts that end where no
token can cross, so memory use stays small. The folder appears only when it is complete; the next
tokenize with the same --out removes the incomplete files of a killed process. SIGTERM and Ctrl-C
leave no files.

example:
  llama-jax tokenize 'corpus/*.jsonl.zst' --out data/mine --vocab-size 32000
  llama-jax tokenize books/ --out data/books --tokenizer llama/tokenizer.model
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help="file, folder or glob")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to create")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--vocab-size", type=int, metavar="N", help="train a tokenizer of N tokens"
    )
    tokenizer.add_argument(
        "--tokenizer", metavar="FILE", help="use this tokenizer (file or folder)"
    )
    parser.add_argument(
        "--validation-fraction", type=float, default=0.05, metavar="X",
        help="fraction of the documents that is held out (0.05)",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, metavar="N", help="processes (one per core)")


def run(args: argparse.Namespace) -> int:
    """Writes the token shards; returns the exit code."""
    from llama_jax.data import tokenize

    if not 0 <= args.validation_fraction < 1:
        raise InputError("--validation-fraction must be at least 0 and below 1")
    meta = tokenize.tokenize_corpus(
        args.sources,
        args.out,
        n_vocab=args.vocab_size,
        tokenizer=args.tokenizer,
        validation_fraction=args.validation_fraction,
        workers=args.workers,
    )
    for name, split in meta["splits"].items():
        print(f"{args.out}/{name}: {split['documents']:,} documents, {split['tokens']:,} tokens")
    return 0
