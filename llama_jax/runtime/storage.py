"""Where files may lie: in folders of this machine, or mounted there."""

import re

from llama_jax.errors import InputError

# Path("gs://b/x") has one slash left, and names a folder `gs:` here.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def check_local(path: str) -> str:
    """Returns `path` as it is.

    Raises:
        InputError: it is a URL.
    """
    if _URL.match(path):
        raise InputError(
            f"{path} is a URL, and files are read and written on this machine alone: mount the"
            " bucket as a folder, or copy the files, and give that path"
        )
    return path
