"""Converts trees of arrays to nested dicts by name, and computes their shapes and shardings."""

from typing import Any, TypeVar

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config.model import ModelConfig
from llama_jax.model.summary import path_names
from llama_jax.model.weights import Llama

Tree = TypeVar("Tree")


def tree_to_dict(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a pytree in nested dicts, by plain names ('layers' -> 'wq')."""
    nested: dict[str, Any] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        *parents, last = path_names(path)
        subtree = nested
        for name in parents:
            subtree = subtree.setdefault(name, {})
        subtree[last] = leaf
    return nested


def dict_to_tree(like: Tree, nested: dict[str, Any]) -> Tree:
    """Returns the leaves of `nested` in the tree structure of `like`: `tree_to_dict` inverted."""

    def leaf(path: tuple[Any, ...], _: Any) -> Any:
        found: Any = nested
        for name in path_names(path):
            found = found[name]
        return found

    return jax.tree.map_with_path(leaf, like)


def eval_shape_on_mesh(function: Any, *args: Any) -> Any:
    """Returns shapes, dtypes and shardings of `function(*args)` on the current mesh, uncomputed."""
    mesh = jax.sharding.get_mesh()

    def with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(with_sharding, jax.eval_shape(function, *args))


def abstract_model(config: ModelConfig) -> Llama:
    """Returns the shapes, dtypes and shardings of a model's weights on the current mesh."""
    # The key is created in the traced function: the devices of a planned pod may not exist.
    return eval_shape_on_mesh(lambda: Llama(config, jax.random.key(0)))
