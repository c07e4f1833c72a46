"""Rules on single documents, and the funnel: what each rule removed."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from llama_jax.data.prepare.document import Document


class Rule(NamedTuple):
    """A pure function that keeps, changes or removes a document."""

    name: str  # unique within a source: 'at least five sentences'
    reference: str  # section of a paper, or URL
    apply: Callable[[Document], Document | None]  # None: removed


@dataclasses.dataclass
class RuleCount:
    """The documents that a rule received, removed and changed."""

    documents: int = 0
    characters: int = 0
    removed_documents: int = 0
    removed_characters: int = 0  # of removed documents and in changed ones; below 0: added
    changed_documents: int = 0

    def count(self, before: Document, after: Document | None) -> None:
        """Adds one document."""
        self.documents += 1
        self.characters += len(before.text)
        if after is None:
            self.removed_documents += 1
            self.removed_characters += len(before.text)
        elif after is not before and after.text != before.text:
            self.changed_documents += 1
            self.removed_characters += len(before.text) - len(after.text)


class Funnel:
    """The counts of each rule of a source, by name, in the order in which the rules apply."""

    def __init__(self) -> None:
        self.counts: dict[str, RuleCount] = {}

    def add(self, other: "Funnel") -> None:
        """Adds the counts of other documents, or of later rules."""
        for name, count in other.counts.items():
            total = self.counts.setdefault(name, RuleCount())
            for field in dataclasses.fields(RuleCount):
                value = getattr(total, field.name) + getattr(count, field.name)
                setattr(total, field.name, value)

    def as_json(self) -> dict[str, dict[str, int]]:
        """Returns the counts as a value for JSON."""
        return {name: dataclasses.asdict(count) for name, count in self.counts.items()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Funnel":
        """Returns the funnel of `as_json`."""
        funnel = cls()
        funnel.counts = {name: RuleCount(**count) for name, count in value.items()}
        return funnel


def apply_rules(
    rules: Sequence[Rule], documents: Iterable[Document], funnel: Funnel
) -> Iterator[Document]:
    """Yields the documents that remain after all rules, and counts what each rule removed."""
    counts = [funnel.counts.setdefault(rule.name, RuleCount()) for rule in rules]
    for document in documents:
        current: Document | None = document
        for rule, count in zip(rules, counts, strict=True):
            before, current = current, rule.apply(current)
            count.count(before, current)
            if current is None:
                break
        if current is not None:
            yield current
