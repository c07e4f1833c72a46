import json
import random

import pytest

from llama_jax.errors import InputError
from llama_jax.inference.detokenize import stream_text
from llama_jax.tokenizer.sentencepiece import SentencePiece
from llama_jax.tokenizer.tokenizer import load_tokenizer
from llama_jax.tokenizer.train import train_tokenizer


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
def test_sentencepiece_models_reproduce_the_reference_ids(shared_data, model, vectors):
    expected = json.loads((shared_data / "tokenizers" / vectors).read_text())
    tokenizer = load_tokenizer(shared_data / "tokenizers" / model)
    assert tokenizer.n_vocab == expected["vocab_size"]
    assert tokenizer.bos_id == expected["bos_id"]
    assert tokenizer.end_ids == {expected["eos_id"]}
    assert len(expected["cases"]) >= 50
    for case in expected["cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]


def test_a_decoded_text_equals_the_encoded_text(trained):
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


def test_begin_and_end_tokens_are_added_on_request(trained):
    plain = trained.encode("a")
    assert trained.encode("a", bos=True) == [1, *plain]
    assert trained.encode("a", eos=True) == [*plain, 2]
    assert trained.encode("") == []


def test_a_streamed_text_has_complete_characters(trained):
    ids = trained.encode("é🦙 x ▁")
    texts = list(stream_text(trained, ids[:1], iter(ids[1:])))
    assert "".join(texts) == "é🦙 x ▁"
    assert not any("\ufffd" in text for text in texts)


def test_the_files_next_to_a_model_add_end_ids_and_the_template(shared_data, tmp_path):
    model = (shared_data / "tokenizers" / "tok512.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    template = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "a"}]
    config = {"chat_template": template, "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.end_ids == {2, 7}
    assert not tokenizer.add_bos
    assert isinstance(tokenizer, SentencePiece)
    assert tokenizer.template == "a"
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_text("b")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.end_ids == {2, 9}
    assert tokenizer.template == "b"
    # `files` contains all of these settings, although it has no config.json.
    again = tmp_path / "again"
    again.mkdir()
    for name, data in tokenizer.files.items():
        (again / name).write_bytes(data)
    assert load_tokenizer(again).end_ids == {2, 9}
    assert load_tokenizer(again).files == tokenizer.files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("generation_config.json", "[]", "generation_config.json is not a JSON object"),
        ("generation_config.json", '{"eos_token_id": "2"}', "give a token id, or a list of"),
        ("tokenizer_config.json", '{"chat_template": 1}', "give a Jinja template"),
        ("tokenizer_config.json", '{"chat_template": [{}]}', "list without a template named"),
    ],
)
def test_damaged_files_next_to_a_model_are_rejected(trained, tmp_path, name, content, message):
    (tmp_path / "tokenizer.model").write_bytes(trained.path.read_bytes())
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        load_tokenizer(tmp_path)


def test_the_tokenizer_of_llama2c_is_loaded(shared_data, tmp_path):
    folder = shared_data / "tokenizers"
    tokenizer = load_tokenizer(folder / "tok512.bin")
    model = load_tokenizer(folder / "tok512.model")
    assert (tokenizer.n_vocab, tokenizer.bos_id, tokenizer.end_ids) == (512, 1, {2})
    cases = json.loads((folder / "tok512_vectors.json").read_text())["cases"]
    # The model from which this file was converted removes extra spaces; the file can't state that.
    cases = [case for case in cases if case["decoded"] == case["text"]]
    assert len(cases) == 39
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["ids"]
    assert all(tokenizer.decode([300, i]) == model.decode([300, i]) for i in range(1, 512))
    data = (folder / "tok512.bin").read_bytes()
    for end in (100, 1000, len(data) - 1):
        (tmp_path / "tokenizer.bin").write_bytes(data[:end])
        with pytest.raises(InputError, match=r"tokenizer\.bin"):
            load_tokenizer(tmp_path)


def test_invalid_tokenizers_and_texts_are_rejected(trained, tmp_path):
    with pytest.raises(InputError, match=r"there is no tokenizer in .*: copy the model's"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="there is no tokenizer at"):
        load_tokenizer(tmp_path / "tokenizer.model")
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
