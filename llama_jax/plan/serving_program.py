"""Compiles what generates text for devices that need not be there."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from llama_jax.checkpoint.tree import eval_shape_on_mesh
from llama_jax.config.model import ModelConfig
from llama_jax.config.run import MeshConfig
from llama_jax.errors import InputError
from llama_jax.inference import generate
from llama_jax.inference.generate import NO_TOKEN, DecodeState, Rows
from llama_jax.inference.sampling import Sampling, SamplingArrays, TokenCounts, stack_sampling
from llama_jax.model.cache import KVCache, init_cache
from llama_jax.model.weights import Llama, UnstackedLlama, layer_weights
from llama_jax.parallel.mesh import make_mesh, tensor_sizes
from llama_jax.parallel.sharding import activation_spec
from llama_jax.plan import topology as pods
from llama_jax.plan.compiler import Reading, reading
from llama_jax.plan.topology import Pod

_BLOCK = 16  # tokens of one dispatch, as `generate.stream` makes them
_INSTEAD = "--batch or --context"

_step = jax.jit(generate.extend_cache, static_argnums=0, donate_argnums=2)


def mesh_of(config: ModelConfig, pod: Pod) -> jax.sharding.Mesh:
    """Returns the mesh of one slice, all of whose chips hold a part of each layer.

    Raises:
        InputError: the model's heads, feed-forward size or vocabulary don't divide so.
    """
    chips, fitting = pod.size // pod.slices, tensor_sizes(config)
    if chips not in fitting:
        raise InputError(
            f"--topology {pod}: this model can't be split over the {chips} chips of a slice;"
            f" numbers of chips that divide it: {', '.join(map(str, fitting))}"
        )
    devices = pods.devices(pod._replace(slices=1))
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=chips), devices)


def over(config: ModelConfig, mesh: jax.sharding.Mesh) -> ModelConfig:
    """Returns the model as `inference.load` makes it: a key/value head for each device at least."""
    return replace(config, n_kv_heads=max(config.n_kv_heads, mesh.size))


def weights(config: ModelConfig, mesh: jax.sharding.Mesh) -> UnstackedLlama:
    """Returns the abstract weights of a model, layer by layer."""

    def make() -> UnstackedLlama:
        model = Llama(config, jax.random.key(0))
        layers = tuple(layer_weights(model, number) for number in range(config.n_layers))
        return UnstackedLlama(model.tok_embeddings, layers, model.norm, model.output)

    with jax.set_mesh(mesh):
        return eval_shape_on_mesh(make)


def cache(config: ModelConfig, mesh: jax.sharding.Mesh, batch: int, slots: int) -> KVCache:
    """Returns the abstract cache of a batch."""
    with jax.set_mesh(mesh):
        return eval_shape_on_mesh(partial(init_cache, config, batch, slots))


def compile_step(
    config: ModelConfig, pod: Pod, mesh: jax.sharding.Mesh, batch: int, slots: int
) -> Reading:
    """Compiles the reading of one more token of each row: a step of decoding, without sampling.

    Raises:
        DoesNotFit, InputError: as `program.reading`.
    """
    kept = cache(config, mesh, batch, slots)
    model = weights(config, mesh)
    with jax.set_mesh(mesh):
        tokens, lengths = _integers(mesh, "BT", batch, 1), _integers(mesh, "B", batch)
        lowered = _step.lower(config, model, kept, tokens, lengths)
    return reading(lowered, pod.chip, {}, _INSTEAD)


def compile_prefill(config: ModelConfig, pod: Pod, mesh: jax.sharding.Mesh, T: int) -> Reading:
    """Compiles the reading of one prompt of T tokens.

    Raises:
        DoesNotFit, InputError: as `program.reading`.
    """
    model = weights(config, mesh)
    with jax.set_mesh(mesh):
        tokens, lengths = _integers(mesh, "BT", 1, T), _integers(mesh, "B", 1)
        lowered = generate.prefill.lower(config, model, tokens, lengths, slots=T)
    return reading(lowered, pod.chip, {}, _INSTEAD)


def compile_decode(
    config: ModelConfig, pod: Pod, mesh: jax.sharding.Mesh, batch: int, slots: int
) -> Reading:
    """Compiles the whole loop over new tokens, sampling included: what its memory is read from.

    Raises:
        DoesNotFit, InputError: as `program.reading`.
    """
    model = weights(config, mesh)
    with jax.set_mesh(mesh):
        state = eval_shape_on_mesh(partial(_state, config, batch, slots))
        lowered = generate.decode.lower(config, model, state, _BLOCK, capacity=_BLOCK)
    return reading(lowered, pod.chip, {}, _INSTEAD)


def _integers(mesh: jax.sharding.Mesh, dims: str, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        shape, jnp.int32, sharding=jax.NamedSharding(mesh, activation_spec(dims))
    )


def _state(config: ModelConfig, batch: int, slots: int) -> DecodeState:
    """Makes a batch whose rows have not begun, in a traced function."""

    def full(value: int, dims: str, *shape: int, dtype: type = jnp.int32) -> jax.Array:
        return jnp.full((batch, *shape), value, dtype, out_sharding=activation_spec(dims))

    V = config.vocab_size
    keys_B = jax.vmap(jax.random.key)(full(0, "B", dtype=jnp.uint32))
    rows = Rows(
        full(slots, "B"),
        full(0, "B"),
        full(NO_TOKEN, "BS", 1),
        jax.reshard(keys_B, activation_spec("B")),
        SamplingArrays(
            *(
                jax.reshard(jnp.asarray(knob), activation_spec("B"))
                for knob in stack_sampling([Sampling()] * batch)
            )
        ),
        TokenCounts(full(False, "BS", V, dtype=jnp.bool_), full(0, "BS", V)),
    )
    logits_BV = full(0, "BV", V, dtype=jnp.float32)
    return DecodeState(init_cache(config, batch, slots), logits_BV, rows)
