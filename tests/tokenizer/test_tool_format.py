"""Chat templates list tools, and show how the model calls them."""

import json

import pytest
from tool_templates import HERMES, LLAMA31, MISTRAL

from llama_jax.errors import InputError
from llama_jax.tokenizer.tokenizer import load_tokenizer
from llama_jax.tokenizer.tool_format import ToolFormat

USER = {"role": "user", "content": "What is 2+2?"}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def with_template(shared_data, folder, template):
    data = (shared_data / "tokenizers" / "mistral_v3_32768.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(data)
    (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            HERMES,
            ToolFormat(
                "<tool_call>\n",
                "arguments",
                "\n</tool_call>",
                "\n</tool_call>\n<tool_call>\n",
            ),
        ),
        (LLAMA31, ToolFormat("", "parameters", "", None)),
        (MISTRAL, ToolFormat("[TOOL_CALLS] [", "arguments", "]", ", ")),
    ],
)
def test_a_template_shows_how_its_model_calls_tools(shared_data, tmp_path, template, expected):
    tokenizer = with_template(shared_data, tmp_path, template)
    assert tokenizer.tool_format() == expected
    prompt = tokenizer.decode(tokenizer.encode_chat([USER], [ADD]))
    assert json.dumps(ADD)[1:30] in " ".join(prompt.split()).replace("{ ", "{")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "has no place for tools"),
        ("{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}", "as JSON objects"),
        (
            "{{ tools }}{% for m in messages %}{{ m.tool_calls }}{% endfor %}{{ eos_token }}",
            "as JSON objects",
        ),
    ],
)
def test_a_template_without_tools_refuses_them(shared_data, tmp_path, template, message):
    tokenizer = with_template(shared_data, tmp_path, template)
    assert tokenizer.encode_chat([USER], [])
    with pytest.raises(InputError, match=message):
        tokenizer.encode_chat([USER], [ADD])


def test_llama_3_lists_tools_in_the_first_message_of_the_user(llama3):
    """Meta's llama-models, llama3_1/prompt_format.md, "JSON based tool calling"."""
    system = {"role": "system", "content": "Be brief."}
    text = llama3.decode(llama3.encode_chat([system, USER], [ADD]))
    before, after = text.split("\n\nGiven the following functions, please respond with a JSON for")
    assert before.endswith("Be brief.user")
    listed = json.dumps(ADD, indent=4)
    assert after.endswith(f"Do not use variables.\n\n{listed}\n\nWhat is 2+2?assistant\n\n")
    assert llama3.tool_format() == ToolFormat("", "parameters", "", None)
    with pytest.raises(InputError, match="no message is the user's"):
        llama3.encode_chat([{"role": "tool", "content": "4"}], [ADD])


def test_a_chat_may_end_with_the_result_of_a_tool(llama3):
    messages = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "4"},
    ]
    ids = llama3.encode_chat(messages, [ADD])
    example = llama3.encode_example([*messages, {"role": "assistant", "content": "4"}], [ADD])
    assert ids == example.ids[: len(ids)]
    assert example.answers[-1][0] == len(ids)
    result = "<|start_header_id|>ipython<|end_header_id|>\n\n4<|eot_id|>"
    assert llama3.parse(result)[0] in ids


def test_llama_2_refuses_tools(llama2):
    with pytest.raises(InputError, match="has no place for them"):
        llama2.encode_chat([USER], [ADD])
    with pytest.raises(InputError, match="has no place for them"):
        llama2.tool_format()
