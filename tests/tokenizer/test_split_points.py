"""The spans of a split text have the tokens of the unsplit text."""

import gzip
import json
import random

import pytest

from llama_jax.tokenizer import split_points, tiktoken
from llama_jax.tokenizer.build import byte_level, sequence
from llama_jax.tokenizer.export import huggingface_files
from llama_jax.tokenizer.huggingface import TokenizerJson
from llama_jax.tokenizer.tokenizer import load_tokenizer
from llama_jax.tokenizer.train import train_tokenizer

# Random sequences of these contain words, merges and normalizations that could cross a split.
UNITS = [
    *"abZ.!?'-_0 \t\n\r,;\"#",
    "the ",
    " and",
    "\n\n",
    "\r\n",
    "  ",
    "   \n",
    "'s",
    "'LL",
    "12",
]
UNITS += ["▁", "\ufdd0", "\ufdd1", "\ufdd2", "é", "e\u0301", "é ", "你好", "。", "\u3000", "\x85"]
UNITS += [
    "\x1c",
    "\u2028",
    "\u00a0",
    "🦙",
    "👩\u200d👩",
    "\0",
    "<s>",
    "</s>",
    "<0x0A>",
    "<|eot_id|>",
]
UNITS += ["[INST]", "[REFERENCE_DOC_19]", "def f(x):\n    return x", "ﬁ", "ＡＢ", "ß"]


def random_text(seed):
    rng = random.Random(seed)
    chosen = rng.choices(UNITS, k=rng.randint(2, 20))
    return "".join(rng.choices(chosen, k=400))


def with_components(tokenizer, **components):
    """Returns the tokenizer with other components in its tokenizer.json."""
    content = json.loads(tokenizer.files["tokenizer.json"]) | components
    return TokenizerJson(tokenizer.path, json.dumps(content).encode())


METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
DIGITS = {"type": "Digits", "individual_digits": True}  # SmolLM2 splits digits, then GPT-2's words


@pytest.fixture(scope="module")
def known(shared_data, tmp_path_factory):
    """Tokenizers of every kind with safe splits, by name."""
    root = tmp_path_factory.mktemp("tokenizers")
    packed = shared_data / "tokenizers/llama3_tiktoken_128000.model.gz"
    ranks = gzip.decompress(packed.read_bytes()).splitlines(keepends=True)
    (root / "llama3.model").write_bytes(b"".join(ranks[:4000]))
    shakespeare = (shared_data / "text/tinyshakespeare.txt").read_text()
    train_tokenizer([shakespeare[:200_000]], root / "own.model", 800)
    files = {"llama3": root / "llama3.model", "own": root / "own.model"}
    for name in ("llama_sentencepiece_32000", "mistral_v3_32768", "tok512"):
        files[name] = shared_data / "tokenizers" / f"{name}.model"
    loaded = {name: load_tokenizer(path) for name, path in files.items()}
    for name in ("llama3", "own", "llama_sentencepiece_32000"):
        data = huggingface_files(loaded[name])["tokenizer.json"]
        loaded[f"{name}.json"] = TokenizerJson(root, data)
    llama2 = loaded["llama_sentencepiece_32000.json"]
    for scheme in ("first", "always"):  # as newer versions write it
        metaspace = METASPACE | {"prepend_scheme": scheme}
        loaded[f"metaspace {scheme}"] = with_components(
            llama2, normalizer=None, pre_tokenizer=metaspace
        )
    gpt2 = sequence("pretokenizers", DIGITS, byte_level(split_words=True))
    loaded["gpt2"] = with_components(loaded["llama3.json"], pre_tokenizer=gpt2)
    return loaded


def check_spans(tokenizer, text, part=1000):
    parts = [text[i : i + part] for i in range(0, len(text), part)]
    spans = list(split_points.split_text(parts, tokenizer.safe_split))
    assert "".join(spans) == text
    assert all(spans)
    ids = [i for n, span in enumerate(spans) for i in tokenizer.encode(span, continued=n > 0)]
    assert ids == tokenizer.encode(text), text
    return spans


NAMES = ["llama3", "llama3.json", "own", "own.json", "llama_sentencepiece_32000", "tok512"]
NAMES += ["llama_sentencepiece_32000.json", "mistral_v3_32768", "metaspace first"]
NAMES += ["metaspace always", "gpt2"]


@pytest.mark.parametrize("name", NAMES)
def test_the_spans_have_the_tokens_of_the_text(shared_data, known, name, monkeypatch):
    text = (shared_data / "text/tinyshakespeare.txt").read_text()[:50_000]
    monkeypatch.setattr(split_points, "SPAN_CHARACTERS", 1000)
    monkeypatch.setattr(tiktoken, "_MAX_PART", 3000)
    spans = check_spans(known[name], text)
    assert len(spans) >= len(text) // 4000
    assert max(map(len, spans)) <= 4000
    monkeypatch.setattr(split_points, "SPAN_CHARACTERS", 20)
    monkeypatch.setattr(tiktoken, "_MAX_PART", 90)
    counts = [len(check_spans(known[name], random_text(seed), 37)) for seed in range(100)]
    assert sum(counts) > 10 * len(counts)


def test_a_text_without_a_safe_split_is_split_at_the_maximum_length(known, monkeypatch):
    monkeypatch.setattr(split_points, "SPAN_CHARACTERS", 100)
    monkeypatch.setattr(split_points, "MAX_SPAN_CHARACTERS", 400)
    tokenizer = known["own"]
    spans = list(split_points.split_text(["the" * 1000], tokenizer.safe_split))
    assert [len(span) for span in spans] == [399, *[400] * 6, 201]
    ids = [i for n, span in enumerate(spans) for i in tokenizer.encode(span, continued=n > 0)]
    assert tokenizer.decode(ids) == "the" * 1000


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"model": {"type": "Unigram", "vocab": []}},
        {"added_tokens": [{"content": "a b", "special": False}]},
        {"added_tokens": [{"content": "a", "special": False, "rstrip": True}]},
    ],
)
def test_texts_of_an_unknown_kind_of_tokenizer_are_not_split(known, change):
    content = json.loads(known["llama3.json"].files["tokenizer.json"])
    text = "some words\nand a line " * 10
    assert split_points.safe_split_of_json(content)(text) > 0
    assert split_points.safe_split_of_json(content | change)(text) == 0
