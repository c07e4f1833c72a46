"""The paper's tables beside the measured results, as text and as a picture."""

import re

import pytest
from conftest import SHARED

from llama_jax.errors import InputError
from llama_jax.evaluation.figure import check_columns, draw_tables
from llama_jax.evaluation.paper_tables import TABLES, format_table, tables_of

RESULTS = {
    "piqa": {"acc": 0.7, "acc_norm": 0.6875},
    "paper_boolq": {"acc_relative": 0.5},
    "race_high": {"acc_norm": 0.25},
    "lambada": {"acc": 0.9},
}


def test_ones_own_row_stands_below_the_papers():
    assert tables_of(RESULTS) == ["common-sense", "reading"]
    lines = format_table("common-sense", RESULTS, "mine").splitlines()
    assert lines[0].startswith("Table 3")
    assert lines[1].split() == [
        "BoolQ", "PIQA", "SIQA", "HellaSwag", "WinoGrande", "ARC-e", "ARC-c", "OBQA",
    ]  # fmt: skip
    assert lines[8].split() == [
        "LLaMA",
        "7B",
        *["76.5", "79.8", "48.9", "76.1", "70.1", "72.8", "47.6", "57.2"],
    ]
    assert lines[12].split() == ["mine", "50.0", "68.8", *"------"]
    assert len({len(line) for line in lines[1:13]}) == 1
    assert all(line.startswith("* ") for line in lines[13:])


def test_each_row_has_a_value_for_each_column():
    for name, table in TABLES.items():
        assert {len(row) for row in table.rows.values()} == {len(table.columns)}, name
        sizes = [f"LLaMA {size}" for size in ("7B", "13B", "33B", "65B")]
        assert list(table.rows)[-4:] == sizes, name


def test_the_published_values_are_those_of_the_facts():
    facts = SHARED / "facts" / "paper_results.md"
    if not facts.is_file():
        pytest.skip("needs ../shared/facts/paper_results.md, which is missing")
    numbers = set(re.findall(r"\d+\.\d", facts.read_text()))
    for table in TABLES.values():
        for model, row in table.rows.items():
            assert {f"{value:.1f}" for value in row if value is not None} <= numbers, model
    text = facts.read_text()
    for model, row in TABLES["common-sense"].rows.items():
        cells = " | ".join("-" if value is None else f"{value:.1f}" for value in row)
        assert f"| {model} | {cells} |" in text
    for model, row in TABLES["mmlu"].rows.items():
        assert re.search(rf"{model.split()[-1]}B? {', '.join(f'{v:.1f}' for v in row)}", text)


def test_measured_columns_are_drawn(tmp_path):
    picture = tmp_path / "tables.svg"
    check_columns(["lambada", "race_high"])
    draw_tables(picture, RESULTS, "my model")
    assert picture.read_text().count("<svg") == 1
    draw_tables(tmp_path / "tables.png", RESULTS, "my model")
    assert (tmp_path / "tables.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="--picture draws the paper's tables: add one of them"):
        check_columns(["lambada"])
