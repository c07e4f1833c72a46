"""The table of faults in docs/runs.md: its sentences are in the code, and its tests exist."""

import ast
import re

from conftest import ROOT


def read_table():
    """Yields the cells of each row: fault, sentence, what happens next, exit code, test."""
    page = (ROOT / "docs" / "runs.md").read_text()
    header = "| fault | the sentence | what happens next | exit code | test |\n"
    rows = page.partition(header)[2].partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]


def test_each_sentence_is_in_the_code_and_each_test_exists():
    texts = {
        node.value
        for path in (ROOT / "llama_jax").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    code = "\n".join(texts)
    rows = read_table()
    assert len(rows) >= 10
    for fault, sentence, _, _, test in rows:
        for part in filter(None, map(str.strip, re.split("…|[:;] |[()]", sentence))):
            assert part in code, f"{fault}: {part}"
        if test != "the same":
            path, _, name = test.partition("::")
            assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), test
