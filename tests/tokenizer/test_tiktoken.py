import base64
import json
import random

import pytest

from llama_jax.errors import InputError
from llama_jax.inference.detokenize import stream_text
from llama_jax.tokenizer.tiktoken import SPECIAL_TOKENS, Tiktoken, split_long
from llama_jax.tokenizer.tokenizer import load_tokenizer


def small_file(n: int = 300) -> bytes:
    """Returns a tokenizer.model with n ranks: all bytes, and pairs of a space and a byte."""
    pieces = [bytes([i]) for i in range(256)] + [b" " + bytes([i]) for i in range(33, n - 223)]
    return b"".join(b"%s %d\n" % (base64.b64encode(p), i) for i, p in enumerate(pieces))


def test_llama_3_reproduces_the_reference_ids(shared_data, llama3):
    expected = json.loads((shared_data / "tokenizers" / "llama3_vectors.json").read_text())
    assert llama3.n_vocab == expected["vocab_size"]
    assert llama3.bos_id == expected["bos_id"]
    assert llama3.end_ids == set(expected["stop_tokens"])
    assert len(SPECIAL_TOKENS) == len(set(SPECIAL_TOKENS)) == 256
    assert expected["special_tokens"].items() <= llama3.special.items()
    assert len(expected["cases"]) == 50
    for case in expected["cases"]:
        assert llama3.encode(case["text"]) == case["ids"]
        assert llama3.decode(case["ids"]) == case["decoded"]
        framed = llama3.encode(case["text"], bos=True, eos=True)
        assert framed == [expected["bos_id"], *case["ids"], expected["eos_id"]]
        assert llama3.decode(framed) == case["text"]


def test_long_texts_are_split_as_in_metas_code():
    def reference_split(text: str):
        """Splits a text as Meta's tokenizer does, one character after another."""
        for start in range(0, len(text), 400_000):
            part, part_start, run = text[start : start + 400_000], 0, 0
            for i, character in enumerate(part):
                same = i > 0 and character.isspace() == part[i - 1].isspace()
                run = run + 1 if same else 1
                if run > 25_000:
                    yield part[part_start:i]
                    part_start, run = i, 1
            yield part[part_start:]

    rng = random.Random(0)
    lengths = [1, 1, 7, 24_999, 25_000, 25_001, 50_001, 60_000]
    for _ in range(10):
        units = rng.choices(["a", "b", " ", "\n", "🦙", "\x1c", "\u3000", "a b"], k=12)
        text = "".join(unit * rng.choice(lengths) for unit in units)
        parts = list(split_long(text))
        assert parts == list(reference_split(text))
        assert "".join(parts) == text
    assert list(split_long("")) == []


def test_a_small_vocabulary_streams_complete_characters(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(small_file(300))
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, Tiktoken)
    assert tokenizer.n_vocab == 300 + 256
    assert tokenizer.bos_id == 300
    assert tokenizer.end_ids == {301, 308, 309}
    ids = tokenizer.encode("é🦙 !x<|eot_id|>", bos=True)
    assert tokenizer.decode(ids) == "é🦙 !x<|eot_id|>"
    assert tokenizer.decode(ids[:2]) == "\ufffd"
    texts = list(stream_text(tokenizer, ids[:2], iter([*ids[2:], 309])))
    assert texts[:2] == ["", "é"]
    texts = list(stream_text(tokenizer, ids[:1], iter([*ids[1:], 309])))
    assert "".join(texts) == "é🦙 !x<|eot_id|>"
    assert not any("\ufffd" in text for text in texts)


def test_damaged_files_and_invalid_texts_are_rejected(tmp_path):
    path = tmp_path / "tokenizer.model"
    lines = small_file().splitlines(keepends=True)
    damaged = {
        "tokenizer.model:301: not a new piece": [*lines, b"6Zs"],
        "tokenizer.model:5: not a new piece": [*lines[:4], b"?? 4\n", *lines[5:]],
        "tokenizer.model:300: not a new piece": [*lines[:-1], b"ISE= x\n"],
        "tokenizer.model:301: not a new piece in base64": [*lines, lines[0].split()[0] + b" 300"],
        "no piece has the rank 290": [*lines[:290], *lines[291:]],
        "a single byte is missing": lines[:200],
    }
    for message, content in damaged.items():
        path.write_bytes(b"".join(content))
        with pytest.raises(InputError, match=message):
            load_tokenizer(path)
    path.write_bytes(b"?" + small_file())
    with pytest.raises(InputError, match="not in tiktoken's format"):
        load_tokenizer(path)
    path.write_bytes(small_file())
    tokenizer = load_tokenizer(path)
    with pytest.raises(InputError, match="half of a surrogate pair"):
        tokenizer.encode("a\ud800")
    with pytest.raises(InputError, match="token 556 is outside the 556 tokens"):
        tokenizer.decode([556])
