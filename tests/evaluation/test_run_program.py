"""Programs that a model wrote: what passes, and what the kernel refuses them."""

import os
import platform

import pytest

from llama_jax.errors import InputError
from llama_jax.evaluation import run_program
from llama_jax.evaluation.code_tasks import check_humaneval, check_mbpp
from llama_jax.evaluation.run_program import passes

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the filter is for x86-64")

REFUSED = {
    "a socket": "import socket; socket.socket()",
    "a local socket": "import socket; socket.socket(socket.AF_UNIX)",
    "a file for writing": "open(FOLDER + '/new', 'w')",
    "a file for appending": "open(FOLDER + '/old', 'a')",
    "removing a file": "import os; os.remove(FOLDER + '/old')",
    "renaming a file": "import os; os.rename(FOLDER + '/old', FOLDER + '/new')",
    "a folder": "import os; os.mkdir(FOLDER + '/new')",
    "changing a mode": "import os; os.chmod(FOLDER + '/old', 0)",
    "a process": "import os; os.fork()",
    "a program": "import os; os.execv('/bin/true', ['true'])",
    "a signal": "import os; os.kill(os.getppid(), 0)",
}


def test_each_access_is_refused_by_the_kernel(tmp_path):
    (tmp_path / "old").write_text("old")
    checks = "\n".join(
        f"try:\n    {code}\nexcept PermissionError: pass\nelse: raise SystemExit({name!r})"
        for name, code in REFUSED.items()
    )
    program = f"FOLDER = {str(tmp_path)!r}\n{checks}\n"
    assert passes(program)
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "old"


@pytest.mark.parametrize(
    ("program", "right"),
    [
        ("import threading, math\nt = threading.Thread(target=print)\nt.start(); t.join()", True),
        ("print('to no one'); assert len(open('/proc/self/status').read()) > 9", True),
        ("assert 1 + 1 == 3", False),
        ("syntax error", False),
        ("import sys; sys.exit(0)", False),  # does not reach its tests
        ("import os; os._exit(0)", False),
        ("bytearray(8 << 30)", False),
    ],
)
def test_a_program_passes_if_it_reaches_its_end(program, right):
    assert passes(program) is right


def test_a_program_has_limited_time(monkeypatch):
    monkeypatch.setattr(run_program, "_WALL_SECONDS", 0.5)
    assert not passes("while True: pass")


def test_a_machine_that_can_not_isolate_a_process_runs_nothing(monkeypatch):
    monkeypatch.setattr(run_program, "NO_FILTER", 1)  # the exit code of any exception
    with pytest.raises(InputError, match="this machine can't run programs without network"):
        passes("assert 0")


def test_answers_become_programs_with_the_tests_of_their_problem():
    test = "def check(f):\n    assert f(1, 2) == 3"
    problem = {"prompt": "def add(a, b):\n", "test": test, "entry_point": "add"}
    assert check_humaneval(problem, ["    return a + b\n"]) == {"pass@1": 1}
    assert check_humaneval(problem, ["    return a - b\n"]) == {"pass@1": 0}
    problem = {"test_setup_code": "one = 1", "test_list": ["assert add(one, 2) == 3"]}
    assert check_mbpp(problem, ["def add(a, b): return a + b"]) == {"pass@1": 1}
    assert check_mbpp(problem, ["def add(a, b): return 0"]) == {"pass@1": 0}
