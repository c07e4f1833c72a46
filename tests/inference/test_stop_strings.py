import random

import pytest

from llama_jax.inference.stop_strings import StopStrings


def random_pieces(rng, text):
    while text:
        n = rng.randrange(1, 5)
        yield text[:n]
        text = text[n:]


@pytest.mark.parametrize(
    ("strings", "text", "shown"),
    [
        ([], "abc", "abc"),
        (["b"], "abc", "a"),
        (["bc", "abd"], "ababcab", "aba"),
        (["abcd", "bc"], "xabcd", "xa"),  # "bc" is complete first
        (["bc", "abc"], "xabc", "x"),  # both are complete at once
        (["aab"], "aaab", "a"),
        (["abab"], "abaabab", "aba"),
        (["END"], "the EN", "the EN"),
        (["🦙\n"], "a 🦙🦙\nb", "a 🦙"),
        (["a"], "a", ""),
    ],
)
def test_a_text_ends_before_the_stop_string_that_is_complete_first(strings, text, shown):
    rng = random.Random(0)
    for _ in range(50):
        stops = StopStrings(strings)
        output = "".join(stops.add(piece) for piece in random_pieces(rng, text))
        assert output + stops.flush() == shown
        assert stops.stopped == (shown != text)


def test_only_the_possible_start_of_a_stop_string_is_held_back():
    stops = StopStrings(["\n\nUser:", "###"])
    shown = [stops.add(piece) for piece in ("Hi", "\n", "\nUs", "ers: #", "#1 ##", "# no")]
    assert shown == ["Hi", "", "", "\n\nUsers: ", "##1 ", ""]
    assert stops.stopped
    assert stops.add("more") == ""
    assert stops.flush() == ""


def test_stop_strings_agree_with_a_search_of_the_complete_text():
    rng = random.Random(1)
    for _ in range(2000):
        strings = ["".join(rng.choices("ab", k=rng.randrange(1, 5))) for _ in range(3)]
        text = "".join(rng.choices("abc", k=30))
        ends = [(text.find(s) + len(s), text.find(s)) for s in strings if s in text]
        stops = StopStrings(strings)
        output = "".join(stops.add(piece) for piece in random_pieces(rng, text)) + stops.flush()
        assert output == (text[: min(ends)[1]] if ends else text)
