"""Folders that only this user can write to, for files whose content is trusted."""

import os
import stat
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def open_private_folder(path: Path) -> Path:
    """Returns a folder that only this user can change, and creates it.

    The rules are those of ssh for its keys: the folder and each folder above it belongs to this
    user or to root, and nobody else can write to it, except to folders with the sticky bit, such as
    /tmp. The folder itself belongs to this user.

    Raises:
        PermissionError: others could change it.
        OSError: it can't be created.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = path.resolve(strict=True)
    if path.stat().st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to another user")
    for folder in (path, *path.parents):
        if not _is_protected(folder, may_be_sticky=folder != path):
            raise PermissionError(f"others can change {folder}: let only its owner write to it")
    return path


def read_private(path: Path) -> bytes | None:
    """Returns the content of a regular file of this user; None if there is no such file."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with open(file, "rb") as opened:
        status = os.fstat(file)
        private = status.st_uid == os.geteuid() and not status.st_mode & _OTHERS_WRITE
        return opened.read() if private and stat.S_ISREG(status.st_mode) else None


def _is_protected(folder: Path, may_be_sticky: bool) -> bool:
    status = folder.stat()
    sticky = may_be_sticky and status.st_mode & stat.S_ISVTX
    return status.st_uid in (0, os.geteuid()) and bool(sticky or not status.st_mode & _OTHERS_WRITE)
