"""The shards of a corpus are the same bytes, whoever runs which of its tasks."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from chat_shards import read_tree

from llama_jax.data import corpus_plan, shard_writer, tasks
from llama_jax.data.tasks import Part
from llama_jax.data.tokenize import tokenize_corpus
from llama_jax.errors import InputError
from llama_jax.runtime import atomic_write

# The corpus is divided into about 30 parts and 10 shards.
SMALL = """
from llama_jax.data import corpus_plan, shard_writer, tasks
corpus_plan.MIN_PART_BYTES, corpus_plan._PARTS = 2000, 30
shard_writer.SHARD_TOKENS, shard_writer.CHUNK_TOKENS = 4096, 1024
tasks.POLL_SECONDS = 0.1
"""
# Each part waits, so that a command does not finish before the test ends it.
SLOW = """
import time
submit = tasks.submit
def submit_later(*task):
    time.sleep(0.1)
    return submit(*task)
tasks.submit = submit_later
"""


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(corpus_plan, "MIN_PART_BYTES", 2000)
    monkeypatch.setattr(corpus_plan, "_PARTS", 30)
    monkeypatch.setattr(shard_writer, "SHARD_TOKENS", 4096)
    monkeypatch.setattr(shard_writer, "CHUNK_TOKENS", 1024)
    monkeypatch.setattr(tasks, "POLL_SECONDS", 0.1)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Small texts, a long one that is divided, and JSON lines."""
    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("aeioukltnrs"), rng.integers(2, 8))) for _ in range(200)]

    def text(n):
        lines = rng.choice(words, (n // 50, 10))
        return "".join(" ".join(line) + "\n" for line in lines)

    for i in range(20):
        (folder / f"{i:02d}.txt").write_text(text(int(rng.integers(50, 2000))))
    (folder / "long.txt").write_text(text(30_000))
    rows = (json.dumps({"id": i, "text": text(300)}) + "\n" for i in range(80))
    (folder / "rows.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture(scope="module")
def expected(sources, tmp_path_factory, request):
    """The files of an undisturbed run of one process, by their names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_plan, "MIN_PART_BYTES", 2000)
        patch.setattr(corpus_plan, "_PARTS", 30)
        patch.setattr(shard_writer, "SHARD_TOKENS", 4096)
        patch.setattr(shard_writer, "CHUNK_TOKENS", 1024)
        out = tmp_path_factory.mktemp("expected") / "out"
        tokenize(sources, out, workers=1)
    return read_tree(out)


def tokenize(sources, out, **options):
    options = {"n_vocab": 300, "validation_fraction": 0.1, "progress": False} | options
    return tokenize_corpus([str(sources)], out, **options)


def start(sources, out, *options, code=""):
    """Starts the command in its own process group."""
    run = "import sys; from llama_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", f"{SMALL}\n{code}\n{run}", "tokenize", sources, "--out", out]
    command += ["--vocab-size", 300, "--validation-fraction", 0.1, *options]
    return subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def in_thread(sources, out, **options):
    thread = threading.Thread(target=tokenize, args=(sources, out), kwargs=options, daemon=True)
    thread.start()
    return thread


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def finished_parts(folder):
    return sorted(folder.glob(".out.unfinished/done/records/[0-9a-f]*.json"))


def test_three_processes_write_the_same_bytes(sources, expected, tmp_path):
    tokenize(sources, tmp_path / "out", workers=3)
    assert read_tree(tmp_path / "out") == expected
    assert len(list((tmp_path / "out/train/tokens/c").iterdir())) > 5
    assert names(tmp_path) == ["out"]


def test_two_processes_that_share_the_tasks_write_the_same_bytes(sources, expected, tmp_path):
    other = start(sources, tmp_path / "out", "--task", "2/2", "--workers", 1)
    ours = in_thread(sources, tmp_path / "out", part=Part(0, 2), workers=1)
    _, stderr = other.communicate(timeout=60)
    assert other.returncode == 0, stderr
    ours.join()
    assert read_tree(tmp_path / "out") == expected
    assert names(tmp_path) == ["out"]
    # A process that starts again after the others have finished has nothing to do.
    meta = tokenize(sources, tmp_path / "out", part=Part(1, 2))
    assert meta["splits"]["train"]["tokens"] > 10_000


def test_processes_with_other_settings_do_not_share_the_tasks(sources, tmp_path):
    first = in_thread(sources, tmp_path / "out", part=Part(0, 2), workers=1)
    while not finished_parts(tmp_path):
        time.sleep(0.01)
    options = {"part": Part(1, 2), "workers": 1}
    with pytest.raises(InputError, match="belongs to a corpus or settings that differ from those"):
        tokenize(sources, tmp_path / "out", parse_special=True, **options)
    with pytest.raises(InputError, match="another process is writing"):
        tokenize(sources, tmp_path / "out")
    tokenize(sources, tmp_path / "out", **options)
    first.join()


def test_a_command_that_is_ended_twice_continues_with_the_missing_parts(
    sources, expected, tmp_path
):
    """SIGTERM, then SIGKILL: no worker survives, and the parts that are done are not repeated."""
    before = []
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        process = start(sources, tmp_path / "out", "--workers", 2, code=SLOW)
        deadline = time.monotonic() + 120
        while len(finished_parts(tmp_path)) < len(before) + 4:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == code
        while _group_exists(process.pid):
            assert time.monotonic() < deadline, "a worker is still running"
            time.sleep(0.01)
        times = [path.stat().st_mtime_ns for path in before]
        assert not (tmp_path / "out").exists()
        assert [path.stat().st_mtime_ns for path in before] == times
        before = finished_parts(tmp_path)
    tokenize(sources, tmp_path / "out", workers=1)
    assert read_tree(tmp_path / "out") == expected
    assert names(tmp_path) == ["out"]


def _group_exists(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("last", [".out.unfinished", "published"])
def test_a_folder_is_written_again_after_a_kill_while_the_parts_were_removed(
    last, sources, expected, tmp_path, monkeypatch
):
    """The user removes the complete folder, and gives the same command again."""
    out, remove = tmp_path / "out", atomic_write.remove_tree

    def die(path):
        if path.name == last:
            raise KilledError
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(atomic_write, "remove_tree", die)
        with pytest.raises(KilledError):
            tokenize(sources, out, workers=1)
    remove(out)
    tokenize(sources, out, workers=1)
    assert read_tree(out) == expected
    assert names(tmp_path) == ["out"]


def test_a_changed_corpus_replaces_the_parts_that_changed(sources, expected, tmp_path):
    """The run of another corpus ends before it is complete; nothing of it is left."""
    other = tmp_path / "sources"
    other.mkdir()
    for path in sources.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    rows = (sources / "rows.jsonl").read_bytes()
    (other / "rows.jsonl").write_bytes(rows + b"{not JSON}\n")
    out = tmp_path / "o" / "out"
    model = sources_tokenizer(expected, tmp_path)
    with pytest.raises(InputError, match=r"rows.jsonl:81: not valid JSON"):
        tokenize(other, out, workers=1, n_vocab=None, tokenizer=model)
    assert finished_parts(tmp_path / "o")
    (tmp_path / "o/.out.unfinished/final/tokenizer.json").touch()  # of another tokenizer
    (other / "rows.jsonl").write_bytes(rows)
    tokenize(other, out, workers=1, n_vocab=None, tokenizer=model)
    found = read_tree(out)
    assert {n: d for n, d in found.items() if n != "meta.json"} == {
        n: d for n, d in expected.items() if n != "meta.json"
    }
    assert names(tmp_path / "o") == ["out"]


def sources_tokenizer(expected, folder):
    (folder / "tokenizer.model").write_bytes(expected["tokenizer.model"])
    return folder / "tokenizer.model"
