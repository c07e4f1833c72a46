"""Text to token shards: reads text and JSONL, tokenizes on all cores, writes memory-mapped files.

A folder of token shards holds the tokenizer, `meta.json` and, for each of the splits `train` and
`validation`, `tokens-NNNNN.npy` (the documents one after another, each between the begin and the
end token) and `ends-NNNNN.npy` (where in the whole split the documents of that file end).
"""

import collections
import contextlib
import glob
import gzip
import io
import json
import math
import multiprocessing
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from llama_jax.data.tokenizer import Tokenizer, file_hash, load_tokenizer
from llama_jax.data.tokenizer_training import train_tokenizer
from llama_jax.errors import InputError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SPLITS = ("train", "validation")
SHARD_TOKENS = 1 << 27  # 256 MiB of uint16
_TASK_BYTES = 1 << 20  # text that one worker gets at a time
_TEXT_SUFFIXES = {".txt", ".md", ".py", ".rst", ".jsonl"}


class Document(NamedTuple):
    """One text of the corpus, and whether it is held out."""

    text: str
    split: str


def find_files(sources: Sequence[str]) -> list[Path]:
    """Returns the files that `sources` name, sorted within each source.

    Args:
        sources: files, folders (searched for .txt .md .py .rst .jsonl, also .gz and .zst), globs,
            or `python-stdlib` for the sources of Python's standard library, tests left out.

    Raises:
        InputError: a source names no file.
    """
    found: list[Path] = []
    for source in sources:
        if source == "python-stdlib":
            files = _standard_library()
        elif Path(source).is_dir():
            files = [p for p in Path(source).rglob("*") if _inner_suffix(p) in _TEXT_SUFFIXES]
        else:
            files = [Path(name) for name in glob.glob(source, recursive=True)]
        files = sorted(file for file in files if file.is_file())
        if not files:
            raise InputError(f"corpus: no text files at {source!r}: name files, folders or globs")
        found += files
    return list(dict.fromkeys(found))


def _standard_library() -> Iterator[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    for path in root.rglob("*.py"):
        if left_out.isdisjoint(path.relative_to(root).parts) and _is_utf8(path):
            yield path


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True


def _inner_suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix


@contextlib.contextmanager
def _open(path: Path) -> Iterator[IO[str]]:
    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(open(path, "rb"))
        if path.suffix == ".gz":
            file = stack.enter_context(gzip.GzipFile(fileobj=file))
        elif path.suffix == ".zst":
            file = stack.enter_context(zstd.ZstdFile(file))
        yield io.TextIOWrapper(file, encoding="utf-8", newline="")  # line ends stay as they are


def read_texts(path: Path) -> Iterator[str]:
    """Yields the texts of a file: each `text` of a JSONL file, or the whole of any other.

    Raises:
        InputError: names file and line of what is not UTF-8, not JSON, without `text`, or cut
            short.
    """
    try:
        with _open(path) as file:
            if _inner_suffix(path) != ".jsonl":
                yield file.read()
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _text_of(line, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start} of a block): convert or leave it out"
        ) from error
    except (EOFError, gzip.BadGzipFile, zstd.ZstdError) as error:
        raise InputError(f"{path} is damaged or cut short ({error}): fetch it again") from error
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}") from error


def _text_of(line: str, place: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not valid JSON ({error.msg}): mend or remove it") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise InputError(f'{place}: a line needs a string "text"; this one has: {found}')
    return text


def read_documents(files: Sequence[Path], validation_fraction: float) -> Iterator[Document]:
    """Yields all non-empty documents in order, every 1/fraction-th of them held out.

    Where there are too few documents for that (a single book), the last part of each is held
    out instead, cut at a line break.
    """
    few = len(files) * validation_fraction < 1 and all(
        _inner_suffix(path) != ".jsonl" for path in files
    )
    texts = (text for path in files for text in read_texts(path) if text)
    for i, text in enumerate(texts):
        if few and validation_fraction:
            cut = text.rfind("\n", 0, round(len(text) * (1 - validation_fraction))) + 1
            parts = (Document(text[:cut], "train"), Document(text[cut:], "validation"))
            yield from (part for part in parts if part.text)
        else:
            held_out = int((i + 1) * validation_fraction) > int(i * validation_fraction)
            yield Document(text, SPLITS[held_out])


class _SplitWriter:
    """Collects the tokens of a split and writes them in files of SHARD_TOKENS."""

    def __init__(self, folder: Path, n_vocab: int):
        self.folder = folder
        self.dtype = np.uint16 if n_vocab <= 1 << 16 else np.uint32
        self.pieces: list[np.ndarray] = []
        self.ends: list[int] = []
        self.waiting = self.tokens = self.documents = self.bytes = 0
        self.counts = np.zeros(n_vocab, np.int64)
        self.shards: list[dict[str, Any]] = []
        folder.mkdir()

    def add(self, ids: np.ndarray, n_bytes: int) -> None:
        self.counts += np.bincount(ids[1:], minlength=len(self.counts))
        self.bytes += n_bytes
        self.documents += 1
        end = self.tokens + self.waiting + len(ids)
        while self.waiting + len(ids) >= SHARD_TOKENS:
            room = SHARD_TOKENS - self.waiting
            self._take(ids[:room])
            ids = ids[room:]
            self.flush()
        self._take(ids)
        self.ends.append(end)

    def _take(self, ids: np.ndarray) -> None:
        self.pieces.append(ids.astype(self.dtype))
        self.waiting += len(ids)

    def flush(self) -> None:
        names = [f"{kind}-{len(self.shards):05d}.npy" for kind in ("tokens", "ends")]
        tokens = np.concatenate([np.zeros(0, self.dtype), *self.pieces])
        np.save(self.folder / names[0], tokens)
        np.save(self.folder / names[1], np.array(self.ends, np.int64))
        hashes = {name: file_hash(self.folder / name) for name in names}
        self.shards.append({"tokens": len(tokens), "documents": len(self.ends), "sha256": hashes})
        self.tokens += len(tokens)
        self.pieces, self.ends, self.waiting = [], [], 0

    def summary(self) -> dict[str, Any]:
        share = self.counts[self.counts > 0] / max(1, self.counts.sum())
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            # Nats per token: the best that a model without any context could reach on this split.
            "unigram_entropy": math.fsum(-share * np.log(share)),
            "shards": self.shards,
        }


_worker_tokenizer: Tokenizer | None = None


def _start_worker(path: str) -> None:
    global _worker_tokenizer
    _worker_tokenizer = load_tokenizer(path)


def _encode(documents: list[Document]) -> list[tuple[np.ndarray, int, str]]:
    assert _worker_tokenizer is not None
    encode = _worker_tokenizer.encode
    return [
        (np.array(encode(text, bos=True, eos=True), np.int64), len(text.encode()), split)
        for text, split in documents
    ]


def _tasks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    task: list[Document] = []
    size = 0
    for document in documents:
        task.append(document)
        size += len(document.text)
        if size >= _TASK_BYTES:
            yield task
            task, size = [], 0
    if task:
        yield task


def _in_order(tasks: Iterable[list[Document]], tokenizer: Path, workers: int):
    """Yields the encoded documents in order, with a bounded number of tasks in memory."""
    if workers == 1:
        _start_worker(str(tokenizer))
        for task in tasks:
            yield from _encode(task)
        return
    # Fresh processes: forking a process in which JAX runs threads can deadlock.
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, fresh, _start_worker, (str(tokenizer),)) as pool:
        running: collections.deque[Future] = collections.deque()
        for task in tasks:
            running.append(pool.submit(_encode, task))
            if len(running) > 3 * workers:
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()


def build(
    sources: Sequence[str],
    out: str | Path,
    *,
    n_vocab: int | None = None,
    tokenizer: str | Path | None = None,
    validation_fraction: float = 0.05,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenizes a corpus into the new folder `out` and returns its `meta.json`.

    Args:
        sources: what `find_files` takes.
        out: the folder to make. It appears when it is whole, or not at all.
        n_vocab: tokens of a tokenizer to train on the corpus, where `tokenizer` is None.
        tokenizer: file or folder of the tokenizer to use.
        validation_fraction: share of the documents that is held out.
        workers: processes; default: one a core.
        progress: show a bar on standard error.

    Raises:
        InputError: `out` is there already, a source can't be read, or a split stays empty.
    """
    out = Path(out)
    if out.exists():
        raise InputError(f"{out} is already there: remove it, or choose another folder")
    files = find_files(sources)
    size = sum(file.stat().st_size for file in files)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        model = partial / "tokenizer.model"
        if tokenizer is not None:
            for name, data in load_tokenizer(tokenizer).files.items():
                (partial / name).write_bytes(data)
            model = load_tokenizer(partial).path
        elif n_vocab is not None:
            if progress:
                print(f"training a tokenizer of {n_vocab} tokens …", file=sys.stderr, flush=True)
            documents = read_documents(files, validation_fraction)
            train_tokenizer((d.text for d in documents if d.split == "train"), model, n_vocab)
        else:
            raise InputError("tokenize: give a tokenizer, or the size of a vocabulary to train")
        n_vocab = load_tokenizer(model).n_vocab
        writers = {split: _SplitWriter(partial / split, n_vocab) for split in SPLITS}
        columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        workers = workers or max(1, min(os.cpu_count() or 1, size // _TASK_BYTES))
        tasks = _tasks(read_documents(files, validation_fraction))
        with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
            # Compressed files have an unknown size of text: the bar then only counts.
            plain = all(file.suffix not in (".gz", ".zst") for file in files)
            task = bar.add_task("", total=size if plain else None)
            for ids, n_bytes, split in _in_order(tasks, model, workers):
                writers[split].add(ids, n_bytes)
                bar.advance(task, n_bytes)
        for split, writer in writers.items():
            writer.flush()
            if not writer.documents and (split == "train" or validation_fraction):
                raise InputError(
                    f"corpus: no document for the {split} split in {len(files)} file(s): add text"
                    " or change validation_fraction"
                )
        meta = {
            "format": 1,
            "sources": list(sources),
            "tokenizer_sha256": file_hash(model),
            "n_vocab": n_vocab,
            "dtype": np.dtype(writers["train"].dtype).name,
            "splits": {split: writer.summary() for split, writer in writers.items()},
        }
        (partial / "meta.json").write_text(json.dumps(meta, indent=1))
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return meta
