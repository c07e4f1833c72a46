import json
import random

import pytest

from llama_jax.data.tokenizer import SentencePiece, load_tokenizer, train_tokenizer
from llama_jax.errors import InputError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    text = "def add(a, b):\n    return a + b  # 2024, 1234567890\n" * 50 + "naïve café ▁ x\n" * 20
    train_tokenizer([text, "other = {'key': [1, 2, 3]}\n" * 30], path, 330)
    return load_tokenizer(path)


@pytest.mark.parametrize(
    ("model", "vectors"),
    [
        ("llama_sentencepiece_32000.model", "llama_spm_vectors.json"),
        ("tok512.model", "tok512_vectors.json"),
        ("mistral_v1_32000.model", "mistral_v1_vectors.json"),
        ("mistral_v3_32768.model", "mistral_v3_vectors.json"),
    ],
)
def test_known_vectors_hold_exactly(shared_data, model, vectors):
    expected = json.loads((shared_data / "tokenizers" / vectors).read_text())
    tokenizer = load_tokenizer(shared_data / "tokenizers" / model)
    assert tokenizer.n_vocab == expected["vocab_size"]
    assert tokenizer.bos_id == expected["bos_id"]
    assert tokenizer.end_ids == {expected["eos_id"]}
    assert len(expected["cases"]) >= 50
    for case in expected["cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]


def test_encoding_and_decoding_gives_back_every_byte(trained):
    rng = random.Random(0)
    odd = [
        "a",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\0",
        "▁",
        "\ufdd0",
        "\ufdd1",
        "\ufdd2",
        "é",
        "e\u0301",
    ]
    odd += ["ﬁ", "\u00a0", "\u3000", "\ufeff", "🦙", "<s>", "</s>", "<0x0A>", "7", "２"]
    for _ in range(3000):
        drawn = [chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))]
        text = "".join(rng.choices(odd + drawn, k=rng.randrange(12)))
        assert trained.decode(trained.encode(text)) == text
        assert trained.decode(trained.encode(text, bos=True, eos=True)) == text


def test_numbers_are_split_into_digits(trained):
    assert trained.encode("1234567890", bos=True, eos=True)[0] == trained.bos_id
    pieces = [trained.decode([i]) for i in trained.encode("x 1234567890")]
    assert [p for p in pieces if p.strip().isdigit()] == list("1234567890")


def test_the_begin_and_end_tokens_are_put_where_asked(trained):
    plain = trained.encode("a")
    assert trained.encode("a", bos=True) == [1, *plain]
    assert trained.encode("a", eos=True) == [*plain, 2]
    assert trained.encode("") == []


def test_bad_tokenizers_and_texts_are_refused(trained, tmp_path):
    with pytest.raises(InputError, match="there is no tokenizer at"):
        load_tokenizer(tmp_path)
    broken = tmp_path / "broken.model"
    broken.write_bytes(trained.path.read_bytes()[:300])
    with pytest.raises(InputError, match="is not a SentencePiece model"):
        load_tokenizer(broken)
    with pytest.raises(InputError, match="too small to train a tokenizer of 4096"):
        train_tokenizer(["a few words"], tmp_path / "x.model", 4096)
    with pytest.raises(InputError, match="half of a surrogate pair"):
        trained.encode("a\ud800")
    with pytest.raises(InputError, match="token 330 is outside the 330 tokens"):
        trained.decode([330])
    assert isinstance(trained, SentencePiece)
