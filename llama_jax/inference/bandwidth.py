"""How near decoding comes to what the memory allows: bytes of a step, and the bandwidth."""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.model.weights import Llama, UnstackedLlama
from llama_jax.parallel.mesh import platform
from llama_jax.runtime.cpu import cpu_cores

_COPIED = 1 << 28  # bytes: far more than any cache of a processor holds


def step_bytes(config: ModelConfig, model: Llama | UnstackedLlama, batch: int, slots: int) -> int:
    """Returns the bytes that all devices together read to make one token in each row.

    All weights once (of the embedding only the rows of the tokens, unless it is the head too), and
    all slots of a cache of `batch` rows.
    """
    head = config.head_dim * jnp.dtype(config.dtype).itemsize
    if config.cache_dtype == "int8":
        head = config.head_dim + 4  # and a scale
    read = _bytes(model) + 2 * config.n_layers * batch * config.n_kv_heads * slots * head
    if not config.tied_head:
        table = _bytes(model.tok_embeddings)
        read -= table - table // config.vocab_size * batch
    return read


def _bytes(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)


def copy_bandwidth() -> float:
    """Returns the bytes a second that this machine reads and writes while it copies.

    A short test on the current mesh's devices, which add up; on the CPU all cores copy at a time.
    """
    devices = jax.sharding.get_mesh().devices.flatten()
    if platform() == "cpu":
        return _cpu_copy()
    copy = jax.jit(jnp.negative)  # a plain copy would be left out
    arrays = [jax.device_put(np.zeros(_COPIED // 4, np.float32), device) for device in devices]
    seconds = []
    for _ in range(6):
        begun = time.perf_counter()
        jax.block_until_ready([copy(array) for array in arrays])
        seconds.append(time.perf_counter() - begun)
    return 2 * _COPIED * len(devices) / statistics.median(seconds[1:])


def _cpu_copy() -> float:
    cores = cpu_cores()
    source, target = (np.ones(_COPIED // 4, np.float32) for _ in range(2))
    parts = list(zip(np.array_split(target, cores), np.array_split(source, cores), strict=True))
    seconds = []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(6):
            begun = time.perf_counter()
            list(pool.map(partial(_copy), parts))
            seconds.append(time.perf_counter() - begun)
    return 2 * _COPIED / statistics.median(seconds[1:])


def _copy(part: tuple[np.ndarray, np.ndarray]) -> None:
    np.copyto(*part)
