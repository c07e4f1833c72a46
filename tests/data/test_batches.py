import shutil
from collections import Counter

import jax
import numpy as np
import pytest
import tensorstore
from conftest import mesh_of

from llama_jax.config.run import DataConfig
from llama_jax.data import tokenize
from llama_jax.data.batches import Batches
from llama_jax.data.shards import TokenStream
from llama_jax.data.windows import Windows
from llama_jax.errors import InputError
from llama_jax.parallel.mesh import one_device_mesh
from llama_jax.runtime.manifest import write_manifest


def config(folder, **changes):
    return DataConfig(**({"mixture": {str(folder): 1.0}, "batch_size": 8, "seq_len": 16} | changes))


def as_numpy(batch):
    return [np.asarray(field) for field in batch]


def test_a_window_separates_documents(token_folder):
    tokens = TokenStream(token_folder, "train")
    windows = Windows(tokens, config(token_folder, seq_len=64))
    stream, _ = tokens.read(0, len(tokens))
    boundaries = 0
    for i in range(len(windows)):
        window = windows[i]
        part = stream[i * 64 : i * 64 + 65]
        np.testing.assert_array_equal(window.tokens, part[:-1])
        starts = np.flatnonzero(part[:-1] == 1)  # the begin token
        starts = starts[starts > 0]
        expected = 1 + np.searchsorted(starts, np.arange(64), side="right")
        np.testing.assert_array_equal(window.segments, expected)
        own_start = np.concatenate([[0], starts])[expected - 1]
        np.testing.assert_array_equal(window.positions, np.arange(64) - own_start)
        # The last token of a document doesn't predict the first token of the next one.
        next_starts = part[1:] == 1
        np.testing.assert_array_equal(window.targets, np.where(next_starts, -1, part[1:]))
        boundaries += next_starts.sum()
    assert boundaries > 20


def test_without_isolation_all_documents_of_a_window_are_one_text(token_folder):
    tokens = TokenStream(token_folder, "train")
    window = Windows(tokens, config(token_folder, seq_len=64, isolate_documents=False))[3]
    assert set(window.segments) == {1}
    np.testing.assert_array_equal(window.positions, np.arange(64))
    np.testing.assert_array_equal(window.targets, tokens.read(193, 257)[0])


def test_the_seed_and_the_step_alone_determine_a_batch(token_folder):
    with jax.set_mesh(one_device_mesh()):
        in_order = [as_numpy(Batches(config(token_folder)).train(s)) for s in range(6)]
        again = Batches(config(token_folder))
        for s in (5, 0, 3):
            for a, b in zip(as_numpy(again.train(s)), in_order[s], strict=True):
                np.testing.assert_array_equal(a, b)
        other = as_numpy(Batches(config(token_folder, seed=1)).train(0))
    assert not np.array_equal(other[0], in_order[0][0])


def test_each_epoch_contains_every_window_once_in_another_order(token_folder):
    data = Batches(config(token_folder))
    count = len(Windows(TokenStream(token_folder, "train"), config(token_folder)))
    epochs = [[data.samples[e * count + i].tokens.tobytes() for i in range(count)] for e in (0, 1)]
    assert Counter(epochs[0]) == Counter(epochs[1])
    assert len(set(epochs[0])) == count
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 2, 4)])
def test_every_mesh_reads_the_same_global_batch(token_folder, tmp_path, shape):
    other = changed_copy(token_folder, tmp_path, lambda f: None)
    mixed = config(token_folder, mixture={str(token_folder): 0.7, str(other): 0.3})
    with jax.set_mesh(one_device_mesh()):
        expected = as_numpy(Batches(mixed).train(3))
    with jax.set_mesh(mesh_of(shape)):
        for a, b in zip(as_numpy(Batches(mixed).train(3)), expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_micro_batches_concatenated_in_order_are_the_batch(token_folder):
    with jax.set_mesh(one_device_mesh()):
        batch = as_numpy(Batches(config(token_folder)).train(2))
        micro_batches = as_numpy(Batches(config(token_folder), micro_batches=4).train(2))
    for a, b in zip(batch, micro_batches, strict=True):
        assert b.shape == (4, 2, 16)
        np.testing.assert_array_equal(a.reshape(b.shape), b)


def test_a_mixture_is_sampled_by_its_weights(token_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(token_folder, other)
    source = Windows(TokenStream(token_folder, "train"), config(token_folder))
    rewrite_tokens(other, lambda tokens: tokens ^ 1)  # the same length, other tokens
    data = Batches(config(token_folder, mixture={str(token_folder): 0.75, str(other): 0.25}))
    index_of = {source[i].tokens.tobytes(): i for i in range(len(source))}
    drawn = [data.samples[i].tokens for i in range(1000)]
    first = [index_of[t.tobytes()] for t in drawn if t.tobytes() in index_of]
    second = [index_of[(t ^ 1).tobytes()] for t in drawn if t.tobytes() not in index_of]
    assert len(first) == 750
    assert len(second) == 250
    # Sources of equal length are shuffled differently.
    assert sum(a == b for a, b in zip(first, second, strict=False)) < 10


def test_validation_reads_every_held_out_window_once(token_folder):
    settings = config(token_folder)
    windows = Windows(TokenStream(token_folder, "validation"), settings)
    data = Batches(settings)
    with jax.set_mesh(one_device_mesh()):
        count = data.count_validation_batches(0, 99)
        batches = [as_numpy(data.validation(0, i, count)) for i in range(count)]
        few = [as_numpy(data.validation(0, i, 2)) for i in range(2)]
    with_loss = sum((targets >= 0).sum() for _, targets, _, _ in batches)
    assert with_loss == sum((windows[i].targets >= 0).sum() for i in range(len(windows)))
    assert data.count_validation_batches(0, 2) == 2
    # Fewer batches read windows at equal distances in the complete text.
    index_of = {windows[i].tokens.tobytes(): i for i in range(len(windows))}
    indices = [index_of[row.tobytes()] for batch in few for row in batch[0][0]]
    assert indices == [r * len(windows) // 16 for r in range(16)]


def rewrite_tokens(folder, change):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/train/tokens/"}}
    tokens = tensorstore.open(spec, open=True).result()
    tokens[...] = change(tokens[...].read().result())


def changed_copy(folder, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    change(copy)
    return copy


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "meta.json").unlink(), "has no meta.json"),
        (lambda f: (f / "meta.json").write_text("{"), "checksum of meta.json differs"),
        (lambda f: write_manifest(f, {"format": 9}, "meta.json"), "unknown format '9'"),
        (lambda f: (f / "train/tokens/c/0").unlink(), "train/tokens/c/0 is missing"),
        (lambda f: truncate(f / "train/starts/c/0"), "is damaged or cut short"),
        (lambda f: flip(f / "train/tokens/c/0", 50), "is damaged or cut short"),
        (lambda f: flip(f / "train/tokens/zarr.json", 50), "checksum of train/tokens/zarr.json"),
        (lambda f: flip(f / "meta.json", 50), "checksum of meta.json differs"),
    ],
)
def test_the_error_for_damaged_shards_names_the_file(token_folder, tmp_path, change, message):
    folder = changed_copy(token_folder, tmp_path, change)

    def read_every_window():
        data = Batches(config(folder))
        for step in range(len(data.splits["train"][0]) // 16 // 8 + 1):
            data.train(step)

    with pytest.raises(InputError, match=message), jax.set_mesh(one_device_mesh()):
        read_every_window()


def test_a_corpus_shorter_than_one_window_is_rejected(token_folder):
    with pytest.raises(InputError, match=r"fewer than one window of data.seq_len \+ 1 = 1,000,001"):
        Batches(config(token_folder, seq_len=1_000_000))


def test_the_fingerprint_depends_on_the_content_and_not_on_the_folder(token_folder, tmp_path):
    tokenize.tokenize_corpus(
        [str(token_folder.parent / "0*.txt")], tmp_path / "less",
        tokenizer=token_folder / "tokenizer.model", validation_fraction=0.1, progress=False,
    )  # fmt: skip
    copy = changed_copy(token_folder, tmp_path, lambda f: None)
    expected = Batches(config(token_folder)).fingerprint()
    assert Batches(config(copy)).fingerprint() == expected
    assert Batches(config(tmp_path / "less")).fingerprint() != expected


def test_batches_that_are_left_out_are_those_of_no_step(token_folder):
    mixture = {str(token_folder): 1.0}
    data = Batches(config(token_folder, phases={6: mixture, 20: mixture}))
    complete = data.fingerprint()
    for first, stop in ((9, 11), (3, 5), (10, 13)):
        data.samples.leave_out(first, stop)
    assert data.samples.left_out == [(3, 5), (9, 13)]
    numbers = [data.samples.batch_number(step) for step in range(20)]
    assert numbers == [n for n in range(26) if n not in {3, 4, 9, 10, 11, 12}]
    assert [data.samples.batches_until(n) for n in (0, 3, 4, 20)] == [0, 3, 6, 26]
    # A phase begins with its first batch, or with the next one that is not left out.
    assert {step for step in range(20) if data.phase_start(step) == step} == {0, 4, 14}
    assert numbers[4] == 6
    assert numbers[14] == 20
    assert data.fingerprint(3) == Batches(config(token_folder)).fingerprint()
    assert data.fingerprint()[len(complete) :] == ["without batches 4-5", "without batches 10-13"]
    assert data.fingerprint(5)[-1] == "without batches 4-5"
