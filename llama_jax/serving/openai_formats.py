"""The format that a request demands of its output, as a grammar.

Sources: OpenAI's API reference, `response_format`; vLLM's Structured Outputs, `structured_outputs`
and its earlier names `guided_…`.
"""

import json
from collections.abc import Mapping
from typing import Any

from llama_jax.inference.grammars import choice_grammar, json_grammar, parse_grammar, regex_grammar

# Fields that demand a format. vLLM's earlier ones are those of `structured_outputs`, with a prefix.
GUIDED = ("json", "regex", "choice", "grammar")
_KINDS = (*GUIDED, "json_object")


def output_grammar(fields: Mapping[str, Any]) -> str | None:
    """Returns the grammar of the output, or None if it is free.

    Args:
        fields: the fields `response_format`, `structured_outputs` and `guided_…` of a request; None
            for those that it doesn't have.

    Raises:
        ValueError: a format is invalid, or there are several.
        InputError: a grammar is invalid.
    """
    grammars = list[str]()
    if (response_format := fields.get("response_format")) is not None:
        grammars += _response_format(response_format)
    if (structured := fields.get("structured_outputs")) is not None:
        if not isinstance(structured, dict) or not structured:
            raise ValueError(f"structured_outputs must be an object with one of {list(_KINDS)}")
        grammars += [
            _grammar(kind, value, f"structured_outputs.{kind}")
            for kind, value in structured.items()
            if value not in (None, False)
        ]
    for kind in GUIDED:
        if (value := fields.get(f"guided_{kind}")) is not None:
            grammars.append(_grammar(kind, value, f"guided_{kind}"))
    if len(grammars) > 1:
        raise ValueError(
            "the request demands several formats: send one of response_format, structured_outputs"
            " and guided_…, with one format"
        )
    return grammars[0] if grammars else None


def _response_format(value: Any) -> list[str]:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return []
    if kind == "json_object":
        return [json_grammar({"type": "object"})]
    if kind != "json_schema":
        raise ValueError(
            "response_format must be an object with the type text, json_object or json_schema"
        )
    definition = value.get("json_schema")
    schema = definition.get("schema") if isinstance(definition, dict) else None
    return [_grammar("json", schema, "response_format.json_schema.schema")]


def _grammar(kind: str, value: Any, path: str) -> str:
    if kind == "json":
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                value = None
        if not isinstance(value, dict | bool):
            raise ValueError(f"{path} must be a JSON schema")
        return json_grammar(value)
    if kind == "json_object" and value is True:
        return json_grammar({"type": "object"})
    if kind == "choice":
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            raise ValueError(f"{path} must be a list of non-empty strings")
        if not value:
            raise ValueError(f"{path} must contain at least one string")
        return choice_grammar(value)
    if kind not in _KINDS:
        raise ValueError(f"{path} is not a format: use one of {list(_KINDS)}")
    if not isinstance(value, str) or not value:
        raise ValueError(f"{path} must be a non-empty string")
    return regex_grammar(value) if kind == "regex" else parse_grammar(value)
