"""Prepares the sources of a mixture: plans the tasks of all stages, and runs them."""

import glob
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import TypeAdapter

from llama_jax.config.prepare import SourceEntry
from llama_jax.data.prepare.grouping import Grouping
from llama_jax.data.prepare.kinds import is_raw_folder
from llama_jax.data.prepare.near_duplicates import NearDuplicates, near_duplicate_stages
from llama_jax.data.prepare.stages import (
    FinishTask,
    GroupTask,
    Layout,
    PartTask,
    Stage,
    source_stages,
    step_names,
)
from llama_jax.data.tasks import Part, Task, run_tasks
from llama_jax.errors import InputError
from llama_jax.runtime.bucket_path import BucketPath
from llama_jax.runtime.storage import (
    AnyPath,
    file_size,
    list_files,
    parse_path,
    read_many,
    remove_tree,
    write_file,
)

# Bytes of raw files for each partition of their keys. The lines of a gigabyte of WARC files (20 %
# of it is text) have some 100 MB of keys; those of a gigabyte of compressed text a few times as
# many.
_PARTITION_BYTES = 1 << 28
_MEASURED_FILES = 16  # whose mean size stands for all: in a bucket each size is a request


def prepare_sources(
    entries: Mapping[str, SourceEntry],
    out: str | AnyPath,
    *,
    workers: int | None = None,
    part: Part | None = None,
    progress: bool = True,
    runner: Callable[[Sequence[Task]], None] | None = None,
) -> dict[str, Any]:
    """Writes a folder of documents for each source; returns the content of each `funnel.json`.

    A run that was killed continues with what is missing. The result doesn't depend on the number
    of processes, nor on the machines that run the tasks.

    Args:
        entries: of the sources, by the name of their folder; its last component is used.
        out: folder of the folders.
        workers: as for `run_tasks`.
        part: as for `run_tasks`.
        progress: as for `run_tasks`.
        runner: as for `run_tasks`.

    Raises:
        InputError: a raw file is missing or damaged, a package that a rule needs is missing, two
            sources have one name, or a folder was prepared from other files or with other settings.
        Fault: the system can't write `out`.
    """
    names = source_names(entries)
    plans = [_Plan(parse_path(out) / names[folder], entry) for folder, entry in entries.items()]
    for plan in plans:
        plan.record()
    unfinished = [plan for plan in plans if not plan.is_finished()]
    run = {"workers": workers, "part": part, "progress": progress, "runner": runner}
    for stage in range(max((len(plan.stages) for plan in unfinished), default=0)):
        steps = [plan.group_tasks(stage) for plan in unfinished]
        for tasks in itertools.zip_longest(*steps, fillvalue=[]):
            groups = [*itertools.chain(*tasks)]
            run_tasks(groups, title=f"preparing: duplicates before stage {stage}", **run)
        parts = [task for plan in unfinished for task in plan.part_tasks(stage)]
        run_tasks(parts, title=f"preparing: stage {stage}", **run)
    # Each takes less time than a process takes to start.
    finish = [plan.finish_task() for plan in unfinished]
    run_tasks(finish, title="preparing: funnels", workers=1, part=part, progress=progress)
    # With a part, other processes may still look for the files of a stage.
    if part is None:
        for plan in plans:
            remove_tree(plan.layout.work)
    contents = (read_many(plan.layout.folder, ["funnel.json"])["funnel.json"] for plan in plans)
    return {n: json.loads(c or b"") for n, c in zip(names.values(), contents, strict=True)}


def source_names(entries: Mapping[str, SourceEntry]) -> dict[str, str]:
    """Returns the last part of the name of each folder, by the complete one.

    Raises:
        InputError: it is the same for two folders.
    """
    names = {folder: PurePosixPath(folder).name for folder in entries}
    for name in names.values():
        if [*names.values()].count(name) > 1:
            raise InputError(f"prepare: two folders are named {name}: rename one")
    return names


def select_sources(
    entries: Mapping[str, SourceEntry], only: Sequence[str] | None
) -> dict[str, SourceEntry]:
    """Returns the entries that are named, by the folder or the last part of its name.

    Args:
        entries: of all sources.
        only: the names; None: all.

    Raises:
        InputError: there is no such folder.
    """
    if only is None:
        return dict(entries)
    names = source_names(entries)
    known = {*names, *names.values()}
    for name in only:
        if name not in known:
            raise InputError(f"--only {name}: the section prepare has {', '.join(names.values())}")
    return {f: entry for f, entry in entries.items() if {f, names[f]} & {*only}}


class _Plan:
    """The raw files and stages of a source."""

    def __init__(self, folder: AnyPath, entry: SourceEntry):
        self.stages: list[Stage] = source_stages(entry)
        self.raw = find_raw_files(entry)
        measured = self.raw[:: max(1, len(self.raw) // _MEASURED_FILES)]
        size = sum(map(file_size, measured)) // len(measured)
        groupings = [stage.grouping for stage in self.stages]
        grouped = [g.files or len(self.raw) for g in groupings if isinstance(g, Grouping)]
        files = min(max(grouped, default=0), len(self.raw))
        n_partitions = max(1, -(-size * files // _PARTITION_BYTES))
        self.layout = Layout(folder, entry, len(self.raw), n_partitions)

    def record(self) -> None:
        """Writes plan.json, or checks that it is the same as the one of an earlier run.

        Raises:
            InputError: it isn't.
        """
        layout = self.layout
        plan = {
            "entry": json.loads(TypeAdapter(SourceEntry).dump_json(layout.entry)),
            "rules": [name for stage in self.stages for name, _ in step_names(stage)],
            "partitions": layout.n_partitions,
            "raw": [str(path) for path in self.raw],
        }
        data = read_many(layout.folder, ["plan.json"])["plan.json"]
        if data is None:
            write_file(layout.folder / "plan.json", json.dumps(plan, indent=1).encode() + b"\n")
            return
        before = json.loads(data)
        if before != plan:
            changed = [key for key in plan if before.get(key) != plan[key]]
            if "entry" in changed:
                old, new = before["entry"], plan["entry"]
                keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
                changed = [f"{key} (was {old.get(key)}, is {new.get(key)})" for key in keys]
            raise InputError(
                f"{layout.folder} was prepared with another plan: {', '.join(changed)} changed;"
                f" choose another --out, or remove {layout.folder} and {layout.work}"
            )

    def is_finished(self) -> bool:
        return self.finish_task().output.is_file()

    def group_tasks(self, stage: int) -> list[list[Task]]:
        """Returns the tasks of the grouping step with which a stage begins, one list after another.

        There are none if it begins with no such step.
        """
        if stage >= len(self.stages) or not (grouping := self.stages[stage].grouping):
            return []
        layout, n_files = self.layout, len(self.raw)
        if isinstance(grouping, NearDuplicates):
            parts = [layout.part(stage - 1, i, len(self.stages)) for i in range(n_files)]
            return near_duplicate_stages(grouping, parts, layout.near_duplicates(stage))
        n_groups = -(-n_files // (grouping.files or n_files))
        partitions = range(layout.n_partitions)
        return [[GroupTask(layout, stage, g, p) for g in range(n_groups) for p in partitions]]

    def part_tasks(self, stage: int) -> list[PartTask]:
        """Returns the tasks of the parts of a stage."""
        if stage >= len(self.stages):
            return []
        n = len(self.stages)
        parts = [self.layout.part(stage, index, n) for index in range(len(self.raw))]
        inputs = [self.layout.part(stage - 1, index, n) for index in range(len(self.raw))]
        inputs = inputs if stage else self.raw
        numbered = enumerate(zip(parts, inputs, strict=True))
        return [PartTask(self.layout, stage, i, output, source) for i, (output, source) in numbered]

    def finish_task(self) -> FinishTask:
        return FinishTask(self.layout, tuple(map(str, self.raw)))


def find_raw_files(entry: SourceEntry) -> list[AnyPath]:
    """Returns the files of a source's paths, folders and globs, sorted within each.

    The folder of a repository counts as a file, if its own path or a glob names it.

    Raises:
        InputError: one matches no file.
    """
    found: list[AnyPath] = []
    for text in entry.inputs:
        path = parse_path(text)
        if is_raw_folder(entry, path):
            files = [path]
        elif files := list_files(path):
            files = [file for file in files if not file.name.startswith(".")]
        elif isinstance(path, BucketPath):
            files = path.matches()
        else:
            paths = map(Path, glob.glob(text, recursive=True))
            files = [path for path in paths if path.is_file() or is_raw_folder(entry, path)]
        if not files:
            raise InputError(f"prepare: no files at {text!r}: name files, folders or globs")
        found += sorted(files)
    return list(dict.fromkeys(found))
