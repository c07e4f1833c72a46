"""Tokenizes a corpus into token shards, in tasks that any number of processes and machines share.

The corpus is divided into parts of up to 64 MiB of text. Each part is encoded by itself. Then each
file of the shards is assembled from the parts that it overlaps, and `meta.json` is written last.
All of it is a function of the corpus, the tokenizer and the settings. So the bytes don't depend on
who ran which task, and a killed process continues with the missing tasks alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_jax.data import shard_writer
from llama_jax.data.assemble_shards import BAD_RECORDS, Publish, SumParts, plan_shards, read_summary
from llama_jax.data.bad_records import BadLimit, BadRecords
from llama_jax.data.corpus import CorpusSettings
from llama_jax.data.corpus_plan import MIN_PART_BYTES, divide, hold_out, list_ranges, text_size
from llama_jax.data.encode_part import EncodePart
from llama_jax.data.shards import is_token_folder, read_meta
from llama_jax.data.tasks import Part, Task, run_tasks
from llama_jax.data.text_files import find_files
from llama_jax.data.train_on_corpus import TrainTokenizer
from llama_jax.errors import InputError
from llama_jax.runtime.atomic_write import Unfinished, is_written, unfinished_folder
from llama_jax.runtime.console import print_status
from llama_jax.runtime.cpu import cpu_cores
from llama_jax.runtime.manifest import hash_bytes
from llama_jax.runtime.storage import (
    AnyPath,
    parse_path,
    read_many,
    remove_tree,
    write_file,
    write_many,
)
from llama_jax.tokenizer.tokenizer import Tokenizer, file_hash, load_tokenizer

Runner = Callable[[Sequence[Task]], None]

_PLAN = "plan"  # names all parts, in the folder of the intermediate files
_SMALL_TOKENS = 1 << 24  # so few are assembled in less time than a process takes to start


def tokenize_corpus(
    sources: Sequence[str],
    out: str | AnyPath,
    *,
    n_vocab: int | None = None,
    tokenizer: str | AnyPath | None = None,
    validation_fraction: float = 0.05,
    parse_special: bool = False,
    documents: str = "file",
    text_field: str = "text",
    id_field: str = "id",
    max_bad: BadLimit | None = None,
    workers: int | None = None,
    part: Part | None = None,
    runner: Runner | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenizes a corpus into the new folder `out` and returns the content of its `meta.json`.

    Args:
        sources: files, folders and globs, as `find_files` takes them.
        out: folder to create. It appears once it is complete. Until then the finished parts are in
            a hidden folder beside it, and the next call continues there.
        n_vocab: number of tokens of a tokenizer to train on the corpus (on about 64 MiB of its
            lines), where `tokenizer` is None.
        tokenizer: file or folder of the tokenizer to use.
        validation_fraction: fraction of the documents that is held out.
        parse_special: whether the text of a special token is encoded as that token; otherwise it is
            ordinary text, which the model never sees in a chat.
        documents: of a plain text: 'file', 'paragraph', 'line', or the text between two documents.
        text_field: field of JSON lines, or column of Parquet, that has the text.
        id_field: field that identifies a record in the report of bad records.
        max_bad: how many records may be bad; these are left out. Default: none.
        workers: number of processes; default: one per core.
        part: this process runs this part of the tasks, and others run the rest.
        runner: runs the tasks elsewhere, such as `beam.beam_runner` returns.
        progress: whether to show the progress on standard error.

    Raises:
        InputError: `out` exists already, a source can't be read, there are too many bad records, or
            a split has no document.
        Fault: the system can't write `out`.
    """
    if tokenizer is None and n_vocab is None:
        raise InputError("tokenize: give a tokenizer, or the vocabulary size of one to train")
    out, limit = parse_path(out), max_bad or BadLimit(0)
    if part is not None and _is_published(out):
        print_status(f"{out} is complete: this part of the tasks has nothing to do")
        return read_meta(out)
    with unfinished_folder(out, shared=part is not None) as folder:
        if is_token_folder(folder.final):  # a process was killed while it published the folder
            folder.publish()
            return read_meta(out)
        part_limit = limit.count if limit.share is None else None
        try:
            settings = CorpusSettings(documents, text_field, id_field)
            files = list_ranges(find_files(sources), settings)
            settings = hold_out(files, settings, validation_fraction)
            most = max(1, sum(map(text_size, files)) // MIN_PART_BYTES)
            workers = workers or min(cpu_cores(), most)
            stages = _Stages(folder, workers, part, runner, progress)
            if tokenizer is not None:
                path = parse_path(tokenizer)
            else:
                assert n_vocab is not None
                path = stages.train(
                    TrainTokenizer(folder.work, tuple(files), settings, n_vocab, part_limit)
                )
            loaded = load_tokenizer(path)  # takes half a second for Llama 3's tokenizer
            copied, key = stages.copy_tokenizer(loaded.files), file_hash(loaded.path)
            parts = [
                EncodePart(
                    folder.work, ranges, settings, copied, key, parse_special,
                    part_limit,
                )
                for ranges in divide(files, text_field)
            ]  # fmt: skip
            stages.begin(parts, loaded.files)
            summary = stages.encode(parts)
            if summary is not None:
                if summary["special"] and not parse_special:
                    _warn_of_special_texts(summary["special"])
                stages.check(summary, limit, len(files), bool(validation_fraction))
                stages.publish(summary, tuple(sources), loaded)
        except BaseException:
            # A process that started again at the end may miss files that the others have removed.
            if part is None or not _is_published(out):
                _discard_if_nothing_is_done(folder, part)
                raise
        if part is not None:
            remove_tree(folder.work)  # which this process may have created again
        return read_meta(out)


def _is_published(out: AnyPath) -> bool:
    return is_written(out) and is_token_folder(out)


def _discard_if_nothing_is_done(folder: Unfinished, part: Part | None) -> None:
    """Removes the intermediate files after an error, if no part is finished and `part` is None.

    Otherwise another process, or the next call, can use them.
    """
    if part is not None or is_written(folder.path):
        return
    records = folder.done / "records"
    if records.is_dir() and any(not file.name.startswith(".") for file in records.iterdir()):
        print_status(f"the finished parts are in {folder.work}: the same command continues there")
    else:
        folder.discard()


def _warn_of_special_texts(found: Mapping[str, int]) -> None:
    texts = ", ".join(f"{text} ({count:,})" for text, count in [*found.items()][:3])
    print_status(
        f"warning: the corpus contains the text of special tokens {sum(found.values()):,} times"
        f" ({texts}). It is encoded as ordinary text, which the model never sees in a chat: use"
        " --chat for chats, or --parse-special for text with a chat format in it"
    )


@dataclass
class _Stages:
    """The stages of one call of `tokenize_corpus`."""

    folder: Unfinished
    workers: int
    part: Part | None
    runner: Runner | None
    progress: bool

    def _run(
        self, tasks: Sequence[Task], title: str, workers: int, runner: Runner | None = None
    ) -> None:
        run_tasks(
            tasks, title=title, workers=workers, part=self.part, progress=self.progress,
            runner=runner, until=self.folder.path,
        )  # fmt: skip

    def train(self, task: TrainTokenizer) -> AnyPath:
        """Returns the file of a tokenizer, after it is trained."""
        if self.progress and not is_written(task.output):
            print_status(f"training a tokenizer of {task.n_vocab} tokens …")
        self._run([task], "training a tokenizer", self.workers)
        return task.output

    def copy_tokenizer(self, files: Mapping[str, bytes]) -> AnyPath:
        """Writes a tokenizer's files where all machines find them; returns their folder."""
        key = hash_bytes(b"".join(name.encode() + data for name, data in sorted(files.items())))
        folder = self.folder.work / f"copy-{key[:32]}"
        write_many(folder, files)
        return folder

    def begin(self, parts: Sequence[EncodePart], tokenizer: Mapping[str, bytes]) -> None:
        """Compares the parts with those of the other processes, and of killed ones.

        Raises:
            InputError: this process shares the folder, and they differ.
        """
        work, final = self.folder.work, self.folder.final
        plan = SumParts(tuple(parts)).output.name.encode()
        found = read_many(work, [_PLAN])[_PLAN]
        if found not in (None, plan):
            if self.part is not None:
                raise InputError(
                    f"{work} belongs to a corpus or settings that differ from those of this"
                    " process: give all processes the same, or remove the folder"
                )
            # Shards and tokenizer may differ. The parts that are the same are not encoded again.
            remove_tree(self.folder.done / "shards")
            for entry in [*final.iterdir()] if final.is_dir() else []:
                if not entry.name.startswith("."):
                    remove_tree(entry)
        write_file(work / _PLAN, plan)
        write_many(final, tokenizer)

    def encode(self, parts: Sequence[EncodePart]) -> dict[str, Any] | None:
        """Encodes the parts and returns their summary.

        None: another process of this job has published the folder meanwhile.
        """
        self._run(parts, "tokenizing", self.workers, self.runner)
        sums = SumParts(tuple(parts))
        self._run([sums], "summing up", 1)
        return read_summary(sums)

    def check(self, summary: dict[str, Any], limit: BadLimit, n_files: int, held_out: bool) -> None:
        """Checks the summary of all parts.

        Raises:
            InputError: there are too many bad records, or a split has no document.
        """
        bad = BadRecords(**summary["bad"])
        if bad.counts:
            report = self.folder.work / BAD_RECORDS
            write_file(report, bad.report())
            bad.check(limit, summary["records"], report)
            if bad.total:  # not if texts are only empty
                listed = self.folder.path / BAD_RECORDS
                print_status(f"left out: {bad.describe()} (listed in {listed})")
        for split, totals in summary["totals"].items():
            if not totals["documents"] and (split == "train" or held_out):
                if self.part is None:
                    self.folder.discard()  # other settings need other parts
                raise InputError(
                    f"corpus: no document for the {split} split in {n_files} file(s): add text"
                    " or change validation_fraction"
                )

    def publish(
        self,
        summary: dict[str, Any],
        sources: tuple[str, ...],
        tokenizer: Tokenizer,
    ) -> None:
        """Assembles the shards and publishes their folder."""
        n_vocab, final = tokenizer.n_vocab, self.folder.final
        sizes = shard_writer.SHARD_TOKENS, shard_writer.CHUNK_TOKENS
        shards = plan_shards(self.folder.work, summary, final, n_vocab, *sizes)
        few = sum(totals["tokens"] for totals in summary["totals"].values()) <= _SMALL_TOKENS
        self._run(shards, "assembling", 1 if few else self.workers, None if few else self.runner)
        done = Publish(
            self.folder, tuple(shards), summary, sources, tokenizer.path, n_vocab, *sizes
        )
        self._run([done], "publishing", 1)
