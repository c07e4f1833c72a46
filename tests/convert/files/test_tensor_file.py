"""Tensors in files of every format: strides, writers, changed files."""

import numpy as np
import pytest
from tensor_files import reader_of, write_tensors, writer_of

from llama_jax.errors import InputError


@pytest.fixture(params=["w.safetensors", "w.pth"])
def path(request, tmp_path):
    return tmp_path / request.param


def test_arrays_with_any_strides_are_written_in_row_major_order(path):
    weight = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    views = {"t": weight.T, "s": weight[:, ::2], "e": np.broadcast_to(weight[0, 0, 1], (3, 2))}
    ours = reader_of(path)(write_tensors(path, views))
    for name, array in views.items():
        np.testing.assert_array_equal(ours[name].read(), array)


def test_the_writer_refuses_tensors_that_contradict_its_header(path):
    one, header = np.ones(2, np.float32), dict.fromkeys("ab", ((2,), np.float32))
    wrong = [
        ("b", one, "b was written, but the header's next is a"),
        ("a", one[:1], r"a is float32\(1,\), not float32\(2,\)"),
        ("a", one.astype(np.float16), r"a is float16\(2,\), not float32\(2,\)"),
    ]
    for name, array, message in wrong:
        with pytest.raises(ValueError, match=message), writer_of(path)(path, header) as file:
            file.write(name, array)
    with pytest.raises(ValueError, match="lacks b"), writer_of(path)(path, header) as file:
        file.write("a", one)
    with pytest.raises(ValueError, match="can't contain the complex64 tensor c"):
        writer_of(path)(path, {"c": ((2,), np.complex64)})
    assert list(path.parent.iterdir()) == []


def test_a_closed_writer_can_be_closed_again(path):
    with writer_of(path)(path, {"a": ((2,), np.float32)}) as file:
        file.write("a", np.ones(2, np.float32))
        file.close()
        file.close()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"short", None])
def test_a_file_that_changed_after_it_was_opened_is_refused(path, content):
    stored = reader_of(path)(write_tensors(path, {"w": np.ones(9, np.float32)}))["w"]
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=r"'w.*' can't be read .*: the file has changed"):
        stored.read()
