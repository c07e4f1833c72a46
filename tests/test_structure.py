"""The house keeps its shape: imports point down, files stay readable."""

import ast
import re
from pathlib import Path

from conftest import ROOT

# From the ground up. A module imports from lower floors, or from its own.
FLOORS = [
    {"errors"},
    {"storage", "stop_signal", "atomic_write", "regular_file"},
    {"family", "chips", "config", "config_file", "folders", "sharding"},
    {"control_channel"},
    {"handshake"},
    {"hosts"},
    {"model", "data"},
    {"tree"},
    {"checkpoint_files"},
    {"checkpoint"},
    {"weights"},
    {"training", "inference", "evaluation", "convert"},
    {"plan", "info", "manual"},
    {"cli_inference"},
    {"cli"},
    {"__main__"},
]


def modules() -> list[Path]:
    return sorted(p for d in ("llama_jax", "convert") for p in (ROOT / d).rglob("*.py"))


def floor(name: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if name in names)


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "convert" and parts[1] != "__main__" else parts[1]


def imported(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llama_jax"):
            names = [node.module] if node.module != "llama_jax" else []
            names += [f"llama_jax.{a.name}" for a in node.names] if not names else []
            rooms |= {name.split(".")[1] for name in names}
    return {r for r in rooms if r != "__version__"}


def test_imports_point_down():
    for path in modules():
        here = room(path)
        if here == "__init__":
            continue
        for other in imported(path):
            same_room = other == here
            assert same_room or floor(other) <= floor(here), f"{path} imports {other}"
            beside = {"family", "config", "config_file", "sharding", "data", "model"}
            assert same_room or floor(other) < floor(here) or other in beside, (path, other)


def test_orbax_has_one_importer():
    users = {p.name for p in modules() if re.search(r"^(from|import) orbax", p.read_text(), re.M)}
    assert users == {"checkpoint.py"}


def test_mesh_axes_are_named_in_one_place():
    for path in modules():
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        if path.name != "sharding.py":
            assert not strings & {"fsdp", "tensor"}, path


def test_every_file_can_be_read_in_one_sitting():
    paths = [*modules(), *(p for d in ("tests", "benchmarks") for p in (ROOT / d).rglob("*.py"))]
    lengths = {p: len(p.read_text().splitlines()) for p in paths}
    assert {p: n for p, n in lengths.items() if n > 350} == {}


def named_in_readme() -> list[str]:
    """Returns the paths in the README's tree; `*` stands in them as it is written there."""
    text = (ROOT / "README.md").read_text()
    tree = text.split("## What is where\n\n```text\n")[1].split("```")[0]
    named, folders = [], []
    for indent, names in re.findall(r"^( {0,4})((?:[\w*]+(?:\.\w+|/) ?)+)", tree, re.M):
        folders = folders[: len(indent) // 2]
        named += ["".join(folders) + name for name in names.split()]
        if named[-1].endswith("/"):
            folders.append(names.strip())
    return named


def test_the_readme_says_what_is_where():
    named = named_in_readme()
    found = [p.relative_to(ROOT) for p in [*modules(), *(ROOT / "llama_jax").rglob("*.html")]]
    found = [path for path in found if not path.name.startswith("__")]
    assert len(named) > 60
    assert [name for name in named if not any(ROOT.glob(name))] == []
    files = [name for name in named if not name.endswith("/")]
    assert [str(path) for path in found if not any(map(path.match, files))] == []
