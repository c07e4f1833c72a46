"""Formats of the output with the real engine: every generated document is valid."""

import json
import re

import jax
import jsonschema
import openai
import pydantic
import pytest
from conftest import load_reference
from fake_engine import serving

from llama_jax.inference.engine.engine import Engine
from llama_jax.model.weights import unstack_layers
from llama_jax.parallel.mesh import one_device_mesh
from llama_jax.tokenizer.tokenizer import load_tokenizer

# A template that lists tools as briefly as it can: the context is short.
TEMPLATE = """\
{%- for tool in tools or [] %}{{- tool.function.name + ' ' }}{%- endfor %}
{%- for message in messages %}
    {{- message.content + '\n' }}
    {%- for call in message.tool_calls or [] %}
        {{- '<call>{"name": "' + call.function.name + '", "arguments": ' }}
        {{- (call.function.arguments | tojson) + '}</call>' }}
    {%- endfor %}
    {{- eos_token if message.role == 'assistant' }}
{%- endfor %}
"""


@pytest.fixture(scope="module")
def client(shared_data, tmp_path_factory):
    folder, copy = shared_data / "stories260K" / "hf", tmp_path_factory.mktemp("template")
    (copy / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    with jax.set_mesh(one_device_mesh()):
        config, model = load_reference(folder)
        engine = Engine(config, unstack_layers(model), rows=3, context=256)
    with (
        serving(load_tokenizer(copy), engine, max_tokens=250) as (_, url),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client
    engine.close()


def complete(client, prompt="Once upon a time", **fields):
    fields = {"model": "stories", "max_tokens": 120, "temperature": 1, "seed": 0} | fields
    return client.completions.create(prompt=prompt, **fields)


def chat(client, **fields):
    fields = {"model": "stories", "max_tokens": 200, "temperature": 1, "seed": 0} | fields
    messages = [{"role": "user", "content": "Once upon a time"}]
    return client.chat.completions.create(messages=messages, **fields)


def json_schema(schema):
    return {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}}


def of(properties, **keywords):
    """Returns the schema of an object that has just these properties."""
    return {
        "type": "object", "properties": properties, "required": [*properties],
        "additionalProperties": False, **keywords,
    }  # fmt: skip


SHORT = {"type": "string", "maxLength": 8}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
SCHEMAS = [
    {"type": "boolean"},
    {"type": "null"},
    {"enum": [1, "two", None, {"three": [3]}]},
    {"const": {"a": "é🦙\"\\\n"}},
    {"type": "integer", "minimum": -20, "maximum": 300},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "multipleOf": 0.25},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "pattern": "^[A-Z][a-z]{1,4}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "ipv4"},
    {"type": "array", "items": DIGIT, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [DIGIT, SHORT], "items": False, "minItems": 2},
    of({"name": SHORT, "age": DIGIT}),
    of({"nested": of({"list": {"type": "array", "items": of({"x": DIGIT}), "maxItems": 2}})}),
    {"type": ["string", "null"], "maxLength": 3},
    {"anyOf": [of({"kind": {"const": "a"}}), of({"kind": {"const": "b"}, "n": DIGIT})]},
    {"$ref": "#/$defs/node", "$defs": {"node": of({
        "value": DIGIT, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}
    })}},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 12}]},
    of({"a": DIGIT}) | {"properties": {"a": DIGIT, "b": SHORT}},
]  # fmt: skip


def test_every_document_is_valid_by_its_schema(client):
    """Drawn with temperature 1; a document that max_tokens cuts off would be none."""
    checker, finished = jsonschema.FormatChecker(), 0
    for schema in SCHEMAS:
        completion = complete(client, n=3, extra_body={"structured_outputs": {"json": schema}})
        for choice in completion.choices:
            if choice.finish_reason == "stop":
                document = json.loads(choice.text)
                jsonschema.validate(document, schema, format_checker=checker)
                finished += 1
    assert finished >= 3 * len(SCHEMAS) - 3


def test_formats_hold_in_chats_streamed_and_complete(client):
    schema = of({"name": SHORT, "ages": {"type": "array", "items": DIGIT, "maxItems": 3}})
    fields = {"response_format": json_schema(schema), "n": 3}
    complete_texts = [choice.message.content for choice in chat(client, **fields).choices]
    streamed = ["", "", ""]
    for chunk in chat(client, stream=True, **fields):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == complete_texts
    for text in streamed:
        jsonschema.validate(json.loads(text), schema)
    assert len({*streamed}) > 1


def test_the_client_parses_pydantic_models(client):
    class Person(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=6)
        age: int = pydantic.Field(ge=0, le=120)
        friends: list[bool] = pydantic.Field(max_length=2)

    parsed = client.chat.completions.parse(
        model="stories", messages=[{"role": "user", "content": "a"}], response_format=Person
    )
    assert isinstance(parsed.choices[0].message.parsed, Person)


def test_json_objects_regular_expressions_choices_and_grammars(client):
    extra = [
        ({"guided_regex": "[a-c]{3}-[0-9]{2}"}, "[a-c]{3}-[0-9]{2}"),
        ({"structured_outputs": {"regex": "(ab|cd)/e"}}, "(ab|cd)/e"),
        ({"guided_choice": ["positive", "negative"]}, "positive|negative"),
        ({"guided_grammar": 'root ::= "x" [0-9]'}, "x[0-9]"),
        ({"structured_outputs": {"grammar": 'start: "y" /[0-9]/'}}, "y[0-9]"),
    ]
    for fields, pattern in extra:
        for seed in range(3):
            text = complete(client, seed=seed, extra_body=fields).choices[0].text
            assert re.fullmatch(pattern, text), fields
    chosen = chat(client, response_format={"type": "json_object"})
    text = chosen.choices[0].message.content
    assert text.startswith("{")
    assert chosen.choices[0].finish_reason == "length" or isinstance(json.loads(text), dict)


def test_a_format_works_with_stop_strings_log_probabilities_and_company(client):
    """The text is a cut of the same request without stop strings; others don't change."""
    fields = {"extra_body": {"guided_regex": "(abc ){20}"}, "logprobs": 2}
    completion = complete(client, **fields)
    choice = completion.choices[0]
    assert choice.text == "abc " * 20
    assert choice.finish_reason == "stop"
    assert len(choice.logprobs.tokens) == completion.usage.completion_tokens
    stopped = complete(client, stop="bc abc", **fields).choices[0]
    assert (stopped.text, stopped.finish_reason) == ("a", "stop")
    cut = complete(client, max_tokens=3, **fields).choices[0]
    assert (cut.finish_reason, len(cut.logprobs.tokens)) == ("length", 3)
    assert choice.text.startswith(cut.text)


BAD = [
    ({"response_format": {"type": "yaml"}}, "type text, json_object or json_schema"),
    ({"response_format": "json"}, "type text, json_object or json_schema"),
    ({"response_format": {"type": "json_schema"}}, "must be a JSON schema"),
    ({"response_format": json_schema({"not": {}})}, "Unimplemented keys"),
    ({"guided_regex": "[a"}, "the grammar is invalid"),
    ({"guided_regex": 5}, "guided_regex must be a non-empty string"),
    ({"guided_choice": []}, "guided_choice must contain at least one string"),
    ({"guided_choice": "a"}, "guided_choice must be a list of non-empty strings"),
    ({"guided_grammar": "root ::= ("}, "the grammar is invalid"),
    ({"guided_json": "{"}, "guided_json must be a JSON schema"),
    ({"structured_outputs": {}}, "structured_outputs must be an object with one of"),
    ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml is not a format"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "demands several formats"),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos can't be combined"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_an_invalid_format_is_one_sentence(client, fields, message):
    with pytest.raises(openai.BadRequestError) as raised:
        complete(client, extra_body=fields)
    assert message in raised.value.body["message"]
    assert "\n" not in raised.value.body["message"]


UNIT = {"enum": ["celsius", "kelvin"]}
WEATHER = of({"city": SHORT, "unit": UNIT})
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in (("add", of({"a": DIGIT, "b": DIGIT})), ("weather", WEATHER))
]
SCHEMA_OF = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}


def test_required_calls_are_valid_streamed_and_complete(client):
    """Also with several choices; a call that is named is the one."""
    fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    names = set()
    for seed in range(4):
        choice = chat(client, seed=seed, **fields).choices[0]
        (call,) = choice.message.tool_calls
        assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA_OF[call.function.name])
        names.add(call.function.name)
        with client.chat.completions.stream(
            model="stories", messages=[{"role": "user", "content": "Once upon a time"}],
            temperature=1, seed=seed, max_tokens=200, **fields,
        ) as stream:  # fmt: skip
            streamed = stream.get_final_completion().choices[0]
        (again,) = streamed.message.tool_calls
        assert (again.function.name, again.function.arguments) == (
            call.function.name, call.function.arguments,
        )  # fmt: skip
        assert streamed.finish_reason == "tool_calls"
    assert names <= SCHEMA_OF.keys()
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in chat(client, tools=TOOLS, tool_choice=named, n=3).choices:
        (call,) = choice.message.tool_calls
        assert call.function.name == "weather"
        jsonschema.validate(json.loads(call.function.arguments), WEATHER)


def test_required_calls_may_be_several(client):
    choice = chat(client, tools=TOOLS, tool_choice="required", temperature=2).choices[0]
    *complete_calls, last = choice.message.tool_calls
    if choice.finish_reason == "tool_calls":
        complete_calls.append(last)
    for call in complete_calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA_OF[call.function.name])


def test_the_client_parses_the_arguments_of_calls(client):
    class Person(pydantic.BaseModel):
        age: int = pydantic.Field(ge=0, le=120)

    parsed = client.chat.completions.parse(
        model="stories",
        messages=[{"role": "user", "content": "a"}],
        tools=[openai.pydantic_function_tool(Person)],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    (call,) = parsed.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Person)


def test_the_tokenizer_is_available(client):
    http = client._client
    root = str(client.base_url).removesuffix("/v1/")

    def post(path, body):
        return http.post(root + path, json=body).json()

    tokens = post("/tokenize", {"prompt": "Once upon a time"})
    assert tokens["count"] == len(tokens["tokens"])
    assert (tokens["tokens"][0], tokens["max_model_len"], tokens["token_strs"]) == (1, 256, None)
    bare = {"prompt": "Once upon é", "add_special_tokens": False, "return_token_strs": True}
    plain = post("/tokenize", bare)
    assert "".join(plain["token_strs"]).strip().startswith("Once upon")
    assert post("/detokenize", {"tokens": plain["tokens"]}) == {"prompt": "Once upon é"}
    assert post("/detokenize", {"tokens": [1, *plain["tokens"]]})["prompt"].startswith("<s>")
    messages = [{"role": "user", "content": "a"}]
    chat_tokens = post("/tokenize", {"messages": messages})["count"]
    usage = chat(client, max_tokens=1).usage
    assert 0 < chat_tokens < usage.prompt_tokens
    assert post("/tokenize", {"messages": messages, "tools": TOOLS})["count"] > chat_tokens
