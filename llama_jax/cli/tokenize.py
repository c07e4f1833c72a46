"""`llama-jax tokenize`."""

import argparse

from llama_jax.errors import InputError
from llama_jax.runtime.storage import parse_path

MANUAL = """\
Convert text files, JSON lines (one {"text": …} per line) or chats into a folder of token shards.

.jsonl and .ndjson files are JSON lines. A .txt, .md, .py or .rst file is one text, whatever its
content. For any other file, such as the .json.gz files of C4, the first line decides. Files may
be compressed (.gz, .zst).

--vocab-size trains a tokenizer as LLaMA's was trained (BPE, digits split, bytes for unknown
characters, no normalization); --tokenizer uses an existing one. All CPU cores work. One in
1/fraction documents is held out for validation. A long text is encoded in parts that end where no
token can cross, so memory use stays small. The folder appears only when it is complete; the next
tokenize with the same --out removes the incomplete files of a killed process. SIGTERM and Ctrl-C
leave no files.

The text of a special token in the corpus, such as <|eot_id|>, is ordinary text, and a warning
counts it. --parse-special encodes it as that token.

With --chat, each line is a chat or a preference, recognized by its fields: "messages" (OpenAI),
"conversations" (ShareGPT), "instruction" and "output" (Alpaca), "prompt" and "completion", or
"chosen" and "rejected". The tokenizer defines the chat format. The model learns the assistant's
answers with their end tokens (--train-on all), only the last of each chat, or everything. Complete
examples fill windows of --seq-len tokens; longer ones are left out and listed. --show N prints
windows as the model sees them, with the trained tokens in color.

example:
  llama-jax tokenize 'corpus/*.jsonl.zst' --out data/mine --vocab-size 32000
  llama-jax tokenize books/ --out data/books --tokenizer llama/tokenizer.model
  llama-jax tokenize chats.jsonl --chat --tokenizer models/smollm2 --seq-len 2048 --out data/chats
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
    parser.add_argument(
        "--parse-special", action="store_true",
        help="encode the text of a special token as that token",
    )  # fmt: skip
    parser.add_argument("--chat", action="store_true", help="each line is a chat or a preference")
    parser.add_argument("--seq-len", type=int, metavar="T", help="for --chat: tokens per window")
    parser.add_argument(
        "--train-on", choices=["last", "all", "everything"],
        help="for --chat: learn the last answer, all answers (default) or everything",
    )  # fmt: skip
    parser.add_argument("--show", type=int, metavar="N", help="print N windows at the end")


def run(args: argparse.Namespace) -> int:
    """Writes the token shards; returns the exit code."""
    from llama_jax.cli.show_windows import show_windows

    if not 0 <= args.validation_fraction < 1:
        raise InputError("--validation-fraction must be at least 0 and below 1")
    _tokenize_chats(args) if args.chat else _tokenize_text(args)
    if args.show is not None:
        print(show_windows(parse_path(args.out), args.show))
    return 0


def _tokenize_text(args: argparse.Namespace) -> None:
    from llama_jax.data import tokenize

    if args.seq_len is not None or args.train_on:
        raise InputError("--seq-len and --train-on are for chats: add --chat")
    meta = tokenize.tokenize_corpus(
        args.sources,
        args.out,
        n_vocab=args.vocab_size,
        tokenizer=args.tokenizer,
        validation_fraction=args.validation_fraction,
        parse_special=args.parse_special,
        workers=args.workers,
    )
    for name, split in meta["splits"].items():
        print(f"{args.out}/{name}: {split['documents']:,} documents, {split['tokens']:,} tokens")


def _tokenize_chats(args: argparse.Namespace) -> None:
    from llama_jax.cli.describe_folder import describe_packed_split
    from llama_jax.data import tokenize_chats

    if args.tokenizer is None:
        raise InputError("--chat needs --tokenizer: the model defines the chat format")
    if args.seq_len is None or args.seq_len < 2:
        raise InputError("--chat needs --seq-len, the tokens of a window, at least 2")
    if args.parse_special:
        raise InputError(
            "--parse-special: the text of a special token in a message must stay text: omit it"
        )
    meta = tokenize_chats.tokenize_chats(
        args.sources,
        args.out,
        tokenizer=args.tokenizer,
        seq_len=args.seq_len,
        train_on=args.train_on or "all",
        validation_fraction=args.validation_fraction,
        workers=args.workers,
    )
    for name, split in meta["splits"].items():
        print(f"{args.out}/{name}: {describe_packed_split(meta, split)}")
    rows, listed = meta["too_long"]["rows"], meta["too_long"]["first"][:20]
    if rows:
        more = " … (the first 1,000 are in meta.json)" if rows > len(listed) else ""
        print(
            f"left out, because they are longer than {args.seq_len:,} tokens: {rows:,} rows:"
            f" {', '.join(listed)}{more}"
        )
