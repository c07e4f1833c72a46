"""Chats and preferences in packed windows: nothing is lost, cut, mixed up or trained by mistake."""

import itertools

import jax
import numpy as np
import pytest
from chat_shards import write_packed_shards
from conftest import mesh_of

from llama_jax.config.run import DataConfig
from llama_jax.data import packing, shard_writer
from llama_jax.data.batches import Batches
from llama_jax.data.packing import Example, Packer
from llama_jax.data.shards import TokenStream
from llama_jax.data.windows import PackedWindows
from llama_jax.errors import InputError
from llama_jax.parallel.mesh import one_device_mesh


def config(folder, **changes):
    return DataConfig(**({"mixture": {str(folder): 1.0}, "batch_size": 8, "seq_len": 16} | changes))


class WindowList:
    """Records the windows of a packer, in place of a writer."""

    def __init__(self, seq_len):
        self.seq_len, self.windows = seq_len, []
        self.append_window = self.windows.append


def pack(lengths, seq_len):
    """Packs examples of these lengths; example i consists of the token i."""
    windows = WindowList(seq_len)
    packer = Packer(windows, padding=0)
    for i, n in enumerate(lengths, 1):
        packer.append(Example(np.full(n, i, np.uint32), np.ones(n, bool), (0,), n))
    packer.finish()
    return windows.windows


def read_segments(folder, split):
    """Returns the segments of each window as (token ids, targets) of plain lists."""
    windows = PackedWindows(TokenStream(folder, split), config(folder))
    for i in range(len(windows)):
        window = windows[i]
        numbers = sorted(set(window.segments.tolist()))
        assert numbers == list(range(1, len(numbers) + 1))
        parts = []
        for number in numbers:
            inside = window.segments == number
            np.testing.assert_array_equal(window.positions[inside], np.arange(inside.sum()))
            parts.append((window.tokens[inside].tolist(), window.targets[inside].tolist()))
        yield parts


def expected_segments(example):
    """Returns the segments of an example in the same form, by the definition of targets."""
    bounds = [*example.starts, len(example.ids)]
    for start, stop in itertools.pairwise(bounds):
        ids, trained = example.ids[start:stop].tolist(), example.trained[start:stop].tolist()
        following = zip(ids[1:], trained[1:], strict=True)
        yield ids, [*(i if is_trained else -1 for i, is_trained in following), -1]


@pytest.mark.parametrize(("kind", "n_segments"), [("chats", 1), ("preferences", 2)])
@pytest.mark.parametrize("buffer", [packing.BUFFER_TOKENS, 100])
def test_the_windows_contain_every_example_once(
    kind, n_segments, buffer, token_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(packing, "BUFFER_TOKENS", buffer)
    monkeypatch.setattr(shard_writer, "SHARD_TOKENS", 64)  # windows are in several shards
    monkeypatch.setattr(shard_writer, "CHUNK_TOKENS", 8)  # and each in several chunks
    examples = write_packed_shards(tmp_path / "shards", token_folder, kind)
    for split in ("train", "validation"):
        stream = TokenStream(tmp_path / "shards", split)
        assert (stream.kind, stream.meta["seq_len"], len(stream) % 16) == (kind, 16, 0)
        expected = sorted(tuple(expected_segments(example)) for example in examples[split])
        found, most = [], 0
        for segments in read_segments(tmp_path / "shards", split):
            most = max(most, len(segments))
            padding = segments[len(segments) // n_segments * n_segments :]
            if n_segments == 1 and not any(target >= 0 for target in segments[-1][1]):
                padding = segments[-1:]
            assert all(set(targets) == {-1} for _, targets in padding)
            segments = segments[: len(segments) - len(padding)]
            found += zip(*[iter(segments)] * n_segments, strict=True)
        assert sorted(found) == expected
        assert most <= stream.meta["max_segments"]
        summary = stream.summary
        assert summary["documents"] == len(examples[split])
        assert summary["example_tokens"] == sum(len(e.ids) for e in examples[split])
        assert summary["trained_tokens"] == sum(e.trained.sum() for e in examples[split])


def test_windows_are_filled_and_the_memory_is_bounded(monkeypatch):
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(6, 0.8, 20_000).astype(int) + 4, 4096)  # about 560 tokens
    windows = pack(lengths, 4096)
    assert sum(window.n_tokens for window in windows) == lengths.sum()
    assert lengths.sum() / (4096 * len(windows)) > 0.995
    monkeypatch.setattr(packing, "BUFFER_TOKENS", 1 << 17)  # a small buffer fills them too
    monkeypatch.setattr(Packer, "_join", joined := record_open_windows(Packer._join))
    assert lengths.sum() / (4096 * len(pack(lengths, 4096))) > 0.98
    # At most a fourth of a buffer waits in open windows, and a buffer needs twice its size at most.
    assert max(joined.counts) <= (1 << 15) // 4096 + 2 * (1 << 17) // 4096 + 1


def record_open_windows(join):
    def recording(self, examples):
        recording.counts.append(len(self._windows))
        return join(self, examples)

    recording.counts = []
    return recording


def test_examples_of_a_complete_window_have_no_padding():
    [window] = pack([8, 8], 16)
    assert np.flatnonzero(window.starts_T).tolist() == [0, 8]
    [window] = pack([8, 7], 16)
    assert np.flatnonzero(window.starts_T).tolist() == [0, 8, 15]
    assert window.tokens_T[15] == 0
    assert not window.trained_T[15]


@pytest.mark.parametrize("folder", ["chat_folder", "preference_folder"])
def test_the_seed_and_the_step_alone_determine_a_batch_on_every_mesh(folder, request):
    settings = config(request.getfixturevalue(folder))
    with jax.set_mesh(one_device_mesh()):
        expected = [[np.asarray(x) for x in Batches(settings).train(step)] for step in range(3)]
        with_micro_batches = Batches(settings, micro_batches=4).train(2)
    for shape in ((8, 1, 1), (2, 2, 2)):
        with jax.set_mesh(mesh_of(shape)):
            for a, b in zip(Batches(settings).train(2), expected[2], strict=True):
                np.testing.assert_array_equal(np.asarray(a), b)
    for a, b in zip(with_micro_batches, expected[2], strict=True):
        np.testing.assert_array_equal(np.asarray(a).reshape(b.shape), b)


def test_the_validation_contains_every_trained_token_once(chat_folder):
    data = Batches(config(chat_folder))
    with jax.set_mesh(one_device_mesh()):
        n = data.count_validation_batches(0, 99)
        targets = [np.asarray(data.validation(0, i, n).targets) for i in range(n)]
    [stream] = data.splits["validation"]
    assert sum((t >= 0).sum() for t in targets) == stream.summary["trained_tokens"]
    assert data.unigram_entropy(1) == stream.summary["unigram_entropy"]


def test_a_configuration_that_does_not_fit_the_windows_is_refused(chat_folder):
    with pytest.raises(InputError, match=r"contains windows of 16 tokens, but data.seq_len is 32"):
        Batches(config(chat_folder, seq_len=32))
    with pytest.raises(InputError, match=r"data\.isolate_documents must be true"):
        Batches(config(chat_folder, isolate_documents=False))
