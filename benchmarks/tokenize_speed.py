"""Speed of `llama-jax tokenize`, compared with the tokenizer's own library in as many processes.

    python benchmarks/tokenize_speed.py [--megabytes 64] [--processes 2] [--tokenizer FILE]

The text is that of Python's standard library, repeated, as JSON lines. The peer's processes also
parse the lines, and encode the texts with the library alone (sentencepiece, tokenizers or
tiktoken): they hold out, check and write nothing. Both times include the start of the processes.
Without --tokenizer, one of 8,000 tokens is trained (SentencePiece).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from result import Result, add_json_option, append_result

from llama_jax.data.text_files import find_files
from llama_jax.data.tokenize import tokenize_corpus
from llama_jax.runtime.cpu import cpu_cores
from llama_jax.tokenizer.tokenizer import load_tokenizer
from llama_jax.tokenizer.train import train_tokenizer

_CHUNK = 1 << 22  # bytes of the file that a process of the peer encodes in one call


def library_of(path: str) -> tuple[str, Callable[[str], Any]]:
    """Returns the name of a tokenizer's library, and its bare function."""
    data, tokenizer = Path(path).read_bytes(), load_tokenizer(path)
    kind = type(tokenizer).__name__
    if kind == "SentencePiece":
        import sentencepiece

        return "sentencepiece", sentencepiece.SentencePieceProcessor(model_proto=data).encode
    if kind == "TokenizerJson":
        import tokenizers

        encode = tokenizers.Tokenizer.from_str(data.decode()).encode
        return "tokenizers", lambda text: encode(text, add_special_tokens=False).ids
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    from llama_jax.tokenizer.build import LLAMA3_PATTERN

    encoding = tiktoken.Encoding(
        "bare",
        pat_str=LLAMA3_PATTERN,
        mergeable_ranks=load_tiktoken_bpe(path),
        special_tokens={},
    )
    return "tiktoken", encoding.encode_ordinary


def encode_lines(tokenizer: str, path: str, start: int, stop: int) -> int:
    """Returns the number of tokens of the lines that start in a range of bytes."""
    _, encode = library_of(tokenizer)
    n = 0
    with open(path, "rb") as file:
        file.seek(max(0, start - 1))
        if start:
            file.readline()
        while file.tell() < stop and (line := file.readline()):
            n += len(encode(json.loads(line)["text"]))
    return n


def encode_bare(tokenizer: str, path: Path, processes: int) -> int:
    """Returns the number of tokens of a file, encoded with the library alone."""
    size = path.stat().st_size
    step = max(_CHUNK, -(-size // (4 * processes)))
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        counts = [
            pool.submit(encode_lines, tokenizer, str(path), i, i + step)
            for i in range(0, size, step)
        ]
        return sum(count.result() for count in counts)


def main() -> None:
    """Prints the rates of both sides."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=64.0)
    parser.add_argument("--processes", type=int, default=cpu_cores())
    parser.add_argument("--tokenizer", metavar="FILE")
    parser.add_argument("--rounds", type=int, default=3)
    add_json_option(parser)
    args = parser.parse_args()
    texts = [path.read_bytes().decode() for path in find_files(["python-stdlib"])]
    with tempfile.TemporaryDirectory() as temporary:
        corpus, size = Path(temporary, "corpus.jsonl"), 0
        with corpus.open("w") as file:
            while size < args.megabytes * 1e6:
                for text in texts:
                    size += len(text)
                    file.write(json.dumps({"text": text}) + "\n")
                    if size >= args.megabytes * 1e6:
                        break
        tokenizer = args.tokenizer or str(Path(temporary, "tokenizer.model"))
        if not args.tokenizer:
            train_tokenizer(texts[::8], tokenizer, 8000)
        name, _ = library_of(tokenizer)
        ours, theirs, n = list[float](), list[float](), 0
        for i in range(args.rounds):
            begin = time.perf_counter()
            meta = tokenize_corpus(
                [str(corpus)], f"{temporary}/{i}", tokenizer=tokenizer, workers=args.processes,
                progress=False,
            )  # fmt: skip
            ours.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            n = encode_bare(tokenizer, corpus, args.processes)
            theirs.append(time.perf_counter() - begin)
            splits = meta["splits"].values()
            tokens = sum(split["tokens"] - 2 * split["documents"] for split in splits)
            # Llama 3's tokenizer, unlike bare tiktoken, cuts a text after 400,000 characters.
            if abs(tokens - n) > 1e-5 * n:
                raise SystemExit(f"the tokens differ: {tokens} and {n}")
    rate, bare = n / statistics.median(ours), n / statistics.median(theirs)
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    title = f"tokenize, {args.processes} processes, {name}"
    print(f"{title}: {rate:,.0f} tokens/s; bare {bare:,.0f} tokens/s; ratio {ratio:.2f}")
    note = f"{args.megabytes:g} MB of JSON lines"
    append_result(args.json, Result(title, "tokens/s", rate, name, bare, ratio, note))


if __name__ == "__main__":
    sys.exit(main())
