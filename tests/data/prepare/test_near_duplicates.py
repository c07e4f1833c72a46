"""Near-duplicates: compared with all pairs, for any number of files and order of tasks."""

import itertools
import pickle

import numpy as np
import pytest

from llama_jax.data.prepare import near_duplicates as near_duplicates_module
from llama_jax.data.prepare.document import Document, write_lines
from llama_jax.data.prepare.minhash import overlap
from llama_jax.data.prepare.near_duplicates import (
    NearDuplicates,
    near_duplicate_stages,
    near_duplicates,
    read_duplicates,
)

STEP = near_duplicates(0.8)


def sample_texts(n=60):
    """Returns texts of 200 words, of which many are edited copies of others."""
    rng = np.random.default_rng(1)
    texts = []
    for _ in range(n):
        words = [f"w{i}" for i in rng.integers(0, 3000, 200)]
        texts.append(words)
        for edits in rng.integers(0, 14, rng.integers(0, 6)):
            copy = [*words]
            for i in rng.integers(0, 200, edits):
                copy[i] = f"x{rng.integers(10**9)}"
            texts.append(copy)
    rng.shuffle(texts)
    return [" ".join(words) for words in texts]


def later_of_all_pairs(texts, threshold=0.8):
    """Returns the documents that aren't the first of a group, from the definition."""
    sets = []
    for text in texts:
        words = text.split()
        sets.append({tuple(words[i : i + 5]) for i in range(len(words) - 4)})
    group = [*range(len(texts))]
    for a, b in itertools.combinations(range(len(texts)), 2):
        if len(sets[a] & sets[b]) >= threshold * len(sets[a] | sets[b]):
            old, new = max(group[a], group[b]), min(group[a], group[b])
            group = [new if g == old else g for g in group]
    return [i for i, g in enumerate(group) if g != i]


def find_duplicates(folder, texts, n_files, step=STEP, *, backwards=False):
    """Returns the numbers of the duplicates."""
    bounds = np.linspace(0, len(texts), n_files + 1).astype(int)
    files = [folder / f"part-{i:05d}.jsonl.zst" for i in range(n_files)]
    folder.mkdir(exist_ok=True)
    for file, (start, end) in zip(files, itertools.pairwise(bounds), strict=True):
        write_lines(file, [Document(f"{i}", texts[i], {}) for i in range(start, end)])
    for tasks in near_duplicate_stages(step, files, folder / "work"):
        for task in reversed(tasks) if backwards else tasks:
            pickle.loads(pickle.dumps(task)).run()
            assert task.output.is_file()
    return [bounds[i] + row for i in range(n_files) for row in read_duplicates(folder / "work", i)]


def test_the_duplicates_are_those_of_comparing_all_pairs(tmp_path):
    texts = sample_texts()
    expected = later_of_all_pairs(texts)
    assert 40 < len(expected) < len(texts) - 60
    assert find_duplicates(tmp_path, texts, 3) == expected


def test_the_result_is_the_same_for_any_files_and_order_of_tasks(tmp_path, monkeypatch):
    texts = sample_texts(30)
    results = [
        find_duplicates(tmp_path / "1", texts, 1),
        find_duplicates(tmp_path / "20", texts, 20),
    ]
    monkeypatch.setattr(near_duplicates_module, "_BATCH", 1)
    results.append(find_duplicates(tmp_path / "back", texts, 20, backwards=True))
    assert len(results[0]) > 20
    assert results[1] == results[0]
    assert results[2] == results[0]
    files = {path.name: path.read_bytes() for path in (tmp_path / "20" / "work").iterdir()}
    assert len(files) == 20 + 3 + 3 + 1
    for path in (tmp_path / "back" / "work").iterdir():
        assert path.read_bytes() == files[path.name]


def test_hundreds_of_copies_are_found_from_their_first(tmp_path):
    text = " ".join(f"w{i}" for i in range(100))
    texts = ["", *(f"{text} x{i}" for i in range(300)), "other words"]
    assert find_duplicates(tmp_path, texts, 2) == [*range(2, 301)]


@pytest.mark.parametrize(("shared", "is_duplicate"), [(3950, True), (3500, False), (1000, False)])
def test_a_book_is_removed_if_it_shares_nine_tenths_with_an_earlier_one(
    shared, is_duplicate, tmp_path
):
    book = [f"w{i}" for i in range(4000)]
    other = " ".join([*book[:shared], *(f"x{i}" for i in range(4000 - shared))])
    step = NearDuplicates("books", "", overlap, 0.9)
    expected = [1] if is_duplicate else []
    assert find_duplicates(tmp_path, [" ".join(book), other], 1, step) == expected


def test_a_story_and_the_collection_that_contains_it_remain(tmp_path):
    story = " ".join(f"w{i}" for i in range(1000))
    collection = " ".join([story, *(f"x{i}" for i in range(4000))])
    step = NearDuplicates("books", "", overlap, 0.9)
    assert find_duplicates(tmp_path, [story, collection], 1, step) == []
