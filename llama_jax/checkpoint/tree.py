"""Trees of arrays: by name, and without their numbers."""

from functools import partial
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
        place = nested
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = leaf
    return nested


def dict_to_tree(like: Tree, nested: dict[str, Any]) -> Tree:
    """Returns the leaves in `nested` in the structure of `like`: `tree_to_dict` undone."""

    def leaf(path: tuple[Any, ...], _: Any) -> Any:
        found: Any = nested
        for name in path_names(path):
            found = found[name]
        return found

    return jax.tree.map_with_path(leaf, like)


def eval_shape_on_mesh(make: Any, *args: Any) -> Any:
    """Returns the shapes, dtypes and shardings on the current mesh of what `make(*args)` makes."""
    mesh = jax.sharding.get_mesh()

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(placed, jax.eval_shape(make, *args))


def abstract_model(config: ModelConfig) -> Llama:
    """Returns the shapes, dtypes and shardings of a model's weights on the current mesh."""
    return eval_shape_on_mesh(partial(Llama, config), jax.random.key(0))
