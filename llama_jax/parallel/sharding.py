"""The sharding tables: which mesh axis splits each dimension letter.

The axes of the mesh:
- `data` replicates the weights (across slices or nodes, over the slow network),
- `fsdp` splits weights and batch,
- `context` splits the sequence,
- `tensor` splits heads, feed-forward and vocabulary.

Only `llama_jax/parallel` names these axes.
"""

from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")
# Stored weights. L is never split: every device stores its shard of each of the stacked layers.
WEIGHT_AXES = {
    "L": None,
    "V": "tensor",
    "D": "fsdp",
    "N": "tensor",
    "K": "tensor",
    "H": None,
    "F": "tensor",
    "R": None,
}
# Every array that a forward pass computes: activations, gathered weights, the KV cache.
# A: micro-batches of gradient accumulation. G: query heads that share a key/value head.
ACTIVATION_AXES = {
    "A": None,
    "B": BATCH_AXES,
    "T": "context",
    "S": None,
    "L": None,
    "V": "tensor",
    "D": None,
    "N": "tensor",
    "K": "tensor",
    "G": None,
    "H": None,
    "F": "tensor",
    "R": None,
}


def weight_spec(dims: str) -> P:
    """Returns the sharding of a weight with the dimensions `dims`: 'DF' -> P('fsdp', 'tensor')."""
    return P(*(WEIGHT_AXES[letter] for letter in dims))


def activation_spec(dims: str) -> P:
    """Returns the sharding of an activation: 'BTD' -> P(('data', 'fsdp'), 'context', None)."""
    return P(*(ACTIVATION_AXES[letter] for letter in dims))
