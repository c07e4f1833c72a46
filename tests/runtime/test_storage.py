"""Paths in buckets behave like pathlib's, also when the store fails in between."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import peer
from object_store import BUCKET, store_of_this_process

from llama_jax.data.text_files import find_files
from llama_jax.errors import InputError
from llama_jax.runtime import bucket_path
from llama_jax.runtime.bucket_path import BucketPath
from llama_jax.runtime.storage import list_files, parse_path, read_many, remove_tree, write_many


@pytest.fixture(scope="module", params=["s3", "gs"])
def store(request):
    for package in ("moto", "gcp_storage_emulator"):
        peer(package)
    with store_of_this_process(request.param) as running:
        yield running


@pytest.fixture(params=["local", "bucket"])
def folder(request, store, tmp_path):
    folder = tmp_path if request.param == "local" else parse_path(store.url(tmp_path.name))
    yield folder
    remove_tree(folder)


def test_a_path_in_a_bucket_does_what_a_local_path_does(folder):
    assert not (folder / "none").exists()
    for name in ("a.json", "b.txt", "sub/deep/c.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    kinds = [(path.is_file(), path.is_dir()) for path in (folder / "a.json", folder / "sub")]
    assert kinds == [(True, False), (False, True)]
    assert not (folder / "su").exists()  # the start of a name is not a name
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "b.txt", "sub"]
    for pattern, names in {
        "*.json": ["a.json"],
        "**/*.json": ["a.json", "c.json"],
        "sub/*": ["deep"],
        "[ab].*": ["a.json", "b.txt"],
        "?.txt": ["b.txt"],
        "sub?deep": [],  # no wildcard matches a slash
        "sub[!x]deep": [],
        "[!a].t?t": ["b.txt"],
    }.items():
        assert sorted(path.name for path in folder.glob(pattern)) == names, pattern
    path = folder / "sub" / "deep" / "c.json"
    assert (path.name, path.stem, path.suffix) == ("c.json", "c", ".json")
    assert path.parent.parent == folder / "sub"
    assert str(path.relative_to(folder)) == "sub/deep/c.json"
    assert path.with_name("d").name == "d"
    path.write_bytes(b"\0\1")
    assert path.read_bytes() == b"\0\1"
    (folder / "b.txt").unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(folder / "b.txt"))):
        (folder / "b.txt").read_bytes()
    remove_tree(folder / "sub")
    assert [path.name for path in folder.iterdir()] == ["a.json"]


def test_many_files_are_written_concurrently(folder, store):
    files = {f"{i % 3}/{i}/zarr.json": bytes([i]) * (i + 1) for i in range(24)}
    store.faults.latency = 0.25
    start = time.monotonic()
    write_many(folder, files)
    seconds = time.monotonic() - start
    store.faults.latency = 0.0
    assert seconds < 24 * 0.25 / 2
    assert read_many(folder, [*files, "none"]) == files | {"none": None}


def test_a_path_through_a_parent_folder_is_written_and_read(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    write_many(Path("../data"), {"a": b"1"})
    assert read_many(Path("../data"), ["a"]) == {"a": b"1"}
    assert (tmp_path / "data" / "a").read_bytes() == b"1"


def test_a_file_that_cannot_be_written_is_named_and_the_others_are_written(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(NotADirectoryError, match=re.escape(str(tmp_path / "a" / "b"))):
        write_many(tmp_path, {"a/b": b"", "c/d": b"x"})
    assert (tmp_path / "c" / "d").read_bytes() == b"x"


def test_one_listing_finds_all_files(folder, store):
    names = {"0.txt", "1.txt", "sub/2.txt", "sub/deep/3.txt", "sub/deep/4.bin"}
    write_many(folder, dict.fromkeys(names, b"x"))
    store.faults.requests.clear()
    found = list_files(folder)
    assert {str(path).removeprefix(f"{folder}/") for path in found} == names
    assert [path.name for path in find_files([str(folder)])] == [f"{i}.txt" for i in range(4)]
    assert [path.name for path in find_files([f"{folder}/*/*.txt"])] == ["2.txt"]
    requests = len(store.faults.requests)
    assert requests == (0 if isinstance(folder, Path) else 4), store.faults.requests


def test_ranges_of_an_object_are_read_alone(folder, store):
    peer("s3fs")
    peer("gcsfs")
    content = os.urandom(20 << 20)
    (folder / "large").write_bytes(content)
    with (folder / "large").open("rb") as file:
        file.seek(1000)
        assert file.read(10) == content[1000:1010]
        assert file.seek(0, os.SEEK_END) == len(content)


def test_requests_that_fail_are_repeated(store):
    folder = parse_path(store.url("faulty"))
    store.faults.refused, store.faults.dropped = 0.2, 0.1
    for i in range(10):
        (folder / f"{i}").write_bytes(bytes([i]) * 1000)
    assert [(folder / f"{i}").read_bytes()[0] for i in range(10)] == list(range(10))
    store.faults.refused = store.faults.dropped = 0.0


READS = """
import sys, time
from llama_jax.runtime.storage import parse_path
path = parse_path(sys.argv[1])
for _ in range(10):
    start = time.monotonic()
    assert path.read_bytes() == b"content"
    print(time.monotonic() - start)
"""


def test_a_request_without_an_answer_is_repeated(store):
    """In another process: TensorStore reads its time limit once, here 1 s rather than 30."""
    path = parse_path(store.url("stalled"))
    path.write_bytes(b"content")
    store.faults.stalled = 0.25
    command = [sys.executable, "-c", READS, str(path)]
    limit = {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "1"}
    done = subprocess.run(
        command, env=os.environ | limit, capture_output=True, text=True, timeout=300, check=False
    )
    store.faults.stalled = 0.0
    assert os.environ["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"] == "30"
    assert done.returncode == 0, done.stderr
    seconds = [float(line) for line in done.stdout.split()]
    assert max(seconds) > 0.9  # at least one request was repeated
    assert sorted(seconds)[5] < 0.9


def test_a_store_that_refuses_all_requests_for_a_while_is_reported(store, monkeypatch, capsys):
    path = parse_path(store.url("unavailable"))
    path.write_bytes(b"content")
    monkeypatch.setattr(bucket_path, "REPORT_SECONDS", 1.0)
    monkeypatch.setattr(bucket_path, "_reported", {})
    store.faults.refused = 1.0
    threading.Timer(2, lambda: setattr(store.faults, "refused", 0.0)).start()
    assert path.read_bytes() == b"content"
    assert capsys.readouterr().err == (
        f"warning: {store.scheme}://{BUCKET} has not completed a request for {path} for 1 s: a"
        " request that fails is repeated for about two minutes\n"
    )


def test_a_missing_bucket_is_named(store):
    with pytest.raises(OSError, match="no-such-bucket"):
        BucketPath(store.scheme, "no-such-bucket", "x").read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http://host/x", "URLs of http: are not supported; give a local path, gs://"),
        ("hdfs:/x", "URLs of hdfs: are not supported"),
        ("gs://", "gs:// names no bucket: write gs://BUCKET/NAME"),
        ("s3:///x", "s3:///x names no bucket"),
        ("gs:/b/x", "gs:/b/x names no bucket"),
    ],
)
def test_a_path_that_names_no_store_is_refused(text, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parse_path(text)


def test_paths_are_parsed():
    assert parse_path("a/b") == Path("a/b")
    assert str(parse_path("gs://b/x//")) == "gs://b/x"
    assert parse_path("s3://b") / "x" / "y" == BucketPath("s3", "b", "x/y")
