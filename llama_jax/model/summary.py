"""The base class of what holds weights: it prints one line for each kind of weight."""

from typing import Any

import jax
from flax import nnx


class WeightsModule(nnx.Module):
    """A module that holds weights and nothing else."""

    def __repr__(self) -> str:
        return summarize_weights(self)


def summarize_weights(tree: Any) -> str:
    """Returns the type and size of a tree of weights, and a line for each kind of weight.

    The line says dtype, shape and sharding. Layers that are held one by one share it.
    """
    kinds: dict[tuple[str, ...], int] = {}
    count = 0
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = ".".join(part for part in path_names(path) if not part.isdecimal())
        spec = getattr(getattr(leaf, "sharding", None), "spec", "")
        kind = (name, f"{leaf.dtype}{list(leaf.shape)}", str(spec).replace("PartitionSpec", "P"))
        kinds[kind] = kinds.get(kind, 0) + 1
        count += leaf.size
    lines = [f"{type(tree).__name__}: {count:,} numbers"]
    width = max(len(name) for name, *_ in kinds)
    for (name, shape, spec), times in kinds.items():
        several = f"{times} × " if times > 1 else ""
        lines.append(f"  {name:{width}}  {several + shape:28}  {spec}".rstrip())
    return "\n".join(lines)


def path_names(path: tuple[Any, ...]) -> list[str]:
    """Returns the plain names on the path to a leaf, as JAX gives it."""
    found = [str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path]
    # An nnx.Param is a node with one leaf, `value`: the weight's own name is enough.
    return found[:-1] if found[-1] == "value" else found
