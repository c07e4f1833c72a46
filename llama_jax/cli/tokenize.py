"""`llama-jax tokenize`."""

import argparse

from llama_jax.cli.arguments import add_tasks, read_tasks
from llama_jax.errors import InputError
from llama_jax.runtime.storage import parse_path

MANUAL = """\
Convert text files, JSON lines (one {"text": …} per line) or chats into a folder of token shards.

.jsonl and .ndjson files are JSON lines. A .txt, .md, .py or .rst file is plain text, whatever its
content. For any other file, such as the .json.gz files of C4, the first line decides. .parquet
files need the extra `parquet`. Text and JSON lines may be compressed (.gz, .bz2, .xz, .zst).

--vocab-size trains a tokenizer as LLaMA's was trained (BPE, digits split, bytes for unknown
characters, no normalization); --tokenizer uses an existing one. A plain text is one document, or
--documents divides it at each line, at blank lines, or at a separator such as '<|endoftext|>'.
The hash of a document decides whether it is held out for validation; of a single book the end is.

The corpus is divided into tasks of up to 64 MiB of text, on which all CPU cores work; memory use
does not depend on the size of a file. The folder appears only when it is complete. A killed or
interrupted command leaves its finished tasks in a hidden folder beside --out, and the same command
continues with the missing ones. --task I/N runs every N-th task, in N processes on any machines
that see the same files and the same --out; each waits until the folder is complete. SLURM arrays,
indexed Jobs of Kubernetes (with JOB_COMPLETIONS) and the hosts of a pod need no --task. --beam,
the last option, runs the tasks in Apache Beam (extra `beam`): its flags name the engine.

Records that can't be used (not UTF-8, not JSON, without text, over 64 MiB) end the command, unless
--max-bad allows a number or a percentage of them. These are left out, and bad_records.log beside
the shards lists them, with the empty ones.

The text of a special token in the corpus, such as <|eot_id|>, is ordinary text, and a warning
counts it. --parse-special encodes it as that token.

With --chat, each line is a chat or a preference, recognized by its fields: "messages" (OpenAI),
"conversations" (ShareGPT), "instruction" and "output" (Alpaca), "prompt" and "completion", or
"chosen" and "rejected". The tokenizer defines the chat format. The model learns the assistant's
answers with their end tokens (--train-on all), only the last of each chat, or everything. Complete
examples fill windows of --seq-len tokens; longer ones are left out and listed. --show N prints
windows as the model sees them, with the trained tokens in color.

example:
  llama-jax tokenize 'corpus/*.jsonl.zst' --out data/mine --vocab-size 32000 --max-bad 0.01%
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
    parser.add_argument(
        "--documents", default="file", metavar="WHAT",
        help="documents of plain text: file (default), paragraph, line, or a separator",
    )  # fmt: skip
    parser.add_argument(
        "--text-field", default="text", metavar="NAME",
        help="field or column of the text (text); a.b is the field b of the object a",
    )  # fmt: skip
    parser.add_argument(
        "--id-field", default="id", metavar="NAME", help="field that names a record in reports (id)"
    )
    parser.add_argument(
        "--max-bad", default="0", metavar="N", help="leave out up to N (or N%%) bad records (0)"
    )
    add_tasks(parser)
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
    from llama_jax.data.bad_records import parse_bad_limit

    if args.seq_len is not None or args.train_on:
        raise InputError("--seq-len and --train-on are for chats: add --chat")
    if not args.documents:
        raise InputError("--documents is empty: give file, paragraph, line, or a separator")
    meta = tokenize.tokenize_corpus(
        args.sources,
        args.out,
        n_vocab=args.vocab_size,
        tokenizer=args.tokenizer,
        validation_fraction=args.validation_fraction,
        parse_special=args.parse_special,
        documents=args.documents,
        text_field=args.text_field,
        id_field=args.id_field,
        max_bad=parse_bad_limit(args.max_bad),
        **read_tasks(args),
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
    if args.task is not None or args.beam is not None:
        raise InputError("--task and --beam are for texts: chats are tokenized in one process")
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
