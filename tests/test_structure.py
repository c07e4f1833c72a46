"""The house keeps its shape: imports point down, files stay readable."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

from conftest import ROOT

# From the bottom to the top. A folder imports from the layers below it.
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
    """Returns the modules of ours that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llama_jax."):
            for alias in node.names:
                module = ROOT / f"{node.module}.{alias.name}".replace(".", "/")
                is_module = module.with_suffix(".py").is_file()
                names.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return names


def test_imports_point_down():
    layer = {name: i for i, names in enumerate(LAYERS) for name in names}
    upward = [
        (str(path.relative_to(ROOT)), module)
        for path in modules()
        if folder(path) != "__init__"
        for module in imported(path)
        if (other := module.split(".")[1]) != folder(path) and layer[other] >= layer[folder(path)]
    ]
    assert upward == []


def test_no_module_imports_itself_through_others():
    graph = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): imported(path) for path in modules()
    }
    TopologicalSorter(graph).prepare()  # raises a CycleError that names the cycle


def test_orbax_has_one_importer():
    users = {p.name for p in modules() if re.search(r"^(from|import) orbax", p.read_text(), re.M)}
    assert users == {"orbax.py"}


def test_mesh_axes_are_named_in_one_place():
    for path in modules():
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        if path.parent.name != "parallel":
            assert not strings & {"fsdp", "tensor"}, path


def test_every_file_can_be_read_in_one_sitting():
    paths = [*modules(), *(p for d in ("tests", "benchmarks") for p in (ROOT / d).rglob("*.py"))]
    lengths = {p: len(p.read_text().splitlines()) for p in paths}
    assert {p: n for p, n in lengths.items() if n > 350} == {}


def test_the_readme_names_every_folder():
    text = (ROOT / "README.md").read_text()
    tree = text.split("## Files\n\n```text\n")[1].split("```")[0]
    named, parents = set(), []
    for indent, name in re.findall(r"^( *)(\w+)/ ", tree.replace("/\n", "/ \n"), re.M):
        parents = [*parents[: len(indent) // 2], name]
        named.add("/".join(parents))
    packages = {str(path.parent.relative_to(ROOT)) for path in modules() if path.stem == "__init__"}
    assert named == packages | {"convert", "configs", "benchmarks", "docs", "tests"}
