"""Commits a checkpoint: host 0 writes the manifest once all hosts have stored their shards."""

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from llama_jax.checkpoint.content_sums import complete_sums
from llama_jax.runtime import hosts, manifest
from llama_jax.runtime.storage import AnyPath, read_many, remove_tree, write_file

_POLL_SECONDS = 0.1  # until the next look for files of other hosts; doubles up to 20 times as long


def commit(
    folder: AnyPath,
    content: Mapping[str, Any],
    sums: Mapping[str, int],
    attempt: str,
    closing: threading.Event,
    check_owner: Callable[[], None],
) -> None:
    """Reports that this host's shards are stored, and waits for the manifest, which host 0 writes.

    Args:
        folder: of the checkpoint.
        content: of the manifest, without the content sums.
        sums: partial content sum of this host's shards of each array.
        attempt: identifies this start of the run, so that reports of an earlier start don't count.
        closing: set when the run ends, which ends the wait for the other hosts.
        check_owner: raises if another run has taken over the folder; called on host 0.

    Raises:
        OSError: a file can't be written; or the run ends, and another host has not stored its part.
    """

    def report_of(host: int) -> str:
        return f"done/{attempt}-{host}"

    if hosts.is_host_zero():
        reports = _wait_for(folder, map(report_of, range(1, hosts.count())), closing)
        complete = complete_sums([sums, *map(json.loads, reports)])
        check_owner()
        manifest.write_manifest(folder, {**content, "sums": complete})
        remove_tree(folder / "done")
    else:
        write_file(folder / report_of(hosts.number()), json.dumps(sums).encode())
        _wait_for(folder, [manifest.NAME], closing)


def _wait_for(folder: AnyPath, names: Iterable[str], closing: threading.Event) -> list[bytes]:
    """Waits until all files exist, and returns their contents."""
    names, pause = [*names], _POLL_SECONDS
    while True:
        found = [data for data in read_many(folder, names).values() if data is not None]
        if len(found) == len(names):
            return found
        if closing.wait(pause):
            raise OSError(f"another host has not stored its part of {folder}")
        pause = min(2 * pause, 20 * _POLL_SECONDS)
