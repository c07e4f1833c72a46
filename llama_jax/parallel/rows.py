"""Rows of a batch that is split over copies of the model: one row of each copy at a time.

All copies have equally many rows, which are consecutive. A program that takes a row from each copy
and puts it back moves no data between the copies.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.parallel.mesh import batch_shards, shard_array
from llama_jax.parallel.sharding import activation_spec


class RowNumbers(NamedTuple):
    """One row of each of C copies of the model, both sharded as "B".

    Attributes:
        within_C: int32 number of the row among those of its copy.
        active_C: bool, whether the copy has a row to change.
    """

    within_C: jax.Array
    active_C: jax.Array


def number_rows(numbers: Sequence[int], batch: int) -> RowNumbers:
    """Returns the given rows of a batch of `batch` rows, at most one of each copy."""
    per_copy = batch // batch_shards()
    within_C, active_C = np.zeros(batch_shards(), np.int32), np.zeros(batch_shards(), bool)
    for number in numbers:
        within_C[number // per_copy], active_C[number // per_copy] = number % per_copy, True
    return RowNumbers(shard_array(within_C, "B"), shard_array(active_C, "B"))


def take_rows(x_B_: jax.Array, rows: RowNumbers) -> jax.Array:
    """Returns one row [C, …] of each copy."""
    spec, number_spec = jax.typeof(x_B_).sharding.spec, activation_spec("B")

    def local(x_B_: jax.Array, within_1: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x_B_, within_1[0], 1, axis=0)

    mapped = jax.shard_map(local, in_specs=(spec, number_spec), out_specs=spec, check_vma=False)
    return mapped(x_B_, rows.within_C)


def put_rows(x_B_: jax.Array, new_C_: jax.Array, rows: RowNumbers) -> jax.Array:
    """Returns the batch with one row of each active copy replaced."""
    spec, number_spec = jax.typeof(x_B_).sharding.spec, activation_spec("B")
    single = batch_shards() == 1  # always active

    def local(x_B_: jax.Array, new_1_: jax.Array, within_1: jax.Array, active_1: jax.Array):
        if not single:
            old_1_ = jax.lax.dynamic_slice_in_dim(x_B_, within_1[0], 1, axis=0)
            new_1_ = jnp.where(active_1[0], new_1_, old_1_)
        return jax.lax.dynamic_update_slice_in_dim(x_B_, new_1_, within_1[0], axis=0)

    mapped = jax.shard_map(
        local, in_specs=(spec, spec, number_spec, number_spec), out_specs=spec, check_vma=False
    )
    return mapped(x_B_, jax.reshard(new_C_, spec), *rows)
