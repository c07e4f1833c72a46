"""`llama-jax data`: the paper's table for any mixture, before and during a run."""

import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, run, tiny_config

from llama_jax.cli.show_windows import decode_marked, style_of
from llama_jax.config import yaml_file
from llama_jax.config.run import DataConfig
from llama_jax.data.batches import Batches
from llama_jax.data.samples import Samples
from llama_jax.runtime.manifest import read_manifest, write_manifest
from llama_jax.tokenizer.tokenizer import load_tokenizer

LLAMA = ROOT / "configs/data/llama.yaml"
LIMITS = ["data.mixture.data/books.max_epochs=2", "data.mixture.data/wikipedia.max_epochs=3"]
# Table 1 of arXiv 2302.13971: share in per cent, epochs, disk size in bytes.
PAPER = {
    "data/commoncrawl": (67.0, 1.10, 3.3e12),
    "data/c4": (15.0, 1.06, 783e9),
    "data/github": (4.5, 0.64, 328e9),
    "data/wikipedia": (4.5, 2.45, 83e9),
    "data/books": (4.5, 2.23, 85e9),
    "data/arxiv": (2.5, 1.06, 92e9),
    "data/stackexchange": (2.0, 1.03, 78e9),
}
# Tokens of RedPajama's reproduction of the sources, and their epochs in 1.4T tokens.
RED_PAJAMA = {
    "data/commoncrawl": (878e9, 1.07),
    "data/c4": (175e9, 1.20),
    "data/github": (59e9, 1.07),
    "data/books": (26e9, 2.42),
    "data/arxiv": (28e9, 1.25),
    "data/wikipedia": (24e9, 2.62),
    "data/stackexchange": (20e9, 1.40),
}


def table(capsys, *argv):
    code, out, _ = run(capsys, "data", *argv, "--json")
    assert code == 0
    return json.loads(out)["sources"]


def test_the_included_mixture_is_table_1_of_the_paper(capsys):
    sources = table(capsys, LLAMA)
    assert list(sources) == list(PAPER)
    for folder, (share, epochs, size) in PAPER.items():
        use = sources[folder]
        assert 100 * use["share"] == pytest.approx(share, abs=1e-6)
        assert round(use["epochs"], 2) == epochs
        assert use["bytes"] == size
        assert 2.78 < use["bytes"] / use["tokens"] < 3.96
    assert sum(use["tokens"] for use in sources.values()) == pytest.approx(1.263e12, rel=1e-3)
    assert sum(use["drawn_tokens"] for use in sources.values()) == pytest.approx(1.4e12, rel=1e-5)


def test_the_epochs_of_red_pajama_with_the_papers_shares(capsys):
    tokens = [f"data.mixture.{folder}.planned_tokens={n}" for folder, (n, _) in RED_PAJAMA.items()]
    sources = table(capsys, LLAMA, *tokens)
    for folder, (_, epochs) in RED_PAJAMA.items():
        assert sources[folder]["epochs"] == pytest.approx(epochs, abs=0.0051)


def test_the_table_is_readable_and_a_limit_is_a_warning(capsys):
    code, out, err = run(capsys, "data", LLAMA, *LIMITS)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "333,786 steps of 4,194,304 tokens"
    assert lines[1].split() == ["share", "tokens", "drawn", "epochs", "text", "bytes/token"]
    [books] = [line for line in lines if "data/books" in line]
    assert " ".join(books.split()) == "* data/books 4.50% 28.3 G 63 G 2.23 85 GB 3.00"
    assert " ".join(lines[-2].split()) == "all 100.00% 1.263 T 1.4 T 4.749 TB"
    assert lines[-1].startswith("* does not exist yet")
    assert err == ("warning: data/books is read 2.23 times in this run, and its max_epochs is 2\n")


@pytest.fixture
def mixed(token_folder, tmp_path):
    """A run folder with a checkpoint of step 3 and a later phase; the checkpoint has no weights."""
    other = tmp_path / "other"
    shutil.copytree(token_folder, other)
    folder = tmp_path / "run"
    config = replace(
        tiny_config(out=str(folder), steps=200),
        data=DataConfig(
            mixture={str(token_folder): 0.7, str(other): 0.3}, phases={100: {str(other): 1.0}},
            batch_size=8, seq_len=16,
        ),
    )  # fmt: skip
    (folder / "checkpoints/3").mkdir(parents=True)
    fingerprint = Batches(config.data).fingerprint(3)
    write_manifest(folder / "checkpoints/3", {"step": 3, "data": fingerprint, "files": {}})
    (folder / "config.yaml").write_text(yaml_file.dump(config))
    return folder, config


def test_a_run_folder_shows_what_has_been_read_exactly(mixed, capsys):
    folder, config = mixed
    samples = Samples(config.data)
    read = Counter(str(samples.locate(n).tokens.folder) for n in range(3 * 8))
    sources = table(capsys, folder)
    assert {name: use["drawn_tokens_so_far"] for name, use in sources.items()} == {
        name: 16 * count for name, count in read.items()
    }
    first, second = sources.values()
    assert first["drawn_tokens"] + second["drawn_tokens"] == 200 * 8 * 16
    assert first["drawn_tokens"] == pytest.approx(0.7 * 100 * 8 * 16, abs=64)
    assert first["tokens"] == len(samples.streams[0])
    assert first["epochs"] == first["drawn_tokens"] / 16 / ((first["tokens"] - 1) // 16)
    _, out, _ = run(capsys, "data", folder, "training.steps=100")
    assert "100 steps of 128 tokens; 3 steps are saved" in out
    assert f"{16 * read[str(config.data.folders[1])]:,}" in out
    assert "after step 100 the mixture is" in out


def test_a_step_is_shown_as_the_model_sees_it(mixed, capsys):
    folder, config = mixed
    code, out, _ = run(capsys, "data", folder, "--show", 2, "--rows", 3)
    assert code == 0
    samples, tokenizer = Samples(config.data), load_tokenizer(config.data.folders[0])
    rows = re.split("══ .*\n", out)[1:]
    assert len(rows) == 3
    for row, text in enumerate(rows):
        window, at = samples[8 + row], samples.locate(8 + row)
        title = f"row {row + 1} of 8: {at.tokens.folder}, window {at.window + 1:,} of"
        assert title in out
        assert text.count("── document") == window.segments[-1]
        trained = np.concatenate([[False], window.targets[:-1] >= 0])
        last = window.segments == window.segments[-1]
        style = style_of(sys.stdout)
        if trained[last].any():
            assert decode_marked(tokenizer, window.tokens[last], trained[last], style) in text


def test_rows_of_a_run_with_another_order_are_not_shown(mixed, capsys):
    folder, _ = mixed
    found = read_manifest(folder / "checkpoints/3")
    write_manifest(folder / "checkpoints/3", found | {"data": found["data"][1:]})
    code, _, err = run(capsys, "data", folder, "--show", 2)
    assert code == 2
    assert f"{folder} was trained by an earlier version of llama_jax, which reads" in err
    assert run(capsys, "data", folder)[0] == 0  # the counts are the same in any order


def test_the_picture_is_drawn(tmp_path, capsys):
    path = tmp_path / "mixture.svg"
    assert run(capsys, "data", LLAMA, *LIMITS, "--picture", path)[0] == 0
    assert path.read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([LLAMA, "data.mixture={a: 1}"], "no folder of token shards at a: create it with"),
        ([LLAMA, "data.mixture={a: {weight: 1, planned_tokens: 9}}"], "fewer than one window"),
        (
            [LLAMA, "data.mixture={a: {weight: 1, wait: 1}}"],
            "data.mixture.a.wait is not a known key",
        ),
        ([LLAMA, "data.mixture={a: {weight: 1, max_epoch: 1}}"], "did you mean max_epochs?"),
        ([LLAMA, "data.mixture={a: {max_epochs: 1}}"], "data.mixture.a.weight is missing"),
        ([LLAMA, "data.phases={0: {a: 1}}"], "data.phases.0 must be greater than or equal to 1"),
        ([LLAMA, "data.phases={9: {}}"], "phases.9 must name at least one folder"),
        ([LLAMA, "--show", "0"], "--show 0: the run has the steps 1 to 333786"),
        ([LLAMA, "--show", "1", "--rows", "0"], "--rows must be at least 1, not 0"),
        ([LLAMA, "--picture", "m.pdf"], "--picture m.pdf: name a file that ends with .png or .svg"),
        ([LLAMA, "--picture", "no/m.png"], "--picture no/m.png: there is no folder no"),
    ],
)
def test_bad_arguments_get_one_sentence(capsys, argv, sentence):
    code, out, err = run(capsys, "data", *argv)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1
