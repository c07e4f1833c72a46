"""Where a dimension letter meets a mesh axis: the only place that names the axes of the mesh.

Axes: `data` replicates the weights (across slices or nodes, over the slow network), `fsdp` splits
weights and batch, `context` splits the sequence, `tensor` splits heads, feed-forward and
vocabulary.
"""

from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")
# Weights at rest. Stacked layers (L) are never split: every device holds its part of each layer.
WEIGHT_AXES = {"L": None, "V": "tensor", "D": "fsdp", "N": "tensor", "K": "tensor", "H": None}
WEIGHT_AXES |= {"F": "tensor"}
# Everything that a forward pass makes: activations, gathered weights, the cache. A stands for the
# micro-batches of gradient accumulation, G for the query heads that share a key/value head.
ACTIVATION_AXES = {"A": None, "B": BATCH_AXES, "T": "context", "S": None, "L": None, "D": None}
ACTIVATION_AXES |= {"H": None}
ACTIVATION_AXES |= {"N": "tensor", "K": "tensor", "G": None, "F": "tensor", "V": "tensor"}


def weight_spec(dims: str) -> P:
    """Returns how a weight with the dimensions `dims` is split: 'DF' -> P('fsdp', 'tensor')."""
    return P(*(WEIGHT_AXES[letter] for letter in dims))


def activation_spec(dims: str) -> P:
    """Returns how an activation is split: 'BTD' -> P(('data', 'fsdp'), 'context', None)."""
    return P(*(ACTIVATION_AXES[letter] for letter in dims))
