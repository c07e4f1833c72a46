"""Writes small folders of chats and of preferences, of random tokens."""

import numpy as np

from llama_jax.data.packing import Example, Packer
from llama_jax.data.shard_writer import SplitWriter
from llama_jax.data.shards import write_meta
from llama_jax.tokenizer.tokenizer import load_tokenizer

SEQ_LEN = 16


def random_example(rng, n_segments):
    """Returns a prompt of 2 to 4 tokens and an answer; with two segments, it has two answers."""
    prompt = rng.integers(3, 320, rng.integers(2, 5))
    ids, trained, starts = [], [], []
    for _ in range(n_segments):
        answer = rng.integers(3, 320, rng.integers(1, SEQ_LEN // n_segments - len(prompt) + 1))
        starts.append(len(ids))
        ids += [*prompt, *answer]
        trained += [False] * len(prompt) + [True] * len(answer)
    return Example(np.array(ids, np.uint32), np.array(trained), tuple(starts), len(ids))


def write_packed_shards(folder, tokenizer, kind):
    """Writes windows of 16 tokens of `chats` or `preferences`; returns the examples by split."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    loaded = load_tokenizer(tokenizer)
    for name, data in loaded.files.items():
        (folder / name).write_bytes(data)
    writers, examples = {}, {}
    for split, n in (("train", 200), ("validation", 20)):
        writers[split] = SplitWriter(folder / split, loaded.n_vocab, SEQ_LEN)
        packer = Packer(writers[split], loaded.eos_id)
        segments = 2 if kind == "preferences" else 1
        examples[split] = [random_example(rng, segments) for _ in range(n)]
        for example in examples[split]:
            packer.append(example)
        packer.finish()
    write_meta(
        folder, sources=["random"], tokenizer=folder / loaded.path.name, n_vocab=loaded.n_vocab,
        writers=writers, kind=kind,
    )  # fmt: skip
    return examples


def read_tree(folder):
    """Returns the content of each file of a folder by its relative name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
