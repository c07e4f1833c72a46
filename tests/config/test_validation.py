"""Each kind of pydantic error becomes one sentence."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from llama_jax.config.model import STRICT, ModelConfig, PositiveInt
from llama_jax.config.validation import Problem, first_problem
from llama_jax.inference.sampling import Sampling


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Section:
    size: PositiveInt = 1


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Values:
    count: PositiveInt
    kind: Literal["a", "b", "c"] = "a"
    names: tuple[str, ...] = ()
    weights: dict[str, float] = Field(default_factory=dict)
    section: Section = Section()
    short: Annotated[str, Field(max_length=2)] = ""


def problem(values: Any, kind: type = Values) -> Problem:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_python(values)
    return first_problem(caught.value)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "count is missing"),
        ({"count": 1, "cuont": 2}, "cuont is not a known key"),
        ({"count": 0}, "count must be greater than or equal to 1, not 0"),
        ({"count": 1.5}, "count must be a valid integer, not 1.5"),
        ({"count": 1, "kind": "d"}, "kind must be 'a', 'b' or 'c', not 'd'"),
        ({"count": 1, "names": 5}, "names must be a list, not 5"),
        ({"count": 1, "names": ["a", 5]}, "names.1 must be a valid string, not 5"),
        ({"count": 1, "weights": {"x": "y"}}, "weights.x must be a valid number, not 'y'"),
        ({"count": 1, "weights": {5: 1}}, "weights.5 must be a valid string, not 5"),
        ({"count": 1, "section": 5}, "section must be a section of keys, not 5"),
        ({"count": 1, "section": {"size": 0}}, "section.size must be greater than or equal to 1,"
                                               " not 0"),
        ({"count": 1, "short": "abc"}, "short: string should have at most 2 characters"),
        ({"count": "x" * 1000}, f"count must be a valid integer, not '{'x' * 98}…"),
        ({"count": 1, "y" * 1000: 1}, f"{'y' * 99}… is not a known key"),
    ],
)  # fmt: skip
def test_the_sentence_names_the_key_and_the_value(values, sentence):
    assert problem(values).sentence() == sentence


def test_the_path_keeps_keys_that_contain_dots():
    found = problem({"count": 1, "weights": {"data/a.b": "y"}})
    assert found.path == ("weights", "data/a.b")


def test_the_message_of_a_validator_follows_the_key():
    found = problem({"dim": 8, "n_layers": 1, "n_heads": 3, "n_kv_heads": 2, "head_dim": 2,
                     "hidden_dim": 8, "vocab_size": 8}, ModelConfig)  # fmt: skip
    assert found.is_rule
    assert found.sentence() == "n_kv_heads (2) must divide n_heads (3)"
    assert found.sentence("model") == "model: n_kv_heads (2) must divide n_heads (3)"


def test_a_request_and_a_call_give_the_same_sentences():
    class Request(BaseModel):
        model_config = {"extra": "forbid", "strict": True}
        n: int

    assert problem({"n": "5"}, Request).sentence() == "n must be a valid integer, not '5'"
    assert problem({"n": 5, "m": 1}, Request).is_unknown
    assert problem({}, Request).is_missing
    with pytest.raises(ValidationError) as caught:
        Sampling(top_p=0)
    assert first_problem(caught.value).sentence("--top-p") == (
        "--top-p must be greater than 0, not 0"
    )
