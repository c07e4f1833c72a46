import re

import numpy as np
import pytest

from llama_jax.config.prepare import StackExchangeEntry
from llama_jax.data.prepare import decontamination
from llama_jax.data.prepare.decontamination import cut_out, find_ngrams, load_index, save_index
from llama_jax.data.prepare.document import Document, read_documents
from llama_jax.data.prepare.prepare import prepare_sources
from llama_jax.errors import InputError

QUESTION = "Which of these seventeen planets, seen from Earth, is the brightest in the sky of June?"
SHORT = "Why do cats purr at night so loudly?"  # 8 words
SETS = {
    "stars": [[QUESTION, "Venus"], ["Too short to be found"]],
    "cats": [[SHORT], [QUESTION + " Name it!"]],
}
FILLER = "\n".join(f"Line {i} of a text about nothing." for i in range(20))


@pytest.fixture
def index(tmp_path):
    save_index(tmp_path / "ngrams", SETS)
    return load_index(tmp_path / "ngrams")


def ngrams(text, n):
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def test_the_index_has_each_n_gram_of_each_item_once(index):
    assert index.names == ("cats", "stars")
    assert index.sizes == ((2, 0), (2, 1))
    long = len(ngrams(QUESTION, 13)) + len(ngrams(QUESTION + " Name it!", 13))
    assert (len(index.hashes), index.lengths) == (long + 1, (8, 13))
    assert (np.diff(index.hashes.astype(object)) >= 0).all()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (QUESTION, [QUESTION[:-1]]),
        (f"He asked: “{QUESTION.upper()}” – Venus", [QUESTION[:-1].upper()]),
        (QUESTION.replace(" ", "\n\n  "), [QUESTION[:-1].replace(" ", "\n\n  ")]),
        (QUESTION.replace("Which of", "What are"), [QUESTION[QUESTION.index("these") : -1]]),
        (QUESTION.replace("seventeen", "17"), []),  # 12 of the 16 words follow
        (f"{SHORT} And {SHORT}", [SHORT[:-1], SHORT[:-1]]),
        (SHORT.replace("Why", "How"), []),
        ("Too short to be found", []),
        ("", []),
    ],
)
def test_n_grams_are_found_by_their_words(index, text, found):
    hits = find_ngrams(index, text)
    merged = list[list[int]]()
    for start, end in zip(hits.starts.tolist(), hits.ends.tolist(), strict=True):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([start, end])
    assert [text[start:end] for start, end in merged] == found


def test_hashes_of_n_grams_are_uniform_and_differ_by_order_and_length(tmp_path):
    words = [f"w{i}" for i in range(4000)]
    save_index(tmp_path / "n", {"s": [[" ".join(words)], [" ".join(words[::-1])], ["a b " * 4]]})
    hashes = load_index(tmp_path / "n").hashes
    assert len(hashes) == len(np.unique(hashes)) == 2 * (4000 - 12) + 1
    for shift in (0, 30, 60):  # 16 equal cells: chi-squared with 15 degrees is below 38 (p 0.001)
        cells = np.bincount((hashes >> np.uint64(shift) & np.uint64(15)).astype(int), minlength=16)
        assert ((cells - len(hashes) / 16) ** 2).sum() / (len(hashes) / 16) < 38


def test_an_item_is_cut_out_with_200_characters_on_both_sides(tmp_path, index):
    step = decontamination.decontamination(tmp_path / "ngrams")
    text = FILLER + "\n" + QUESTION + "\n" + FILLER
    document = Document("a", text, {"x": "y"})
    units = step.keys(document)
    assert units.shape == (4, 1)  # 16 words have 4 n-grams of 13
    after = step.remove(document, np.arange(4))
    start, end = text.index("Which") - 200, text.index("June") + len("June") + 200
    assert after == Document("a", f"{text[:start].strip()}\n\n{text[end:].strip()}", {"x": "y"})
    assert step.keys(after).shape == (0, 1)
    assert step.remove(Document("b", QUESTION, {}), np.arange(4)) is None


def test_a_document_in_more_than_ten_pieces_is_removed_and_short_pieces_are():
    text = "x" * 8000
    for n_places in (0, 1, 9):
        starts = [500 + 700 * i for i in range(n_places)]
        cut = cut_out(text, starts, [start + 10 for start in starts])
        first, between = [300], [700 - 410] * (n_places - 1)
        last = [8000 - starts[-1] - 210] if starts else []
        expected = [*first, *between, *last] if starts else [8000]
        assert list(map(len, cut.split("\n\n"))) == expected
    starts = [500 + 700 * i for i in range(10)]
    assert cut_out(text, starts, [start + 10 for start in starts]) is None
    assert cut_out(text[:1000], [399, 500], [450, 599]) == "x" * 201  # 199 | 600 cut | 201


def test_common_phrases_remain(tmp_path, index):
    step = decontamination.decontamination(tmp_path / "ngrams")
    counts = [1, 10, 11, 200]
    keys = np.repeat(np.arange(4, dtype=np.uint64), counts)[:, np.newaxis]
    assert step.find(keys).tolist() == [n <= 10 for n in counts for _ in range(n)]


def test_the_report_counts_items_and_documents_of_each_set(tmp_path, index):
    step = decontamination.decontamination(tmp_path / "ngrams")
    texts = [QUESTION, SHORT, QUESTION + SHORT, "nothing"]
    keys = [step.keys(Document("", text, {})) for text in texts]
    documents = np.repeat(np.arange(4), list(map(len, keys)))
    # The second item of 'cats' contains the question of 'stars'.
    assert step.report(np.concatenate(keys), documents) == [
        {"set": "cats", "items": 2, "too_short": 0, "found": 2, "documents": 3},
        {"set": "stars", "items": 2, "too_short": 1, "found": 1, "documents": 2},
    ]


def test_a_folder_without_n_grams_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"empty has no n-grams of evaluation sets \(\.npy files\)"
    ):
        load_index(tmp_path / "empty")
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(InputError, match=r"x\.npy has no n-grams of evaluation sets: remove it"):
        load_index(tmp_path)
    (tmp_path / "x.npy").write_bytes(b"other")
    with pytest.raises(InputError, match=r"x\.npy has no n-grams \(.*\): remove it"):
        load_index(tmp_path)


def test_preparing_cuts_the_items_out_and_reports_them(tmp_path):
    save_index(tmp_path / "ngrams", SETS)
    bodies = [f"{FILLER} {QUESTION} {FILLER}", QUESTION, *[f"{SHORT} {FILLER}"] * 11, FILLER]
    for part in range(2):
        rows = (
            f'<row Id="{i}" PostTypeId="1" Body="{body}"/>'
            for i, body in enumerate(bodies)
            if i % 2 == part
        )
        (tmp_path / f"{part}.xml").write_text(f"<posts>{''.join(rows)}</posts>")
    entry = StackExchangeEntry(
        kind="stackexchange",
        inputs=(f"{tmp_path}/*.xml",),
        decontaminate=str(tmp_path / "ngrams"),
    )
    out = tmp_path / "out"
    funnel = prepare_sources({"x": entry}, out, workers=1, progress=False)["x"]
    row = funnel["rules"][-1]
    assert (row["rule"], row["changed_documents"], row["removed_documents"]) == (
        "decontamination", 1, 1,
    )  # fmt: skip
    assert [(r["set"], r["found"], r["documents"]) for r in row["report"]] == [
        ("cats", 1, 2), ("stars", 1, 2),
    ]  # fmt: skip
    texts = [
        document.text
        for path in sorted((out / "x").glob("part-*"))
        for document in read_documents(path)
    ]
    assert len(texts) == len(bodies) - 1
    assert not [text for text in texts if "planets" in text]
    assert len([text for text in texts if SHORT in text]) == 11  # a common phrase
