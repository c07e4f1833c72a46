"""Writes a small classifier in fastText's format, so that tests need no training."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

_SUPERVISED, _SOFTMAX, _WORD, _LABEL = 3, 3, 0, 1


def write_classifier(path: Path, words: Mapping[str, Sequence[float]], labels: list[str]) -> Path:
    """Writes a model whose label scores are the mean of the scores of a text's known words.

    Args:
        path: of the file.
        words: the score of each label, by word.
        labels: without `__label__`.
    """
    n, end = len(labels), "</s>"
    entries = {end: [0.0] * n, **words}
    vectors = np.array([*entries.values()], "<f4")
    # Magic and version; then dim, ws, epoch, minCount, neg, wordNgrams, loss, model, bucket, minn,
    # maxn, lrUpdateRate, t (fastText's src/args.cc, dictionary.cc, densematrix.cc).
    data = struct.pack("<ii", 793712314, 12)
    data += struct.pack("<12i", n, 5, 5, 1, 5, 1, _SOFTMAX, _SUPERVISED, 0, 0, 0, 100)
    data += struct.pack("<d", 1e-4)
    data += struct.pack("<3i2q", len(entries) + n, len(entries), n, len(entries), -1)
    names = [*((word, _WORD) for word in entries), *((f"__label__{x}", _LABEL) for x in labels)]
    for name, kind in names:
        data += name.encode() + b"\0" + struct.pack("<qb", 1, kind)
    for matrix in (vectors, np.eye(n, dtype="<f4")):
        data += struct.pack("<bqq", 0, *matrix.shape) + matrix.tobytes()
    path.write_bytes(data)
    return path
