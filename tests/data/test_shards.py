import ast

import numpy as np
from conftest import ROOT

from llama_jax.data import shard_writer, tokenize
from llama_jax.data.shards import TokenStream


def test_documents_continue_across_shards_of_a_bounded_size(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i:02d}.txt").write_text(f"line {i} of a text\n" * (1 + i % 7))
    sources, options = [str(tmp_path / "texts")], {"validation_fraction": 0.1, "progress": False}
    expected = tokenize.tokenize_corpus(sources, tmp_path / "one", n_vocab=290, **options)
    monkeypatch.setattr(shard_writer, "SHARD_TOKENS", 64)
    monkeypatch.setattr(shard_writer, "CHUNK_TOKENS", 16)
    model = tmp_path / "one" / "tokenizer.model"
    tokenize.tokenize_corpus(sources, tmp_path / "many", tokenizer=model, **options)
    one, many = (TokenStream(tmp_path / name, "train") for name in ("one", "many"))
    assert len(list((tmp_path / "one/train/tokens/c").iterdir())) == 1
    assert len(list((tmp_path / "many/train/tokens/c").iterdir())) == -(-len(many) // 64) > 5
    assert len(one) == len(many) == expected["splits"]["train"]["tokens"]
    for a, b in zip(one.read(0, len(one)), many.read(0, len(many)), strict=True):
        np.testing.assert_array_equal(a, b)
    start, stop = 50, 210  # from the first shard to the fourth
    for a, b in zip(one.read(start, stop), many.read(start, stop), strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_module_alone_names_the_files_of_token_shards():
    names = ("meta.json", "shard_tokens")
    users = {
        str(path.relative_to(ROOT / "llama_jax"))
        for path in (ROOT / "llama_jax").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and str(node.value).startswith(names)
    }
    assert users == {"data/shards.py"}
