"""Apache Beam writes the same shards as processes here. CI installs it in one leg."""

import json

import numpy as np
import pytest
from chat_shards import read_tree

from llama_jax.data import corpus_plan, shard_writer, tokenize
from llama_jax.data.beam import beam_runner

pytest.importorskip("apache_beam", reason="Apache Beam is not installed")


@pytest.mark.filterwarnings("ignore")  # Beam's own modules are deprecated in many ways
def test_beam_writes_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_plan, "MIN_PART_BYTES", 2000)
    monkeypatch.setattr(corpus_plan, "_PARTS", 10)
    monkeypatch.setattr(shard_writer, "SHARD_TOKENS", 4096)
    monkeypatch.setattr(shard_writer, "CHUNK_TOKENS", 1024)
    monkeypatch.setattr(tokenize, "_SMALL_TOKENS", 0)  # Beam assembles the shards too
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("aeioukltnrs"), rng.integers(2, 8))) for _ in range(200)]
    rows = ({"text": " ".join(rng.choice(words, 100))} for _ in range(60))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trees = []
    for name, runner in (("here", None), ("beam", beam_runner([]))):
        tokenize.tokenize_corpus(
            [str(tmp_path / "rows.jsonl")], tmp_path / name, n_vocab=300, workers=1,
            validation_fraction=0.1, runner=runner, progress=False,
        )  # fmt: skip
        trees.append(read_tree(tmp_path / name))
    assert len([name for name in trees[0] if name.startswith("train/tokens/c/")]) > 3
    assert trees[0] == trees[1]
