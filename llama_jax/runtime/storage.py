"""Checks that paths are on this machine or mounted there."""

import re

from llama_jax.errors import InputError

# Path("gs://b/x") keeps one slash, and names a local folder `gs:`.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def check_local(path: str) -> str:
    """Returns `path` unchanged.

    Raises:
        InputError: it is a URL.
    """
    if _URL.match(path):
        raise InputError(
            f"{path} is a URL, but only local files can be read and written: mount the bucket as a"
            " folder, or copy the files, and give that path"
        )
    return path
