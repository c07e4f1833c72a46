"""The bytes that a decode step reads, and the bandwidth of this machine's memory."""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.model.weights import Llama, UnstackedLlama
from llama_jax.parallel.head_copies import copies_of_head
from llama_jax.parallel.mesh import platform
from llama_jax.runtime.cpu import cpu_cores
from llama_jax.runtime.program_store import stored_number

_COPY_BYTES = 1 << 28  # far larger than any processor cache


def step_bytes(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    batch: int,
    slots: int,
    *,
    paged: bool = False,
) -> int:
    """Returns the bytes that all devices together read to generate one token in each row.

    A step reads all weights once (of the embedding only the rows of the tokens, unless it is also
    the output head), and all slots of a KV cache of `batch` rows: in pages once, otherwise on each
    device that has a copy of a key/value head.
    """
    head_bytes = config.head_dim * jnp.dtype(config.dtype).itemsize
    if config.cache_dtype == "int8":
        head_bytes = config.head_dim + 4  # and a float32 scale
    copies = 1 if paged else copies_of_head(config.n_kv_heads)
    cache_bytes = 2 * config.n_layers * batch * config.n_kv_heads * copies * slots * head_bytes
    total = _bytes(model) + cache_bytes
    if not config.tied_head:
        table = _bytes(model.tok_embeddings)
        total -= table - table // config.vocab_size * batch
    return total


def _bytes(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    local = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    return local * jax.process_count()


def stored_copy_bandwidth() -> float:
    """Returns `copy_bandwidth`, measured once for all starts where programs are stored."""
    parts = platform(), cpu_cores(), len(jax.sharding.get_mesh().local_devices)
    return stored_number("copy_bandwidth", parts, copy_bandwidth)


def copy_bandwidth() -> float:
    """Measures the bytes/s that this machine reads and writes while it copies.

    Returns the sum over the current mesh's devices; on the CPU all cores copy at the same time.
    Of several hosts, this one is measured.
    """
    devices = jax.sharding.get_mesh().local_devices
    if platform() == "cpu":
        return _cpu_copy() * jax.process_count()
    copy = jax.jit(jnp.negative)  # XLA would optimize a plain copy away
    arrays = [jax.device_put(np.zeros(_COPY_BYTES // 4, np.float32), device) for device in devices]
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready([copy(array) for array in arrays])
        seconds.append(time.perf_counter() - start)
    return 2 * _COPY_BYTES * len(devices) * jax.process_count() / statistics.median(seconds[1:])


def _cpu_copy() -> float:
    cores = cpu_cores()
    source, target = (np.ones(_COPY_BYTES // 4, np.float32) for _ in range(2))
    sources, targets = np.array_split(source, cores), np.array_split(target, cores)
    seconds = []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(6):
            start = time.perf_counter()
            list(pool.map(np.copyto, targets, sources))
            seconds.append(time.perf_counter() - start)
    return 2 * _COPY_BYTES / statistics.median(seconds[1:])
