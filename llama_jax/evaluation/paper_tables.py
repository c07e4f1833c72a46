"""The result tables of the LLaMA paper (arXiv 2302.13971, section 3) beside the measured results.

    results = metrics_of(evaluation.results)
    for name in tables_of(results):
        print(format_table(name, results, "my model"))

All numbers in a table are percent. The published ones were read from the paper.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

Metrics = Mapping[str, Mapping[str, float]]  # by task or group: fraction by metric

CLOSED_BOOK_SHOTS = (0, 1, 5, 64)

Row = tuple[float | None, ...]


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        label: its heading.
        task: name of the task or group that measures it.
        metric: name of its metric; of a metric of a filter, 'METRIC,FILTER'.
    """

    label: str
    task: str
    metric: str


class Table(NamedTuple):
    """A table of the paper.

    Attributes:
        title: its number and subject.
        columns: what is measured.
        rows: the published values by model [percent], in the order of the columns; None: not given.
        differences: how the tasks here differ from the paper's description; one sentence each.
    """

    title: str
    columns: tuple[Column, ...]
    rows: Mapping[str, Row]
    differences: tuple[str, ...]

    @property
    def tasks(self) -> list[str]:
        """The tasks to load; the group `mmlu` contains those of its categories."""
        tasks = dict.fromkeys(column.task for column in self.columns)
        return ["mmlu"] if "mmlu" in tasks else list(tasks)


_PROMPTS = "The paper does not print its prompts: these are lm-eval's."

TABLES: dict[str, Table] = {
    "common-sense": Table(
        "Table 3: zero-shot common sense, accuracy",
        (
            Column("BoolQ", "paper_boolq", "acc_relative"),
            Column("PIQA", "piqa", "acc_norm"),
            Column("SIQA", "social_iqa", "acc_norm"),
            Column("HellaSwag", "hellaswag", "acc_norm"),
            Column("WinoGrande", "winogrande", "acc"),
            Column("ARC-e", "arc_easy", "acc_norm"),
            Column("ARC-c", "arc_challenge", "acc_norm"),
            Column("OBQA", "paper_openbookqa", "acc_relative"),
        ),
        {
            "GPT-3 175B": (60.5, 81.0, None, 78.9, 70.2, 68.8, 51.4, 57.6),
            "Gopher 280B": (79.3, 81.8, 50.6, 79.2, 70.1, None, None, None),
            "Chinchilla 70B": (83.7, 81.8, 51.3, 80.8, 74.9, None, None, None),
            "PaLM 62B": (84.8, 80.5, None, 79.7, 77.0, 75.2, 52.5, 50.4),
            "PaLM-cont 62B": (83.9, 81.4, None, 80.6, 77.0, None, None, None),
            "PaLM 540B": (88.0, 82.3, None, 83.4, 81.1, 76.6, 53.0, 53.4),
            "LLaMA 7B": (76.5, 79.8, 48.9, 76.1, 70.1, 72.8, 47.6, 57.2),
            "LLaMA 13B": (78.1, 80.1, 50.4, 79.2, 73.0, 74.8, 52.7, 56.4),
            "LLaMA 33B": (83.1, 82.3, 50.4, 82.8, 76.0, 80.0, 57.8, 58.6),
            "LLaMA 65B": (85.3, 82.8, 52.3, 84.2, 77.0, 78.9, 56.0, 60.2),
        },
        (
            _PROMPTS,
            "WinoGrande scores one ending after two beginnings: there is nothing to normalize.",
            "The model card of the release gives ARC-e 76.7, 78.1, 81.4 and 81.5 for 7B to 65B.",
        ),
    ),
    "closed-book": Table(
        "Tables 4 and 5: closed-book questions, exact match",
        tuple(
            Column(f"{label} {shots}", f"{task}_{shots}shot", "exact_match,remove_whitespace")
            for label, task in (("NQ", "paper_nq_open"), ("TriviaQA", "paper_triviaqa"))
            for shots in CLOSED_BOOK_SHOTS
        ),
        {
            "GPT-3 175B": (14.6, 23.0, None, 29.9, None, None, None, None),
            "Gopher 280B": (10.1, None, 24.5, 28.2, 43.5, None, 57.0, 57.2),
            "Chinchilla 70B": (16.6, None, 31.5, 35.5, 55.4, None, 64.1, 64.6),
            "PaLM 8B": (8.4, 10.6, None, 14.6, None, None, None, None),
            "PaLM 62B": (18.1, 26.5, None, 27.6, None, None, None, None),
            "PaLM 540B": (21.2, 29.3, None, 39.6, None, None, None, None),
            "LLaMA 7B": (16.8, 18.7, 22.0, 26.1, 50.0, 53.4, 56.3, 57.6),
            "LLaMA 13B": (20.1, 23.4, 28.1, 31.9, 56.6, 60.5, 63.1, 64.0),
            "LLaMA 33B": (24.9, 28.3, 32.9, 36.0, 65.1, 67.9, 69.9, 70.4),
            "LLaMA 65B": (23.8, 31.0, 35.0, 39.9, 68.2, 71.6, 72.6, 73.0),
        },
        (
            "An answer ends at its first line break, dot or comma, so that an answer with a dot in"
            " it ('J. K. Rowling') is cut.",
            "The examples are drawn for each question from the training split with lm-eval's seed;"
            " the paper's are not published.",
            "NaturalQuestions here is the open set of 3,610 questions (Lee et al. 2019).",
        ),
    ),
    "reading": Table(
        "Table 6: RACE, zero-shot, accuracy",
        (
            Column("RACE-middle", "race_middle", "acc_norm"),
            Column("RACE-high", "race_high", "acc_norm"),
        ),
        {
            "GPT-3 175B": (58.4, 45.5),
            "PaLM 8B": (57.9, 42.3),
            "PaLM 62B": (64.3, 47.5),
            "PaLM 540B": (68.1, 49.1),
            "LLaMA 7B": (61.1, 46.9),
            "LLaMA 13B": (61.6, 47.2),
            "LLaMA 33B": (64.1, 48.3),
            "LLaMA 65B": (67.9, 51.6),
        },
        ("The paper does not print its prompts: these are ours, one question of an article each.",),
    ),
    "math": Table(
        "Table 7: mathematics, exact match of one answer, and of the majority of k (maj1@k)",
        (
            Column("MATH", "minerva_math", "exact_match"),
            Column("maj1@256", "minerva_math", "maj1@256"),
            Column("GSM8K", "paper_gsm8k", "exact_match,strict-match"),
            Column("maj1@100", "paper_gsm8k", "maj1@100,strict-match"),
        ),
        {
            "PaLM 8B": (1.5, None, 4.1, None),
            "PaLM 62B": (4.4, None, 33.0, None),
            "PaLM 540B": (8.8, None, 56.5, None),
            "Minerva 8B": (14.1, 25.4, 16.2, 28.4),
            "Minerva 62B": (27.6, 43.4, 52.4, 68.5),
            "Minerva 540B": (33.6, 50.3, 68.5, 78.5),
            "LLaMA 7B": (2.9, 6.9, 11.0, 18.1),
            "LLaMA 13B": (3.9, 8.8, 17.8, 29.3),
            "LLaMA 33B": (7.1, 15.2, 35.6, 53.1),
            "LLaMA 65B": (10.6, 20.5, 50.9, 69.7),
        },
        (
            "The prompts are Minerva's: four examples for MATH, eight (Wei et al. 2022) for GSM8K.",
            "maj1@k needs --samples k. Answers without a final answer vote as one answer.",
            "Minerva 540B has k = 64 for MATH and 40 for GSM8K.",
        ),
    ),
    "code": Table(
        "Table 8: code, pass@k",
        (
            Column("HumanEval @1", "humaneval", "pass@1"),
            Column("@100", "humaneval", "pass@100"),
            Column("MBPP @1", "mbpp", "pass@1"),
            Column("@80", "mbpp", "pass@80"),
        ),
        {
            "LaMDA 137B": (14.0, 47.3, 14.8, 62.4),
            "PaLM 8B": (3.6, 18.7, 5.0, 35.7),
            "PaLM 62B": (15.9, 46.3, 21.4, 63.2),
            "PaLM-cont 62B": (23.7, None, 31.2, None),
            "PaLM 540B": (26.2, 76.2, 36.8, 75.0),
            "LLaMA 7B": (10.5, 36.5, 17.7, 56.2),
            "LLaMA 13B": (15.8, 52.5, 22.0, 64.0),
            "LLaMA 33B": (21.7, 70.7, 30.2, 73.4),
            "LLaMA 65B": (23.7, 79.3, 37.7, 76.8),
        },
        (
            "pass@k needs --samples. The paper's pass@1 is at temperature 0.1, the others are at"
            " 0.8; without --samples, pass@1 is that of one greedy program.",
            "Of PaLM 8B and PaLM 62B all values but 15.9 and 21.4 were read from a figure.",
        ),
    ),
    "mmlu": Table(
        "Table 9: MMLU, five-shot, accuracy",
        (
            Column("humanities", "mmlu_humanities", "acc"),
            Column("STEM", "mmlu_stem", "acc"),
            Column("social", "mmlu_social_sciences", "acc"),
            Column("other", "mmlu_other", "acc"),
            Column("average", "mmlu", "acc"),
        ),
        {
            "GPT-NeoX 20B": (29.8, 34.9, 33.7, 37.7, 33.6),
            "GPT-3 175B": (40.8, 36.7, 50.4, 48.8, 43.9),
            "Gopher 280B": (56.2, 47.4, 71.9, 66.1, 60.0),
            "Chinchilla 70B": (63.6, 54.9, 79.3, 73.9, 67.5),
            "PaLM 8B": (25.6, 23.8, 24.1, 27.8, 25.4),
            "PaLM 62B": (59.5, 41.9, 62.7, 55.8, 53.7),
            "PaLM 540B": (77.0, 55.6, 81.0, 69.6, 69.3),
            "LLaMA 7B": (34.0, 30.5, 38.3, 38.1, 35.1),
            "LLaMA 13B": (45.0, 35.8, 53.8, 53.3, 46.9),
            "LLaMA 33B": (55.8, 46.0, 66.7, 63.4, 57.8),
            "LLaMA 65B": (61.8, 51.7, 72.9, 67.4, 63.4),
        },
        ("Each question of a category weighs the same, whatever its subject.",),
    ),
}


def own_row(table: Table, results: Metrics) -> Row:
    """Returns the measured values in the columns of a table [percent]; None: not measured."""
    values = (results.get(c.task, {}).get(c.metric) for c in table.columns)
    return tuple(None if value is None else 100 * value for value in values)


def metrics_of(results: Mapping[str, Any]) -> Metrics:
    """Returns the value of each metric in the `results` of an `Evaluation`."""
    return {
        name: {metric: measured["value"] for metric, measured in part["metrics"].items()}
        for name, part in {**results["tasks"], **results["groups"]}.items()
    }


def tables_of(results: Metrics) -> list[str]:
    """Returns the names of the tables of which at least one column was measured."""
    return [name for name, t in TABLES.items() if any(v is not None for v in own_row(t, results))]


def format_table(name: str, results: Metrics, model: str) -> str:
    """Returns a table of the paper with the measured row below it, and the differences.

    Args:
        name: a key of `TABLES`.
        results: of `metrics_of`.
        model: heading of the measured row.
    """
    table = TABLES[name]
    rows = {**table.rows, model: own_row(table, results)}
    cells = [["", *(c.label for c in table.columns)]]
    cells += [[m, *("-" if v is None else f"{v:.1f}" for v in row)] for m, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in cells
    ]
    return "\n".join([table.title, *lines, *(f"* {text}" for text in table.differences)])
