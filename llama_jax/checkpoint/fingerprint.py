"""A fingerprint of arrays that is the same on every mesh: 64 bits for each array.

It is computed on the devices when a state is saved, and again after it is restored. So it covers
the complete path of a value, from a device to storage and back, on any number of hosts.
"""

from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.checkpoint.array_files import dotted
from llama_jax.checkpoint.tree import tree_to_dict


def fingerprints(tree: Any) -> dict[str, str]:
    """Returns the fingerprint of each array of a tree by dotted name, 16 hexadecimal digits."""
    return to_text(start_fingerprints(tree))


def start_fingerprints(tree: Any) -> Any:
    """Starts to compute the fingerprints on the devices, as uint32 [2] each. Doesn't wait.

    All hosts must call this at the same point of the program.
    """
    return _fingerprints(tree_to_dict(tree))


def to_text(computed: Any) -> dict[str, str]:
    """Waits for `start_fingerprints` and returns the fingerprints by dotted name."""
    return {
        dotted(path): "".join(f"{int(part):08x}" for part in leaf)
        for path, leaf in jax.tree.leaves_with_path(jax.device_get(computed))
    }


@jax.jit
def _fingerprints(tree: Any) -> Any:
    return jax.tree.map(of_array, tree)


@jax.jit  # traced once for all arrays of the same shape
def of_array(x: jax.Array) -> jax.Array:
    """Returns the fingerprint of an array on the devices, uint32 [2].

    It has two sums modulo 2³² over scrambled elements, each times an odd hash of its index.

    A sum of integers has no rounding, so the order and the mesh don't matter. An element that
    changes always changes both sums: scrambling is a bijection, and odd factors have inverses.
    Several changed elements cancel in both with a probability of 2⁻⁶⁴.
    """
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    index = jnp.zeros_like(bits)
    for axis, size in enumerate(x.shape):
        iota = jax.lax.broadcasted_iota(
            jnp.uint32, x.shape, axis, out_sharding=jax.typeof(x).sharding
        )
        index = index * jnp.uint32(size) + iota
    factor = _scramble(index * jnp.uint32(0x9E3779B1)) | jnp.uint32(1)
    other = _scramble(factor * jnp.uint32(0xC2B2AE3D)) | jnp.uint32(1)
    bits = _scramble(bits)
    return jnp.stack([jnp.sum(bits * factor), jnp.sum(bits * other)])


def _scramble(x: jax.Array) -> jax.Array:
    """Returns a bijection of 32 bits (two rounds of xor-shift and multiply, as in MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    return (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
