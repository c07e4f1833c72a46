"""One run trains in a folder, also in a bucket, which has no locks."""

import threading
import time

import pytest
from conftest import peer
from object_store import running_store

from llama_jax.errors import Fault, InputError
from llama_jax.runtime import bucket_path, folder_lock
from llama_jax.runtime.folder_lock import lock_folder
from llama_jax.runtime.storage import list_files, parse_path


@pytest.fixture(scope="module")
def store():
    peer("moto")
    with running_store("s3") as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        bucket_path.open_bucket.cache_clear()
        yield running


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(folder_lock, "WATCH_SECONDS", 3.0)


@pytest.fixture
def folder(store, tmp_path):
    return parse_path(store.url(tmp_path.name))


def wait_until(reached):
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def names(folder):
    return sorted(path.name for path in list_files(folder))


def heartbeat(folder):
    return (folder / ".heartbeat").is_file()


def test_a_run_that_ended_leaves_no_heartbeat_and_delays_nothing(folder, capfd):
    for _ in range(2):
        start = time.monotonic()
        with lock_folder(folder) as lock:
            assert time.monotonic() - start < 2
            wait_until(lambda: heartbeat(folder))
            lock.check()
        assert names(folder) == [".lock"]
    assert capfd.readouterr().err == ""


def test_a_slow_heartbeat_is_waited_for_at_the_end(folder, monkeypatch):
    started, write = threading.Event(), folder_lock.write_file

    def write_slowly(path, data):
        started.set()
        time.sleep(3 * folder_lock.BEAT_SECONDS)
        write(path, data)

    monkeypatch.setattr(folder_lock, "write_file", write_slowly)
    with lock_folder(folder):
        assert started.wait(30)
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}
    assert names(folder) == [".lock"]


def test_a_second_run_is_refused_while_the_first_has_a_heartbeat(folder):
    with lock_folder(folder) as lock:
        wait_until(lambda: heartbeat(folder))
        for _ in range(2):  # its supervisor tries again
            with (
                pytest.raises(InputError, match="another process is training in"),
                lock_folder(folder),
            ):
                pass
        lock.check()


def test_a_dead_run_is_replaced_and_stops_when_it_returns(folder, monkeypatch, capfd):
    with lock_folder(folder) as older:
        wait_until(lambda: heartbeat(folder))
        monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 8.0)  # cut off from the store
        time.sleep(0.5)
        with lock_folder(folder) as newer:
            assert "watching for 3 s" in capfd.readouterr().err
            newer.check()
            with pytest.raises(Fault, match="another run has taken over"):
                older.check()
            with pytest.raises(Fault, match="another run has taken over"):
                older.raise_if_lost()
            newer.check()
    assert names(folder) == [".lock"]


def test_a_heartbeat_finds_that_the_folder_is_lost(folder):
    with lock_folder(folder) as older:
        wait_until(lambda: heartbeat(folder))
        (folder / ".lock").write_text("that of another run")

        def is_lost():
            try:
                older.raise_if_lost()
            except Fault:
                return True

        wait_until(is_lost)
        (folder / ".heartbeat").write_text("that of another run")
    assert names(folder) == [".heartbeat", ".lock"]  # not removed by the older run


def test_a_run_folder_that_hosts_do_not_share_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(folder_lock, "VISIBLE_SECONDS", 0.3)
    (tmp_path / ".lock").write_text("that of another run")
    with pytest.raises(InputError, match="is not that of host 0: training"):
        folder_lock._check_shared(tmp_path, "this run")
