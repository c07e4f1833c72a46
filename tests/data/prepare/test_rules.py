import json

import numpy as np
import pytest

from llama_jax.data.prepare.document import Document, read_documents, write_lines
from llama_jax.data.prepare.grouping import exact_duplicates, find_later_occurrences, hash_texts
from llama_jax.data.prepare.rules import Funnel, Rule, apply_rules
from llama_jax.errors import InputError

DOCUMENTS = [
    Document("a", "keep", {}),
    Document("b", "drop", {"x": "y"}),
    Document("c", "  cut", {}),
]
RULES = [
    Rule("strip", "", lambda d: d._replace(text=d.text.strip())),
    Rule("no drop", "", lambda d: None if d.text == "drop" else d),
]


def test_rules_apply_in_order_and_the_funnel_counts_what_each_removed():
    funnel = Funnel()
    texts = [document.text for document in apply_rules(RULES, DOCUMENTS, funnel)]
    assert texts == ["keep", "cut"]
    names = ("documents", "characters", "removed_documents", "removed_characters")
    rows = {rule: [count[name] for name in names] for rule, count in funnel.as_json().items()}
    assert rows == {"strip": [3, 13, 0, 2], "no drop": [3, 11, 1, 4]}
    assert [count.changed_documents for count in funnel.counts.values()] == [1, 0]


def test_funnels_of_parts_add_up_to_the_funnel_of_all():
    total, complete = Funnel(), Funnel()
    for document in DOCUMENTS:
        part = Funnel()
        assert len([*apply_rules(RULES, [document], part)]) <= 1
        total.add(Funnel.from_json(json.loads(json.dumps(part.as_json()))))
    assert len([*apply_rules(RULES, DOCUMENTS, complete)]) == 2
    assert total.as_json() == complete.as_json()


def test_documents_read_back_equal_and_equal_documents_give_equal_bytes(tmp_path):
    documents = [*DOCUMENTS, Document("d", "ä 漢\n\u2028line", {})]
    for name in ("one.jsonl.zst", "two.jsonl.zst"):
        write_lines(tmp_path / name, iter(documents))
    assert [*read_documents(tmp_path / "one.jsonl.zst")] == documents
    assert (tmp_path / "one.jsonl.zst").read_bytes() == (tmp_path / "two.jsonl.zst").read_bytes()
    write_lines(tmp_path / "half.jsonl.zst", [Document("e", "a\ud800b", {})])
    assert next(read_documents(tmp_path / "half.jsonl.zst")).text == "a?b"
    (tmp_path / "other.jsonl").write_text('{"text": "no id"}\n')
    with pytest.raises(
        InputError, match=r"other\.jsonl:1 is not a document of `llama-jax prepare`"
    ):
        next(read_documents(tmp_path / "other.jsonl"))


def test_the_first_of_equal_keys_remains():
    keys = np.array([[5, 1], [5, 2], [5, 1], [7, 1], [5, 1]], np.uint64)
    assert find_later_occurrences(keys).tolist() == [False, False, True, False, True]
    exact = exact_duplicates("")
    a, b = exact.keys(Document("a", "text", {})), exact.keys(Document("b", "text ", {}))
    assert a.shape == (1, 2)
    assert (a != b).all()
    # The first eight bytes of sha1(b"abc") = a9993e36 4706816a …
    assert hash_texts(["abc"])[0, 0] == int.from_bytes(bytes.fromhex("a9993e364706816a"), "little")
