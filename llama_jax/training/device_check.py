"""Finds devices that hold or compute other numbers than the others: silent data corruption.

Both comparisons are bit for bit, because neither depends on the order of a sum:

- Replicas: devices that hold the same shard of an array must hold the same bits.
- Computation: the same rows are placed on one shard of the batch after another, while the other
  shards have no targets. They add zeros to the gradient, which is exact in any order. So loss and
  gradient must be the same wherever the rows are computed.
"""

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llama_jax.checkpoint import fingerprint
from llama_jax.config.run import Config
from llama_jax.data.windows import Batch
from llama_jax.errors import Fault
from llama_jax.model.lora import Trained
from llama_jax.model.summary import path_names
from llama_jax.model.weights import Llama
from llama_jax.parallel.mesh import batch_shard_devices, batch_shards
from llama_jax.parallel.replicas import compute_on_shards, replica_groups
from llama_jax.runtime import hosts
from llama_jax.runtime.storage import parse_path
from llama_jax.training.events import record_events
from llama_jax.training.step import gradients

PLACEMENTS = 8  # shards that one check compares with each other; the next check takes others


def check_devices(
    config: Config, step: int, trained: Trained, opt_state: Any, batch: Batch, base: Llama | None
) -> None:
    """Compares the replicas of the state, and a loss and gradient computed on several devices.

    All hosts must call this. It needs the memory of a gradient, and changes no state.

    Args:
        config: of the run.
        step: number of steps done.
        trained: all weights, or the pairs of a LoRA run.
        opt_state: of the optimizer.
        batch: of any step; the first rows of its first micro-batch are computed.
        base: the frozen weights, if any.

    Raises:
        Fault: devices differ; the message, which is also in events.jsonl, names them and their
            hosts.
    """
    state = {"weights": trained, "optimizer": opt_state, "base": base}
    checksums = jax.device_get(compute_on_shards(fingerprint.of_array, state))
    values = jax.tree.leaves(checksums)
    for (path, leaf), value in zip(jax.tree.leaves_with_path(state), values, strict=True):
        for devices in replica_groups(leaf):
            bits = [value[place].tobytes() for _, place in devices]
            if differing := _outliers(bits):
                which = [devices[i][0] for i in differing]
                _report(config, step, which, f"{'.'.join(path_names(path))} in memory")
    if batch_shards() == 1:
        return
    devices = batch_shard_devices()
    if config.training.objective != "dpo":  # which has no losses of rows
        _, rows = _gradient(config.program, trained, batch, base, -1)
        losses = np.asarray(rows).reshape(len(devices), -1)
        if differing := _outliers([loss.tobytes() for loss in losses]):
            which = [d for i in differing for d in devices[i]]
            _report(config, step, which, "the losses of the same rows")
    first = step // config.training.check_every * (PLACEMENTS - 1)  # one shard is compared again
    shards = [(first + i) % len(devices) for i in range(min(PLACEMENTS, len(devices)))]
    bits = []
    for shard in shards:
        computed, _ = _gradient(config.program, trained, batch, base, shard)
        bits.append(str(fingerprint.to_text(computed)).encode())
    if differing := _outliers(bits):
        which = [d for i in differing for d in devices[shards[i]]]
        _report(config, step, which, "the gradient of the same rows")


@partial(jax.jit, static_argnums=0)
def _gradient(
    config: Config, trained: Trained, batch: Batch, base: Llama | None, shard: jax.Array | int
) -> tuple[Any, jax.Array | None]:
    """Returns fingerprints of the gradient, and the loss of each row [B]; for DPO None.

    All shards of the batch have the same rows. Only those of `shard` have targets, and for DPO
    segments, which are the preferences (-1: all).
    """
    n = batch_shards()
    without = {"targets": -1} | ({"segments": 0} if config.training.objective == "dpo" else {})

    def place(x: jax.Array, name: str) -> jax.Array:
        rows = jax.reshard(x[0], P())
        size = rows.shape[0] // n
        rows = jnp.tile(rows[:size], (n, 1))
        active = (jnp.arange(rows.shape[0]) // size == shard) | (jnp.asarray(shard) < 0)
        rows = jnp.where(active[:, None], rows, without[name]) if name in without else rows
        return jax.reshard(rows, P(*jax.typeof(x).sharding.spec[1:]))[None]

    placed = Batch(*(None if x is None else place(x, name) for name, x in batch._asdict().items()))
    config = replace(config, training=replace(config.training, micro_batches=1))
    found: Any = gradients(config, trained, placed, base)
    # The sign of a zero depends on the zeros that the other shards add.
    grads = jax.tree.map(lambda g: jnp.where(g == 0, jnp.zeros_like(g), g), found.grads)
    return fingerprint.start_fingerprints(grads), found.rows and found.rows.nll[0]


def _outliers(values: Sequence[bytes]) -> list[int]:
    """Returns which values differ from the most frequent one; all of them in case of a tie."""
    counts = Counter(values).most_common(2)
    if len(counts) == 1:
        return []
    tie = counts[0][1] == counts[1][1]
    return [i for i, value in enumerate(values) if tie or value != counts[0][0]]


def _report(config: Config, step: int, devices: Sequence[Any], what: str) -> NoReturn:
    """Records in events.jsonl which devices differ, and raises a `Fault` on all hosts."""
    names = ", ".join(f"device {d.id} of {hosts.name(d.process_index)}" for d in devices[:8])
    every = config.training.check_every
    earlier = f"until step {step - every} all were equal" if step > every else "it is the first"
    text = (
        f"silent data corruption found after step {step} (training.check_every; {earlier}): of"
        f" {what}, {names} {'has' if len(devices) == 1 else 'have'} other bits than the other"
        " devices"
    )
    found = {
        "devices": [d.id for d in devices],
        "hosts": sorted({d.process_index for d in devices}),
    }

    def record() -> None:
        event = {"step": step, "event": "silent data corruption", **found, "text": text}
        with contextlib.suppress(OSError):  # must not replace this error
            record_events(parse_path(config.training.out), [event])

    hosts.broadcast_decision(record)  # the others wait: their error would end host 0
    raise Fault(f"{text}: replace the hardware, and resume from a checkpoint before that")
