"""The base class of modules of weights, whose repr has one line for each weight."""

from typing import Any

import jax
from flax import nnx


class WeightsModule(nnx.Module):
    """A module whose only attributes are weights and other such modules."""

    def __repr__(self) -> str:
        return summarize_weights(self)


def summarize_weights(tree: Any) -> str:
    """Returns the type and size of a tree of weights, and one line for each name of a weight.

    A line has dtype, shape and sharding. Unstacked layers share their lines.
    """
    counts: dict[tuple[str, ...], int] = {}
    total = 0
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = ".".join(part for part in path_names(path) if not part.isdecimal())
        spec = getattr(getattr(leaf, "sharding", None), "spec", "")
        line = (name, f"{leaf.dtype}{list(leaf.shape)}", str(spec).replace("PartitionSpec", "P"))
        counts[line] = counts.get(line, 0) + 1
        total += leaf.size
    lines = [f"{type(tree).__name__}: {total:,} parameters"]
    width = max(len(name) for name, *_ in counts)
    for (name, shape, spec), count in counts.items():
        times = f"{count} × " if count > 1 else ""
        lines.append(f"  {name:{width}}  {times + shape:28}  {spec}".rstrip())
    return "\n".join(lines)


def path_names(path: tuple[Any, ...]) -> list[str]:
    """Returns the names on a JAX key path to a leaf: ['layers', 'wq']."""
    names = [str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path]
    # An nnx.Param is a node with one leaf, `value`, which adds nothing to the weight's name.
    return names[:-1] if names[-1] == "value" else names
