"""Files in folders of this machine and in buckets, with one interface.

An object of a bucket appears complete or not at all. A folder of objects doesn't: its reader needs
a file that is written last.
"""

import errno
import os
import re
import shutil
import urllib.parse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from llama_jax.errors import InputError
from llama_jax.runtime.bucket_path import (
    BucketPath,
    await_request,
    bucket_spec,
    context,
    file_system,
)
from llama_jax.runtime.regular_file import open_regular, read_regular

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_SCHEMES = ("gs", "s3")


AnyPath = Path | BucketPath


def parse_path(path: "str | AnyPath") -> AnyPath:
    """Returns the path that a text names: in a bucket if it starts with `gs://` or `s3://`.

    Raises:
        InputError: it is a URL of another kind, or names no bucket.
    """
    if isinstance(path, BucketPath):
        return path
    path = str(path)  # pathlib removes a slash of a URL
    url = _URL.match(path)
    if not url:
        return Path(path)
    scheme, bucket, key = urllib.parse.urlsplit(path)[:3]
    if scheme not in _SCHEMES:
        raise InputError(
            f"{path}: URLs of {scheme}: are not supported; give a local path, gs://BUCKET/NAME or"
            " s3://BUCKET/NAME"
        )
    if not bucket:
        raise InputError(f"{path} names no bucket: write {scheme}://BUCKET/NAME")
    return BucketPath(scheme, bucket, key)


def check_path(path: str) -> str:
    """Returns `path` unchanged.

    Raises:
        InputError: as `parse_path`.
    """
    parse_path(path)
    return path


def kvstore_spec(path: AnyPath, *, folder: bool = True) -> dict[str, Any]:
    """Returns TensorStore's specification of a folder (or of one file), local or in a bucket."""
    end = "/" if folder else ""
    if isinstance(path, Path):
        # Without `..` in the path, which TensorStore refuses.
        return {"driver": "file", "path": f"{path.resolve()}{end}"}
    return {**bucket_spec(path.scheme, path.bucket), "path": f"{path.key}{end}"}


def open_file(path: AnyPath) -> IO[bytes]:
    """Opens a regular file, or an object of a bucket, for reading and seeking.

    Raises:
        InputError: the path is not a regular file; or the extra of this kind of bucket is missing.
        OSError: it can't be opened.
    """
    return path.open() if isinstance(path, BucketPath) else open_regular(path)


def file_size(path: AnyPath) -> int:
    """Returns the size of a file [bytes].

    Raises:
        InputError: the extra of this kind of bucket is missing.
        OSError: there is no such file.
    """
    if isinstance(path, Path):
        return path.stat().st_size
    with path.open() as file:
        return file.seek(0, os.SEEK_END)


def upload_file(source: Path, target: BucketPath) -> None:
    """Copies a file of any size into a bucket.

    Raises:
        InputError: the extra of this kind of bucket is missing.
    """
    file_system(target).put_file(str(source), str(target))


def read_file(path: AnyPath) -> bytes:
    """Returns the content of a small file.

    Raises:
        InputError: the path is not a regular file, or it is too large.
        OSError: it can't be read.
    """
    return path.read_bytes() if isinstance(path, BucketPath) else read_regular(path)


def write_file(path: AnyPath, data: bytes) -> None:
    """Creates or replaces a file, which appears complete and is durable when this returns.

    Raises:
        OSError: it can't be written.
    """
    write_many(path.parent, {path.name: data})


def write_many(folder: AnyPath, files: Mapping[str, bytes]) -> None:
    """Writes files by relative name, all concurrently, each as `write_file` does.

    Missing folders are created. When this returns or raises, no file is still being written.

    Raises:
        OSError: a file can't be written.
    """
    if isinstance(folder, BucketPath):
        writes = {n: folder._store.write((folder / n).key, data) for n, data in files.items()}
    else:
        import tensorstore as ts

        store = ts.KvStore.open(kvstore_spec(folder), context=context()).result()
        writes = {name: store.write(name, data) for name, data in files.items()}
    ended = {name: await_request(write, folder / name) for name, write in writes.items()}
    errors = {name: error for name, write in ended.items() if (error := write.exception())}
    for name, error in errors.items():
        raise _system_error(folder / name, error) from error


def _system_error(path: AnyPath, error: Exception) -> Exception:
    """Returns what the system would raise for an error of TensorStore."""
    if not isinstance(error, ValueError):
        return error
    if isinstance(path, BucketPath):
        return path.system_error(str(error))
    code = system_errno(error) or errno.EIO
    return OSError(code, os.strerror(code), str(path))


def system_errno(error: Exception) -> int | None:
    """Returns the errno in the text of an error of TensorStore on a local disk, or None."""
    number = re.search(r"\[os_error_code='(\d+)'\]", str(error))
    return int(number[1]) if number else None


def read_many(folder: AnyPath, names: Iterable[str]) -> dict[str, bytes | None]:
    """Returns the contents of files by relative name, None for each that is missing.

    Files in a bucket are read concurrently.

    Raises:
        OSError: a file can't be read.
    """
    found = dict[str, bytes | None]()
    if isinstance(folder, BucketPath):
        reads = {name: folder._store.read((folder / name).key) for name in names}
        for name, read in reads.items():
            result = folder._request(read)
            found[name] = result.value if result.state == "value" else None
        return found
    for name in names:
        try:
            found[name] = read_regular(folder / name)
        except (FileNotFoundError, NotADirectoryError):
            found[name] = None
    return found


def list_files(folder: AnyPath) -> list[AnyPath]:
    """Returns all files in a folder and its subfolders; in a bucket, from one listing."""
    if isinstance(folder, BucketPath):
        return [*folder.files()]
    return [path for path in folder.rglob("*") if path.is_file()]


def remove_tree(path: AnyPath) -> None:
    """Removes a folder or a file, if it exists."""
    if isinstance(path, BucketPath):
        keys = [path.key, *path._keys(f"{path.key}/")]
        for future in [path._store.write(key, None) for key in keys]:
            path._request(future)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
