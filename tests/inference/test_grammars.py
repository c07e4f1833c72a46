"""The masks of grammars allow exactly the texts of the grammar."""

import sys

import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.inference.grammars import (
    Grammars,
    choice_grammar,
    json_grammar,
    parse_grammar,
    regex_grammar,
)
from llama_jax.tokenizer.tokenizer import load_tokenizer

SPACE = 410  # the token of SentencePiece's piece U+2581


@pytest.fixture(scope="module")
def tokenizer(shared_data):
    return load_tokenizer(shared_data / "stories260K" / "hf")


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer)


def allowed(constraint):
    return np.flatnonzero(np.unpackbits(constraint.mask_W.view(np.uint8), bitorder="little"))


def accepts(grammars, tokenizer, grammar, text):
    """Returns whether the masks allow the tokens of `text`, and then an end token."""
    constraint, ids = grammars.constraint(grammar), tokenizer.encode(text, continued=True)
    assert b"".join(tokenizer.token_bytes()[i] for i in ids).decode() == text
    for token in [*ids, tokenizer.eos_id]:
        if token not in allowed(constraint):
            return False
        constraint.advance(token)
    return True


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "ages": {"type": "array", "items": {"minimum": 3}}},
    "required": ["name"],
    "additionalProperties": False,
}
# Objects have the properties that are listed, unless the schema says otherwise.
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "object", "properties": {"first": {"type": "string"}}}},
    "required": ["name"],
}
TABLE = [
    (choice_grammar(["é\n🦙", '/a\\b"c']), ["é\n🦙", '/a\\b"c'], ["é", "", "a"]),
    (regex_grammar("a/[b]\\/\nc{2,3}"), ["a/b/\ncc", "a/b/\nccc"], ["a/b/\nc", "xa/b/\ncc"]),
    (parse_grammar('root ::= "a" | "b" foo\nfoo ::= [0-9]+'), ["a", "b12"], ["b", "a1"]),
    (parse_grammar('start: "a" | "b" foo\nfoo: /[0-9]+/'), ["a", "b12"], ["b", "a1"]),
    (
        json_grammar(SCHEMA),
        ['{"name": "é\\n"}', '{"name":"", "ages": [3, 4.5]}'],
        ["{}", '{"name": 1}', '{"name": "", "age": 1}', '{"name": "a", "ages": [2]}', "[]", ""],
    ),
    (
        json_grammar(PERSON),
        ['{"name": {"first": "a"}}'],
        ['{"name": {}, "b": 1}', '{"name": {"b": 1}}'],
    ),
    (json_grammar(PERSON | {"additionalProperties": True}), ['{"name": {}, "b": 1}'], ["{}"]),
    (json_grammar(PERSON | {"required": ["b"]}), ['{"name": {}, "b": 1}'], ["{}"]),
    (json_grammar({"allOf": [PERSON, {"required": ["b"]}]}), ['{"name": {}, "b": 1}'], ["{}"]),
    (json_grammar({"type": "object"}), ["{}", '{"a": [null, true, -1e5]}'], ["[]", "{a: 1}"]),
]


@pytest.mark.parametrize(("grammar", "valid", "invalid"), TABLE)
def test_a_grammar_accepts_its_texts_and_no_others(grammars, tokenizer, grammar, valid, invalid):
    assert [text for text in valid if not accepts(grammars, tokenizer, grammar, text)] == []
    assert [text for text in invalid if accepts(grammars, tokenizer, grammar, text)] == []


def test_each_text_of_a_grammar_has_its_own_state(grammars, tokenizer):
    first = grammars.constraint(choice_grammar(["ab", "cd"]))
    second = first.copy()
    first.advance(tokenizer.encode("c", continued=True)[0])
    (d,) = tokenizer.encode("d", continued=True)
    assert allowed(first).tolist() == [d]
    assert d not in allowed(second)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (regex_grammar("[a-c"), "unclosed character class"),
        (json_grammar({"not": {}}), "Unimplemented keys"),
        (json_grammar({"$ref": "#/$defs/x"}), "does not exist"),
        (json_grammar({"type": "integr"}), "Invalid type: integr"),
        (json_grammar(False), "schema is false"),
        ("start: foo", "unknown name"),
        ("start", "Expected token"),
    ],
)
def test_an_invalid_grammar_is_one_sentence(grammars, grammar, message):
    with pytest.raises(InputError, match=f"the grammar is invalid .*{message}") as raised:
        grammars.constraint(grammar)
    assert "\n" not in str(raised.value)


def test_invalid_ebnf_is_one_sentence():
    with pytest.raises(InputError, match="the grammar is invalid") as raised:
        parse_grammar("root ::= (")
    assert "\n" not in str(raised.value)


def test_a_token_outside_of_the_grammar_is_an_error_without_the_text(grammars, tokenizer):
    constraint = grammars.constraint(choice_grammar(["ab"]))
    constraint.advance(tokenizer.encode("x", continued=True)[0])
    assert constraint.error is not None
    assert "simplify it" in constraint.error
    assert len(constraint.mask_W) == 0


def test_a_missing_package_is_one_sentence(grammars, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match=r"llama_jax\[structured\]"):
        grammars.constraint(choice_grammar(["a"]))


def test_white_space_in_json_is_limited(grammars, tokenizer):
    """So that no model generates spaces forever."""
    grammar = json_grammar({"type": "object"})
    for text in ('{"a": 1, "b": [2, 3]}', '{"a":1,"b":[2,3]}'):
        assert accepts(grammars, tokenizer, grammar, text)
    assert not accepts(grammars, tokenizer, grammar, '{"a": 1,\n"b": 2}')
    constraint = grammars.constraint(grammar)
    for token in tokenizer.encode('{"a":', continued=True):
        constraint.advance(token)
    assert SPACE in allowed(constraint)
    constraint.advance(SPACE)
    assert SPACE not in allowed(constraint)


def test_a_grammar_may_end_with_a_space(grammars, tokenizer):
    assert tokenizer.encode("abc ", continued=True) == tokenizer.encode("abc", continued=True)
    constraint = grammars.constraint(regex_grammar("(abc ){2}"))
    for token in [*tokenizer.encode("abc abc", continued=True), SPACE]:
        assert token in allowed(constraint)
        constraint.advance(token)
    assert allowed(constraint).tolist() == [tokenizer.eos_id]
