"""Only regular files of a bounded size are opened."""

import os
import socket

import pytest

from llama_jax.errors import InputError
from llama_jax.runtime.regular_file import (
    MAX_BYTES,
    check_regular_files,
    open_regular,
    read_regular,
)


@pytest.fixture
def kinds(tmp_path, monkeypatch):
    """A folder with one entry of each kind, named as in the error message."""
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    (tmp_path / "a directory").mkdir()
    os.mkfifo(tmp_path / "a pipe")
    (tmp_path / "a device").symlink_to("/dev/zero")
    return tmp_path


def test_only_regular_files_are_opened(kinds):
    for path in kinds.iterdir():
        for read in (open_regular, read_regular):
            with pytest.raises(InputError, match=f"{path} is {path.name}, not a regular file: giv"):
                read(path)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
        with pytest.raises(OSError, match="socket"):
            open_regular(kinds / "socket")
    with pytest.raises(FileNotFoundError):
        open_regular(kinds / "none")


def test_links_to_regular_files_are_followed(tmp_path):
    """As in Hugging Face's cache."""
    (tmp_path / "blob").write_bytes(b"here")
    (tmp_path / "first").symlink_to("blob")
    (tmp_path / "second").symlink_to(tmp_path / "first")
    with open_regular(tmp_path / "second") as file:
        assert file.read() == read_regular(tmp_path / "first") == b"here"


def test_a_file_that_is_read_at_once_has_a_size_limit(tmp_path):
    with open(tmp_path / "large", "wb") as file:
        file.truncate(256 << 30)  # a hole: it takes no space
    with pytest.raises(InputError, match=f"has more than {MAX_BYTES >> 20} MiB, too many"):
        read_regular(tmp_path / "large")


def test_a_folder_for_a_library_may_contain_only_regular_files_of_a_bounded_size(kinds):
    folder = kinds / "a directory"
    (folder / "deep").mkdir()
    (folder / "deep/file").write_bytes(b"here")
    (folder / "deep/link").symlink_to("file")
    (folder / "deep/nowhere").symlink_to("none")
    check_regular_files(folder)
    os.truncate(folder / "deep/file", 256 << 30)
    with pytest.raises(InputError, match="has 274,877,906,944 bytes, too many for a part of a mod"):
        check_regular_files(folder)
    os.truncate(folder / "deep/file", 0)
    (folder / "deep/zero").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="deep/zero is a device, not a regular file"):
        check_regular_files(folder)
