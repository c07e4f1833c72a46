import json
import random

import pytest

from llama_jax.errors import InputError
from llama_jax.inference.detokenize import stream_text
from llama_jax.tokenizer.export import huggingface_files, tiktoken_bytes
from llama_jax.tokenizer.huggingface import TokenizerJson
from llama_jax.tokenizer.tokenizer import load_tokenizer
from llama_jax.tokenizer.train import train_tokenizer

SENTENCEPIECE = {
    "llama_spm": "llama_sentencepiece_32000.model",
    "tok512": "tok512.model",
    "mistral_v1": "mistral_v1_32000.model",
    "mistral_v3": "mistral_v3_32768.model",
}
CHAT = [
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": "Hé ▁ "},
    {"role": "assistant", "content": " Hello! "},
    {"role": "user", "content": "\n2+2?"},
]


def write(files, folder):
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def folders(shared_data, llama3, tmp_path_factory):
    """By name: a tokenizer, its exported folder, and the tokenizer.json in that folder, loaded."""
    root = tmp_path_factory.mktemp("exported")
    originals = {"llama3": llama3}
    for name, file in SENTENCEPIECE.items():
        originals[name] = load_tokenizer(shared_data / "tokenizers" / file)
    exported = {}
    for name, tokenizer in originals.items():
        folder = write(huggingface_files(tokenizer), root / name)
        exported[name] = tokenizer, folder, load_tokenizer(folder / "tokenizer.json")
    return exported


@pytest.mark.parametrize("name", ["llama3", *SENTENCEPIECE])
def test_the_tokenizer_json_reproduces_the_reference_ids(shared_data, folders, name):
    vectors = json.loads((shared_data / "tokenizers" / f"{name}_vectors.json").read_text())
    original, _, tokenizer = folders[name]
    assert isinstance(tokenizer, TokenizerJson)
    assert tokenizer.n_vocab == vectors["vocab_size"]
    assert tokenizer.bos_id == vectors["bos_id"]
    assert tokenizer.end_ids == original.end_ids
    assert tokenizer.add_bos
    assert len(vectors["cases"]) == 50
    for case in vectors["cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode([tokenizer.bos_id, *case["ids"]]) == case["decoded"]
    if name != "mistral_v3":  # which has another chat format
        assert tokenizer.encode_chat(CHAT) == original.encode_chat(CHAT)


@pytest.mark.parametrize("name", ["llama3", *SENTENCEPIECE])
def test_transformers_reproduces_the_reference_ids(shared_data, folders, name):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    vectors = json.loads((shared_data / "tokenizers" / f"{name}_vectors.json").read_text())
    original, folder, loaded = folders[name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for case in vectors["cases"]:
        ids = tokenizer(case["text"], split_special_tokens=True)["input_ids"]
        assert ids == [vectors["bos_id"], *case["ids"]]
        if "ids_special" in case:
            assert tokenizer(case["text"])["input_ids"][1:] == case["ids_special"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
    if name != "mistral_v3":
        encoded = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
        assert encoded["input_ids"] == original.encode_chat(CHAT) == loaded.encode_chat(CHAT)
        if name != "llama3":  # SentencePiece with a template next to it
            assert encoded["input_ids"] == load_tokenizer(folder).encode_chat(CHAT)


@pytest.mark.parametrize("name", ["llama3", *SENTENCEPIECE])
def test_the_tokenizer_json_agrees_with_the_original_on_odd_texts(folders, name):
    original, _, tokenizer = folders[name]
    rng = random.Random(0)
    odd = ["a", " ", "   ", "\n", "\r\n", "\t", "\0", "▁", "é", "e\u0301", "ﬁ", "\u3000", "🦙"]
    odd += ["<s>", "<|eot_id|>", "<0x0A>", "123", "'s", "'LL", " x", "Hello", " the", "мир", "..."]
    for _ in range(400):
        drawn = [chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))]
        text = "".join(rng.choices(odd + drawn, k=rng.randrange(14)))
        ids = original.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == original.decode(ids)
    for text in ("a" * 99, "xyz" * 33, " " * 77, "=-" * 40):
        assert tokenizer.encode(text) == original.encode(text)


def test_the_tokenizer_json_converts_back_to_the_original_tiktoken_file(folders):
    original, folder, _ = folders["llama3"]
    data = (folder / "tokenizer.json").read_bytes()
    assert tiktoken_bytes(data) == original.path.read_bytes()
    assert tiktoken_bytes((folders["tok512"][1] / "tokenizer.json").read_bytes()) is None


@pytest.mark.parametrize("change", ["merge", "rank", "special", "pattern"])
def test_another_tokenizer_json_has_no_tiktoken_file(change, tmp_path):
    from test_tiktoken import small_file

    (tmp_path / "tokenizer.model").write_bytes(small_file())
    data = huggingface_files(load_tokenizer(tmp_path))["tokenizer.json"]
    assert tiktoken_bytes(data) == small_file()
    content = json.loads(data)
    if change == "merge":
        content["model"]["merges"].pop()
    elif change == "rank":
        vocab = content["model"]["vocab"]
        vocab["Ġ!"], vocab["Ġ'"] = vocab["Ġ'"], vocab["Ġ!"]
    elif change == "special":
        content["added_tokens"][9]["content"] = "<|im_end|>"
    else:
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+"
    assert tiktoken_bytes(json.dumps(content).encode()) is None


def test_exported_tokenizers_of_our_own_preserve_every_character(tmp_path):
    text = "def add(a, b):\n    return a + b  # 2024, 1234567890\n" * 50 + "naïve café ▁ x\n" * 20
    train_tokenizer([text], tmp_path / "tokenizer.model", 320)
    original = load_tokenizer(tmp_path)
    folder = write(huggingface_files(original), tmp_path / "exported")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    for odd in ("▁ \ufdd0\ufdd1 ▁\ufdd2", "  a  \n", "\ufdd0", "ﬁ２\u3000", "🦙▁🦙", "", " "):
        assert tokenizer.encode(odd) == original.encode(odd)
        assert tokenizer.decode(tokenizer.encode(odd, bos=True, eos=True)) == odd
    ids = tokenizer.encode("é🦙🦙 x")
    texts = list(stream_text(tokenizer, ids[:1], iter(ids[1:])))
    assert "".join(texts) == "é🦙🦙 x"
    assert not any("\ufffd" in text for text in texts)


def test_the_files_of_a_hugging_face_folder_are_exported_unchanged(folders):
    folder = folders["tok512"][1]
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert huggingface_files(load_tokenizer(folder)) == files
    del files["tokenizer.model"]
    assert huggingface_files(load_tokenizer(folder / "tokenizer.json")) == files


def test_a_tokenizer_json_alone_gives_begin_and_end_tokens(folders, tmp_path):
    for name in ("llama3", "llama_spm"):
        original, folder, _ = folders[name]
        alone = write({"tokenizer.json": (folder / "tokenizer.json").read_bytes()}, tmp_path / name)
        tokenizer = load_tokenizer(alone)
        assert tokenizer.bos_id == original.bos_id
        assert tokenizer.end_ids == original.end_ids
        if name == "llama3":
            assert tokenizer.encode_chat(CHAT) == original.encode_chat(CHAT)
            continue
        with pytest.raises(InputError, match="has no chat format"):
            tokenizer.encode_chat(CHAT)
        again = load_tokenizer(write(huggingface_files(tokenizer), tmp_path / "again"))
        assert (again.bos_id, again.end_ids) == (original.bos_id, original.end_ids)


def test_damaged_tokenizer_json_files_are_rejected(folders, tmp_path):
    data = (folders["tok512"][1] / "tokenizer.json").read_bytes()
    path = tmp_path / "tokenizer.json"
    damaged = {
        "is not a tokenizer.json, or is truncated": data[:5000],
        "is not a tokenizer.json": b'{"model": 1}',
        "one of its ids up to 511 is missing": data.replace(b'"ed": 266', b'"ed": 267'),
        "or occurs twice": data.replace(b'"<0x0B>"', b'"<0x0C>"'),
    }
    assert data.count(b'"ed": 266') == 1
    for message, content in damaged.items():
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            load_tokenizer(tmp_path)
    path.write_bytes(data)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<begin>"}}')
    with pytest.raises(InputError, match=r"has no '<begin>', but the tokenizer_config\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="half of a surrogate pair"):
        tokenizer.encode("a\ud800")
    with pytest.raises(InputError, match="token 512 is outside the 512 tokens"):
        tokenizer.decode([512])


@pytest.mark.parametrize("name", ["llama3", *SENTENCEPIECE])
def test_the_bytes_of_tokens_form_their_text(shared_data, folders, name):
    """The original and its tokenizer.json have the same bytes; special tokens have none."""
    vectors = json.loads((shared_data / "tokenizers" / f"{name}_vectors.json").read_text())
    original, _, tokenizer = folders[name]
    pieces = original.token_bytes()
    assert tokenizer.token_bytes() == pieces
    assert len(pieces) == original.n_vocab
    assert {i for i, piece in enumerate(pieces) if piece is None} >= {*original.special.values()}
    letter = original.encode("a")
    for case in vectors["cases"]:
        text = b"".join(pieces[i] for i in case["ids"]).decode(errors="replace")
        assert f"a{text}" == original.decode([*letter, *case["ids"]])
