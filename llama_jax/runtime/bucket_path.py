"""A path in a bucket (`gs://`, `s3://`), with the part of pathlib.Path's interface in use here.

TensorStore reads and writes objects, with its retries and the credentials that the tools of Google
and AWS use.
"""

import errno
import fnmatch
import os
import re
import sys
import time
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import PurePosixPath
from typing import IO, Any

from llama_jax.errors import InputError, missing_extra

# A request is repeated after 0.2, 0.4 … 30 s, for two minutes in total: longer than the rate limits
# and restarts of a store last.
_RETRIES = {"max_retries": 10, "initial_delay": "200ms", "max_delay": "30s"}
# TensorStore sets no time limit: a request whose connection broke silently waits for half an hour
# (google/tensorstore#291). With these variables it fails, and is repeated, after half a minute in
# which less than a byte a second arrives or leaves.
_STALLED = {
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "30",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}
# A request that waits for longer is reported, at most once a minute for each bucket.
REPORT_SECONDS = 20.0
_reported: dict[str, float] = {}


def await_request(future: Any, where: Any) -> Any:
    """Waits until a request of TensorStore has ended, and returns it; reports a slow bucket.

    Args:
        future: of TensorStore.
        where: path of the object; a path of this machine is not reported.
    """
    try:
        future.exception(timeout=REPORT_SECONDS if isinstance(where, BucketPath) else None)
    except TimeoutError:
        now, bucket = time.monotonic(), f"{where.scheme}://{where.bucket}"
        if now - _reported.get(bucket, -60.0) >= 60.0:
            _reported[bucket] = now
            print(
                f"warning: {bucket} has not completed a request for {where} for"
                f" {REPORT_SECONDS:.0f} s: a request that fails is repeated for about two minutes",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    return future


class BucketPath:
    """A path in a bucket, with the part of pathlib.Path's interface that this project needs.

    A request that fails raises the same exception as a disk: FileNotFoundError, PermissionError, or
    an OSError with the message of the store. The methods without a docstring are pathlib's.

    Attributes:
        scheme: gs or s3.
        bucket: name of the bucket.
        key: name in the bucket, without slashes at its ends; '' is the bucket itself.
    """

    def __init__(self, scheme: str, bucket: str, key: str):
        self.scheme, self.bucket, self.key = scheme, bucket, key.strip("/")

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.key}" if self.key else "")

    def __repr__(self) -> str:
        return f"BucketPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BucketPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: "BucketPath") -> bool:
        return str(self) < str(other)

    def __reduce__(self) -> Any:  # a worker process opens its own connection
        return BucketPath, (self.scheme, self.bucket, self.key)

    def __truediv__(self, name: str | PurePosixPath) -> "BucketPath":
        return BucketPath(self.scheme, self.bucket, f"{self.key}/{name}")

    @property
    def _pure(self) -> PurePosixPath:
        return PurePosixPath(self.key)

    @property
    def name(self) -> str:
        return self._pure.name

    @property
    def stem(self) -> str:
        return self._pure.stem

    @property
    def suffix(self) -> str:
        return self._pure.suffix

    @property
    def parent(self) -> "BucketPath":
        return BucketPath(self.scheme, self.bucket, self.key.rpartition("/")[0])

    def with_name(self, name: str) -> "BucketPath":
        return self.parent / name

    def absolute(self) -> "BucketPath":
        return self

    def resolve(self) -> "BucketPath":
        return self

    def relative_to(self, folder: "BucketPath") -> PurePosixPath:
        return self._pure.relative_to(folder.key or ".")

    @cached_property
    def _store(self) -> Any:
        return open_bucket(self.scheme, self.bucket)

    def _request(self, future: Any) -> Any:
        try:
            return await_request(future, self).result()
        except ValueError as error:
            raise self.system_error(str(error)) from error

    def system_error(self, message: str) -> OSError:
        """Returns what the system would raise for the fault in a message of TensorStore."""
        status = message.partition(":")[0]
        reason = re.split(r" \[(?:tensorstore_spec|source)", message)[0][:300]
        if status == "NOT_FOUND":  # a missing object is no error to TensorStore
            return FileNotFoundError(errno.ENOENT, f"there is no bucket {self.bucket}", str(self))
        if status in ("PERMISSION_DENIED", "UNAUTHENTICATED"):
            return PermissionError(errno.EACCES, reason, str(self))
        return OSError(errno.EIO, reason, str(self))

    def _keys(self, prefix: str) -> list[str]:
        import tensorstore as ts

        span = ts.KvStore.KeyRange(prefix, key_after(prefix))
        keys = (key.decode() for key in self._request(self._store.list(span)))
        return sorted(key for key in keys if key.startswith(prefix))  # emulators ignore the span

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        import tensorstore as ts

        alone = ts.KvStore.KeyRange(self.key, self.key + "\0")
        return bool(self.key) and self.key.encode() in self._request(self._store.list(alone))

    def is_dir(self) -> bool:
        return bool(self._keys(f"{self.key}/" if self.key else ""))

    def _names(self) -> list[str]:
        """Returns the relative names of all objects in the folder and its subfolders, sorted."""
        prefix = f"{self.key}/" if self.key else ""
        return [key.removeprefix(prefix) for key in self._keys(prefix)]

    def iterdir(self) -> Iterator["BucketPath"]:
        """Yields what lies directly in the folder: objects, and folders of objects."""
        names = dict.fromkeys(name.partition("/")[0] for name in self._names())
        return (self / name for name in names if name)

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """Yields the objects and folders that match; `*` stays within one name, `**/` doesn't."""
        found: dict[str, None] = {}
        for name in self._names():
            parts = name.split("/")
            found |= dict.fromkeys("/".join(parts[: i + 1]) for i in range(len(parts)))
        matches = re.compile(_pattern(pattern)).fullmatch
        return (self / name for name in found if matches(name))

    def files(self, pattern: str = "**/*") -> list["BucketPath"]:
        """Returns the objects that match, by default all in the folder and its subfolders.

        Folders that match don't count. One request lists up to 1,000 objects.
        """
        matches = re.compile(_pattern(pattern)).fullmatch
        return [self / name for name in self._names() if matches(name)]

    def matches(self) -> list["BucketPath"]:
        """Returns the objects that match this path as a glob pattern; itself without wildcards."""
        names = self.key.split("/")
        fixed = next((i for i, name in enumerate(names) if set(name) & set("*?[")), len(names))
        if fixed == len(names):
            return [self] if self.is_file() else []
        folder = BucketPath(self.scheme, self.bucket, "/".join(names[:fixed]))
        return folder.files("/".join(names[fixed:]))

    def read_bytes(self) -> bytes:
        """Returns the content of an object.

        Raises:
            FileNotFoundError: there is none.
        """
        found = self._request(self._store.read(self.key))
        if found.state != "value":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return found.value

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> None:
        """Creates or replaces an object. Its readers see the old content or the new one."""
        self._request(self._store.write(self.key, data))

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        self.write_bytes(text.encode(encoding))

    def unlink(self, missing_ok: bool = True) -> None:
        self._request(self._store.write(self.key, None))

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Does nothing: a folder exists while it contains an object."""

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Returns a file for reading, which fetches the ranges that are read.

        Raises:
            InputError: the extra that reads ranges of this store is not installed.
        """
        assert mode == "rb", mode
        return file_system(self).open(str(self), "rb")


def key_after(prefix: str) -> str:
    """Returns the first key after all that start with `prefix`; '' for none."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""


# In a regular expression: an escaped character, a set of characters (negated: group 1), or any
# character.
_WILDCARD = re.compile(r"\\.|\[(\^?)(\]?[^]]*)\]|\.")


def _pattern(pattern: str) -> str:
    """Returns the regular expression of a glob pattern; no wildcard but `**/` matches slashes."""

    def exclude_slash(match: re.Match[str]) -> str:
        if match[0] == ".":
            return "[^/]"
        return f"[^{match[2]}/]" if match[1] else match[0]

    parts = []
    for part in pattern.split("/"):
        if part == "**":
            parts.append("(?:.*/)?")
        else:
            parts.append(_WILDCARD.sub(exclude_slash, fnmatch.translate(part)[4:-3]) + "/")
    return "".join(parts).removesuffix("/")


@cache
def open_bucket(scheme: str, bucket: str) -> Any:
    """Returns TensorStore's key-value store of a bucket.

    Raises:
        InputError: TensorStore can't use it.
    """
    import tensorstore as ts

    spec = bucket_spec(scheme, bucket)
    try:
        return ts.KvStore.open({**spec, "path": ""}, context=context()).result()
    except ValueError as error:
        raise InputError(f"can't use {scheme}://{bucket}: {str(error)[:300]}") from error


def context(synced: bool = True) -> Any:
    """Returns TensorStore's context for all requests of this process: its limits and retries.

    Args:
        synced: whether a write to a disk ends when its bytes are on it.
    """
    return _context(synced)


@cache
def _context(synced: bool) -> Any:
    import tensorstore as ts

    return ts.Context(
        {
            "gcs_request_retries": _RETRIES,
            "s3_request_retries": _RETRIES,
            "cache_pool#indices": {"total_bytes_limit": 100_000_000},
            "file_io_sync": synced,
        }
    )


def bucket_spec(scheme: str, bucket: str) -> dict[str, Any]:
    """Returns TensorStore's specification of a bucket."""
    for name, value in _STALLED.items():  # read by TensorStore at its first request
        os.environ.setdefault(name, value)
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket}
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket}
    # The variables of AWS's own tools. A store that is not Amazon's is reached by its endpoint.
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    if endpoint := next((os.environ[n] for n in names if os.environ.get(n)), None):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # the other providers log files that don't exist
        spec["aws_credentials"] = {"type": "environment"}
    return spec


def file_system(path: BucketPath) -> Any:
    """Returns fsspec's file system, which reads ranges of raw files and uploads large ones.

    Raises:
        InputError: its package is missing.
    """
    try:
        import fsspec

        return fsspec.filesystem(path.scheme)
    except ImportError as error:
        extra = {"gs": "gcs", "s3": "s3"}[path.scheme]
        what = f"{path} is a file in a bucket, and {error.name or 'fsspec'} is not installed"
        raise missing_extra(what, extra) from error
