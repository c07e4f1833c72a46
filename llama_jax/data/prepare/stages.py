"""The tasks of preparing a source: read a raw file, find duplicates, filter a part, count.

The list of a source's rules is divided at its grouping steps into stages of rules. Stage 0 reads
raw files; a later stage reads the parts of the one before it, without the units that the grouping
step between them removes. Each stage writes a part per raw file, its funnel, and the keys of the
next grouping step. Every file is a pure function of the raw files and of the source's entry.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from llama_jax.config.prepare import SourceEntry
from llama_jax.data.prepare.document import Document, read_documents, replace_any_file, write_lines
from llama_jax.data.prepare.grouping import Grouping, remove_document
from llama_jax.data.prepare.kinds import read_raw, source_steps
from llama_jax.data.prepare.near_duplicates import NearDuplicates, read_duplicates
from llama_jax.data.prepare.rules import Funnel, Rule, RuleCount, apply_rules
from llama_jax.data.prepare.unit_files import (
    concatenate,
    partition_of,
    read_section,
    unit_records,
    write_sections,
)
from llama_jax.runtime.storage import AnyPath, read_file, write_file


class Stage(NamedTuple):
    """The grouping step (None in stage 0) and the rules of a stage."""

    grouping: Grouping | NearDuplicates | None
    rules: list[Rule]


def source_stages(entry: SourceEntry) -> list[Stage]:
    """Returns the stages of a source.

    Raises:
        InputError: a package or a file that a rule needs is missing.
    """
    stages = [Stage(None, [])]
    for step in source_steps(entry):
        if isinstance(step, Grouping | NearDuplicates):
            stages.append(Stage(step, []))
        else:
            stages[-1].rules.append(step)
    names = [name for stage in stages for name, _ in step_names(stage)]
    assert len({*names}) == len(names), f"two rules have one name: {names}"
    return stages


def step_names(stage: Stage) -> list[tuple[str, str]]:
    """Returns name and reference of the grouping step and the rules of a stage."""
    steps = [*([stage.grouping] if stage.grouping else []), *stage.rules]
    return [(step.name, step.reference) for step in steps]


@dataclass(frozen=True)
class Layout:
    """The files of a source, and how its parts are compared. All tasks of the source have it.

    Attributes:
        folder: receives the parts of the last stage, and funnel.json.
        entry: of the source.
        n_files: number of raw files.
        n_partitions: number of partitions of the keys of each group.
    """

    folder: AnyPath
    entry: SourceEntry
    n_files: int
    n_partitions: int

    @property
    def work(self) -> AnyPath:
        """The folder of the parts of all stages but the last, and of keys and counts."""
        return self.folder.with_name(f"{self.folder.name}.work")

    def part(self, stage: int, index: int, n_stages: int) -> AnyPath:
        """Returns the path of a part of a stage."""
        folder = self.folder if stage == n_stages - 1 else self.work / f"stage-{stage}"
        return folder / f"part-{index:05}.jsonl.zst"

    def side_file(self, stage: int, index: int, suffix: str) -> AnyPath:
        """Returns the path of the keys or the funnel of a part."""
        return self.work / f"stage-{stage}" / f"part-{index:05}.{suffix}"

    def removed(self, stage: int, group: int, partition: int) -> AnyPath:
        """Returns the path of the units that a partition of a grouping step removes."""
        return self.work / f"removed-{stage}" / f"group-{group:05}-{partition:05}"

    def near_duplicates(self, stage: int) -> AnyPath:
        """Returns the folder of the outputs of near-duplicates, with which a stage begins."""
        return self.work / f"near-duplicates-{stage}"

    def group_of(self, index: int, grouping: Grouping) -> tuple[int, range]:
        """Returns the number of a file's group, and the files of the group."""
        size = grouping.files or self.n_files
        group = index // size
        return group, range(group * size, min((group + 1) * size, self.n_files))


@dataclass(frozen=True)
class PartTask:
    """Applies the rules of a stage to a part, and counts what they remove.

    Attributes:
        layout: of the source.
        stage: number of the stage.
        index: number of the part.
        output: the part. Its keys and its funnel are written before it appears.
        input: the raw file, or the part of the stage before.
    """

    layout: Layout
    stage: int
    index: int
    output: AnyPath
    input: AnyPath

    def run(self) -> None:
        """Writes the part."""
        layout, stages, funnel = self.layout, source_stages(self.layout.entry), Funnel()
        stage = stages[self.stage]
        if stage.grouping is None:
            documents = read_raw(layout.entry, self.input)
        else:
            count = funnel.counts.setdefault(stage.grouping.name, RuleCount())
            if isinstance(stage.grouping, NearDuplicates):
                removed, remove = self._near_duplicates(), remove_document
            else:
                removed, remove = self._removed(stage.grouping), stage.grouping.remove
            documents = _without(read_documents(self.input), removed, remove, count)
        documents = apply_rules(stage.rules, documents, funnel)
        following = stages[self.stage + 1].grouping if self.stage + 1 < len(stages) else None
        keys = list[np.ndarray]()
        with replace_any_file(self.output) as partial:
            grouping = following if isinstance(following, Grouping) else None
            write_lines(partial, _collect_keys(documents, grouping, keys))
            if grouping:
                records, n = unit_records(keys), layout.n_partitions
                path = layout.side_file(self.stage, self.index, "keys")
                write_sections(path, records, partition_of(records, n), n)
            counts = json.dumps(funnel.as_json(), indent=1).encode()
            write_file(layout.side_file(self.stage, self.index, "json"), counts)

    def _removed(self, grouping: Grouping) -> np.ndarray:
        """Returns the records of the removed units of this part, in order."""
        layout = self.layout
        group, files = layout.group_of(self.index, grouping)
        paths = [layout.removed(self.stage, group, p) for p in range(layout.n_partitions)]
        records = concatenate([read_section(path, self.index - files[0]) for path in paths])
        return records[np.lexsort((records["unit"], records["document"]))]

    def _near_duplicates(self) -> np.ndarray:
        """Returns records of the near-duplicates of this part, in order; each is one unit."""
        rows = read_duplicates(self.layout.near_duplicates(self.stage), self.index)
        records = unit_records([np.zeros((1, 1), np.uint64)] * len(rows))
        records["document"] = rows
        return records


def _collect_keys(
    documents: Iterable[Document], grouping: Grouping | None, keys: list[np.ndarray]
) -> Iterator[Document]:
    """Yields the documents, and appends the keys of their units."""
    for document in documents:
        if grouping:
            keys.append(grouping.keys(document))
        yield document


def _without(
    documents: Iterable[Document],
    removed: np.ndarray,
    remove: Callable[[Document, np.ndarray], Document | None],
    count: RuleCount,
) -> Iterator[Document]:
    """Yields what remains of the documents without the removed units."""
    for number, before in enumerate(documents):
        start, end = np.searchsorted(removed["document"], (number, number + 1))
        units = removed["unit"][start:end]
        after = remove(before, units) if len(units) else before
        count.count(before, after)
        if after is not None:
            yield after


@dataclass(frozen=True)
class GroupTask:
    """Finds the units that a grouping step removes, in one partition of the keys of one group.

    Attributes:
        layout: of the source.
        stage: number of the stage that begins with the step.
        group: number of the group of files.
        partition: number of the partition.
    """

    layout: Layout
    stage: int
    group: int
    partition: int

    @property
    def output(self) -> AnyPath:
        """The records of the removed units, in a section per file of the group."""
        return self.layout.removed(self.stage, self.group, self.partition)

    def run(self) -> None:
        """Writes the output."""
        layout = self.layout
        grouping = source_stages(layout.entry)[self.stage].grouping
        assert isinstance(grouping, Grouping)
        size = grouping.files or layout.n_files
        _, files = layout.group_of(self.group * size, grouping)
        paths = [layout.side_file(self.stage - 1, index, "keys") for index in files]
        sections = [read_section(path, self.partition) for path in paths]
        records = concatenate(sections)
        file = np.repeat(np.arange(len(files)), [len(section) for section in sections])
        removed = grouping.find(records["key"])
        write_sections(self.output, records[removed], file[removed], len(files))


@dataclass(frozen=True)
class FinishTask:
    """Adds the funnels of all parts in the order of the raw files.

    Attributes:
        layout: of the source.
        raw: the raw files.
    """

    layout: Layout
    raw: tuple[str, ...]

    @property
    def output(self) -> AnyPath:
        """The file that makes a source complete."""
        return self.layout.folder / "funnel.json"

    def run(self) -> None:
        """Writes the output."""
        layout, rows = self.layout, list[dict[str, Any]]()
        for number, stage in enumerate(source_stages(layout.entry)):
            funnel = Funnel()
            for index in range(layout.n_files):
                path = layout.side_file(number, index, "json")
                funnel.add(Funnel.from_json(json.loads(read_file(path))))
            for name, reference in step_names(stage):
                counts = asdict(funnel.counts[name])
                rows.append({"rule": name, "reference": reference, **counts})
            if isinstance(stage.grouping, Grouping) and stage.grouping.report:
                row = next(row for row in rows if row["rule"] == stage.grouping.name)
                row["report"] = self._report(number, stage.grouping)
        last = rows[-1]
        content = {
            "entry": json.loads(TypeAdapter(SourceEntry).dump_json(layout.entry)),
            "files": len(self.raw),
            "documents": last["documents"] - last["removed_documents"],
            "characters": last["characters"] - last["removed_characters"],
            "rules": rows,
        }
        write_file(self.output, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")

    def _report(self, stage: int, grouping: Grouping) -> Any:
        """Returns a grouping step's own report about the units that it removes."""
        layout = self.layout
        keys, documents = list[np.ndarray](), list[np.ndarray]()
        for index in range(layout.n_files):
            group, files = layout.group_of(index, grouping)
            for partition in range(layout.n_partitions):
                path = layout.removed(stage, group, partition)
                records = read_section(path, index - files[0])
                keys.append(records["key"])
                documents.append((index << 32) + records["document"].astype(np.int64))
        filled = [array for array in keys if len(array)] or [np.empty((0, 1), np.uint64)]
        assert grouping.report is not None
        return grouping.report(np.concatenate(filled), np.concatenate(documents))
