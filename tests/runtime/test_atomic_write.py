"""Folders and files appear complete or not at all, and leftovers of dead processes are removed."""

import contextlib
import errno
import os
import signal
import subprocess
import sys

import pytest

from llama_jax.errors import Fault, InputError
from llama_jax.runtime import atomic_write
from llama_jax.runtime.atomic_write import new_folder, replace_file

# Writes a folder and a file, prints so, and waits.
WRITER = """
import sys
from llama_jax.runtime.atomic_write import new_folder, replace_file
with new_folder(sys.argv[1]) as folder, replace_file(sys.argv[2]) as file:
    (folder / "half").write_text("half")
    file.write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writer(tmp_path):
    """A running process that is writing the folder `f` and the file `t`."""
    command = [sys.executable, "-c", WRITER, tmp_path / "f", tmp_path / "t"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        yield process
        process.kill()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(folder):
    write_folder(folder / "f")
    write_file(folder / "t")


def write_folder(path, error=None):
    """Writes a folder, and raises `error` when it is half-written."""
    with new_folder(path) as partial:
        (partial / "a").write_text("a")
        if error:
            raise error


def write_file(path, error=None):
    with replace_file(path) as partial:
        partial.write_text("new")
        if error:
            raise error


def test_a_folder_and_a_file_appear_complete_or_not_at_all(tmp_path):
    (tmp_path / "t").write_text("old")
    for half in (write_folder, write_file):
        with pytest.raises(KeyboardInterrupt):
            half(tmp_path / "t2", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "t", KeyboardInterrupt())
    assert names(tmp_path) == ["t"]
    assert (tmp_path / "t").read_text() == "old"
    write(tmp_path)
    assert names(tmp_path) == ["f", "t"]
    assert names(tmp_path / "f") == ["a"]
    assert (tmp_path / "t").read_text() == "new"
    with pytest.raises(InputError, match="f already exists: choose another name"):
        write(tmp_path)


def test_the_next_write_removes_only_the_leftovers_of_a_killed_process(tmp_path, writer):
    others = [".f.partial", ".f.partial-mine", ".ff.partial-01234567", "f.partial-01234567"]
    for name in others:
        (tmp_path / name).mkdir()
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert len(names(tmp_path)) == len(others) + 4  # two partials and two locks
    write(tmp_path)
    assert names(tmp_path) == sorted([*others, "f", "t"])


def test_the_files_of_a_running_writer_are_not_touched(tmp_path, writer):
    before = names(tmp_path)
    with pytest.raises(InputError, match=r"another process is writing .*f: wait for it"):
        write(tmp_path)
    assert names(tmp_path) == before
    writer.communicate()  # closes its standard input, and it finishes
    assert names(tmp_path) == ["f", "t"]
    assert (tmp_path / "t").read_text() == "half"


def test_without_locks_no_partial_of_another_process_is_removed(tmp_path, monkeypatch):
    (tmp_path / ".f.partial-01234567").mkdir()

    def no_locks(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(atomic_write.fcntl, "flock", no_locks)
    write(tmp_path)
    assert names(tmp_path) == [".f.partial-01234567", "f", "t"]
    with contextlib.ExitStack() as slower:
        slower.enter_context(pytest.raises(InputError, match="g already exists"))
        slower.enter_context(new_folder(tmp_path / "g"))
        write_folder(tmp_path / "g")
    assert names(tmp_path / "g") == ["a"]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "f: No space left on device"),
        (OSError("9 requested and 4 written"), "f: 9 requested and 4 written"),
        (ValueError("x [os_error_code='122'] y"), f"f: {os.strerror(122)}"),  # TensorStore's
    ],
)
def test_an_error_of_the_system_is_a_fault_with_its_text(tmp_path, error, sentence):
    with pytest.raises(Fault, match=f"^can't write {tmp_path}/{sentence}$"):
        write_folder(tmp_path / "f", error)
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError("a bug"), FileNotFoundError(2, "no", "/elsewhere")])
def test_other_errors_pass_unchanged(tmp_path, error):
    with pytest.raises(type(error)) as raised:
        write_folder(tmp_path / "f", error)
    assert raised.value is error
    assert names(tmp_path) == []


def test_an_impossible_path_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("here")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("file/x", "loop/x", "x" * 300):
        for write_it in (write_folder, write_file):
            with pytest.raises(InputError, match=r"can't write at .*x \(.*\): choose"):
                write_it(tmp_path / name)
    assert names(tmp_path) == ["file", "loop"]
