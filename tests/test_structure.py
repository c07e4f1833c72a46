"""The structure of the package: imports point downwards, files are short, names are field terms."""

import ast
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

# From bottom to top. A folder may import only from the layers below it.
LAYERS = [
    {"errors"},
    {"runtime"},
    {"config"},
    {"parallel", "tokenizer"},
    {"model", "data"},
    {"checkpoint"},
    {"training", "inference"},
    {"evaluation", "plan", "convert", "serving"},
    {"cli"},
    {"__main__"},
]


def modules() -> list[Path]:
    return sorted((ROOT / "llama_jax").rglob("*.py"))


def folder(path: Path) -> str:
    return path.relative_to(ROOT / "llama_jax").with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """Returns the modules of llama_jax that a file imports, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llama_jax."):
            for alias in node.names:
                module = ROOT / f"{node.module}.{alias.name}".replace(".", "/")
                is_module = module.with_suffix(".py").is_file()
                names.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return names


def test_imports_point_downwards():
    layer = {name: i for i, names in enumerate(LAYERS) for name in names}
    upward = [
        (str(path.relative_to(ROOT)), module)
        for path in modules()
        if folder(path) != "__init__"
        for module in imported(path)
        if (other := module.split(".")[1]) != folder(path) and layer[other] >= layer[folder(path)]
    ]
    assert upward == []


def test_there_are_no_import_cycles():
    graph = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): imported(path) for path in modules()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_no_module_imports_orbax():
    users = {p.name for p in modules() if re.search(r"^(from|import) orbax", p.read_text(), re.M)}
    assert not users  # tests check that Orbax reads our checkpoints


def test_only_the_parallel_folder_names_the_mesh_axes():
    for path in modules():
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        if path.parent.name != "parallel":
            assert not strings & {"fsdp", "tensor"}, path


def test_no_file_is_longer_than_350_lines():
    paths = [*modules(), *(p for d in ("tests", "benchmarks") for p in (ROOT / d).rglob("*.py"))]
    lengths = {p: len(p.read_text().splitlines()) for p in paths}
    assert {p: n for p, n in lengths.items() if n > 350} == {}


# Each has a field term: cached or saved, reported, transposed, complete, metadata, generated, plan.
PRIVATE_WORDS = {"kept", "told", "turned", "whole", "said", "made", "foretell"}


def identifiers(path: Path) -> set[str]:
    """Returns the names that a file defines or uses: functions, classes, arguments, variables."""
    return {
        name
        for node in ast.walk(ast.parse(path.read_text()))
        for field in ("id", "attr", "name", "asname", "arg")
        if isinstance(name := getattr(node, field, None), str)
    }


def test_no_identifier_is_a_private_word():
    assert identifiers(Path(__file__)) >= {"PRIVATE_WORDS", "identifiers", "path", "walk"}
    found = {
        str(path.relative_to(ROOT)): words
        for path in modules()
        if (words := {name.strip("_").lower() for name in identifiers(path)} & PRIVATE_WORDS)
    }
    assert found == {}


BENCHMARKS = sorted(
    path.name
    for path in (ROOT / "benchmarks").glob("*.py")
    if 'if __name__ == "__main__":' in path.read_text() and path.name != "__main__.py"
)


@pytest.mark.parametrize("call", ["-m benchmarks", *(f"benchmarks/{name}" for name in BENCHMARKS)])
def test_each_benchmark_starts_and_describes_its_options(call):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    argv = [sys.executable, *call.split(), "--help"]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


def test_the_readme_lists_every_folder():
    text = (ROOT / "README.md").read_text()
    tree = text.split("## Files\n\n```text\n")[1].split("```")[0]
    named, parents = set(), []
    for indent, name in re.findall(r"^( *)(\w+)/ ", tree.replace("/\n", "/ \n"), re.M):
        parents = [*parents[: len(indent) // 2], name]
        named.add("/".join(parents))
    packages = {str(path.parent.relative_to(ROOT)) for path in modules() if path.stem == "__init__"}
    assert named == packages | {"convert", "configs", "benchmarks", "docs", "tests"}
