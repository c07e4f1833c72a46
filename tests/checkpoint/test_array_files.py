import numpy as np
import pytest

from llama_jax.checkpoint import array_files


@pytest.mark.parametrize("shards", [1, 8])
def test_no_chunk_is_written_after_a_failed_write(tmp_path, shards):
    values = np.ones((64, 512, 512), np.float32)
    spec = array_files.ArraySpec(values.shape, values.dtype, (shards, 1, 1))
    stores = array_files.open_for_writing(tmp_path, {"layers.w": spec})
    (tmp_path / "layers.w" / "c" / "3" / "0" / "0" / "in the way").mkdir(parents=True)
    step, whole = len(values) // shards, [slice(None)] * 2
    parts = [
        array_files.HostShard("layers.w", (slice(i, i + step), *whole), values[i : i + step])
        for i in range(0, len(values), step)
    ]
    with pytest.raises(ValueError, match=r"c/3/0/0.*os_error_code"):
        array_files.write_shards(stores, parts)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == len(values) - 1
