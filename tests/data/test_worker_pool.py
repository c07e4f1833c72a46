"""The pool that encodes a corpus ends with its process, whatever its workers are doing."""

import subprocess
import sys

CLOSE_EARLY = """
import contextlib, itertools
from llama_jax.data.worker_pool import map_in_order

if __name__ == "__main__":
    results = map_in_order(bytes, itertools.repeat(4_000_000), 2)
    with contextlib.closing(results):
        print(sum(len(result) for result in itertools.islice(results, 20)))
"""


def test_a_pool_closes_while_its_workers_send_results(tmp_path):
    """A worker that exits in the middle of a result leaves the pool waiting for the rest."""
    script = tmp_path / "close_early.py"
    script.write_text(CLOSE_EARLY)
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "80000000\n"
