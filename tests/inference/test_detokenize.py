import gzip
import json
import random
import re

import pytest

from llama_jax.inference.detokenize import Detokenizer, stream_text
from llama_jax.tokenizer.export import huggingface_files
from llama_jax.tokenizer.tokenizer import load_tokenizer

VECTORS = {
    "llama_sentencepiece_32000.model": "llama_spm_vectors.json",
    "tok512.model": "tok512_vectors.json",
    "tok512.bin": "tok512_vectors.json",
    "mistral_v1_32000.model": "mistral_v1_vectors.json",
    "mistral_v3_32768.model": "mistral_v3_vectors.json",
    "llama3_tiktoken_128000.model.gz": "llama3_vectors.json",
}
ODD = "naïve 🦙🦙 ▁ \ufdd0\ufdd1 ﬁ２\u3000é  x\n"


@pytest.fixture(scope="module", params=[*VECTORS, "llama 2 as tokenizer.json", "our own"])
def tokenizer(request, shared_data, token_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "our own":
        return load_tokenizer(token_folder)
    if request.param == "llama 2 as tokenizer.json":
        model = load_tokenizer(shared_data / "tokenizers" / "llama_sentencepiece_32000.model")
        for name, data in huggingface_files(model).items():
            (folder / name).write_bytes(data)
        return load_tokenizer(folder / "tokenizer.json")
    path = shared_data / "tokenizers" / request.param
    if path.suffix == ".gz":
        (folder / "tokenizer.model").write_bytes(gzip.decompress(path.read_bytes()))
        return load_tokenizer(folder)
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def texts(tokenizer, shared_data):
    vectors = VECTORS.get(tokenizer.path.name, "llama3_vectors.json")
    cases = json.loads((shared_data / "tokenizers" / vectors).read_text())["cases"]
    return [*(case["text"] for case in cases), ODD]


def test_the_pieces_join_to_the_text_wherever_the_prompt_ends(tokenizer, texts):
    assert len(texts) > 50
    for text in texts:
        for ids in (tokenizer.encode(text), tokenizer.encode(text, bos=True, eos=True)):
            for end in {0, 1, 2, len(ids) // 2, len(ids)}:
                pieces = list(stream_text(tokenizer, ids[:end], iter(ids[end:])))
                assert "".join(pieces) == tokenizer.decode(ids)


def test_no_piece_ends_inside_a_character(tokenizer, texts):
    for text in texts:
        if "\N{REPLACEMENT CHARACTER}" not in text:
            pieces = list(stream_text(tokenizer, [], iter(tokenizer.encode(text))))
            assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_text_is_returned_as_soon_as_its_characters_are_complete(tokenizer):
    ids = tokenizer.encode("Once upon a time")
    detokenizer = Detokenizer(tokenizer, ids[:1])
    assert all(detokenizer.add(token) for token in ids[1:])
    assert detokenizer.flush() == ""


def test_invalid_bytes_are_streamed_as_the_tokenizer_decodes_them(tokenizer):
    def comparable(text):
        # ByteFallback in a tokenizer.json also replaces complete characters next to a broken one.
        replaces = tokenizer.path.name == "tokenizer.json"
        return re.sub("[^a ]", "", text) if replaces else text

    rng = random.Random(0)
    common = [i for c in "aé🦙\ufdd0▁ " for i in tokenizer.encode(c)]
    partial = [i for i in range(tokenizer.n_vocab) if "\ufffd" in tokenizer.decode([i])]
    assert len(partial) >= 128
    for length in (3, 10, 40, 200):
        for _ in range(20):
            ids = rng.choices(common, k=length) + rng.choices(partial, k=length)
            rng.shuffle(ids)
            text = "".join(stream_text(tokenizer, [], iter(ids)))
            assert comparable(text) == comparable(tokenizer.decode(ids))


def test_the_cost_of_a_token_does_not_grow_with_the_text(tokenizer, monkeypatch):
    lengths = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: lengths.append(len(ids)) or decode(ids))
    broken = tokenizer.encode("🦙")[-2]
    for ids in (tokenizer.encode("some words and 🦙 " * 200), [broken] * 500):
        "".join(list(stream_text(tokenizer, [tokenizer.bos_id], iter(ids))))
        assert max(lengths) < 40


def test_the_text_of_a_token_is_the_text_that_it_adds(tokenizer):
    detokenizer = Detokenizer(tokenizer, [tokenizer.bos_id])
    for token in tokenizer.encode("one two three"):
        assert detokenizer.token_text(token) == detokenizer.add(token)
    *_, last = tokenizer.encode("é🦙")
    assert detokenizer.token_text(last) in ("🦙", "\N{REPLACEMENT CHARACTER}")
