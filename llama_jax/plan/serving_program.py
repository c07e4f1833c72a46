"""Lowers prefill and decode for a pod that need not be there, and compiles them."""

from functools import partial

import jax
import jax.numpy as jnp

from llama_jax.checkpoint.tree import eval_shape_on_mesh
from llama_jax.config.mesh import MeshConfig
from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError
from llama_jax.inference import generate
from llama_jax.inference.engine.page_pool import pool_pages
from llama_jax.inference.generate import NO_TOKEN, DecodeState, Rows
from llama_jax.inference.sampling import Sampling, SamplingArrays, TokenCounts, stack_sampling
from llama_jax.model.cache import KVCache, init_cache, init_paged_cache, page_slots
from llama_jax.model.weights import Llama, UnstackedLlama, decode_layout, layer_weights
from llama_jax.parallel.head_copies import copies_of_head, with_copies
from llama_jax.parallel.mesh import make_mesh, tensor_sizes
from llama_jax.parallel.sharding import activation_spec
from llama_jax.plan import topology
from llama_jax.plan.compiler import CompiledProgram, compile_program
from llama_jax.plan.topology import Pod

_BLOCK = 16  # tokens of one dispatch, as in `inference.stream.stream`
_ALTERNATIVES = "--batch or --context"

_step = jax.jit(generate.extend_cache, static_argnums=0, donate_argnums=2)


def slice_mesh(config: ModelConfig, pod: Pod) -> jax.sharding.Mesh:
    """Returns the mesh of one slice, with each layer split over all its chips.

    Raises:
        InputError: the number of devices does not divide the model's heads, FFN size or vocabulary.
    """
    size, fitting = pod.devices_per_slice, tensor_sizes(config)
    if size not in fitting:
        unit = "chips" if pod.chip.devices_per_chip == 1 else "devices"
        raise InputError(
            f"--topology {pod}: this model can't be split over the {size} {unit} of a slice;"
            f" numbers of {unit} that divide it: {', '.join(map(str, fitting))}"
        )
    devices = topology.devices(pod._replace(n_slices=1))
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=size), devices)


def abstract_weights(config: ModelConfig, mesh: jax.sharding.Mesh) -> UnstackedLlama:
    """Returns the abstract weights of a model, as `inference.load` lays them out."""

    def init() -> UnstackedLlama:
        model = Llama(with_copies(config), jax.random.key(0))
        layers = tuple(layer_weights(model, number) for number in range(config.n_layers))
        unstacked = UnstackedLlama(model.tok_embeddings, layers, model.norm, model.output)
        return decode_layout(unstacked)

    with jax.set_mesh(mesh):
        return eval_shape_on_mesh(init)


def abstract_row_cache(config: ModelConfig, mesh: jax.sharding.Mesh, slots: int) -> KVCache:
    """Returns the abstract KV cache of a row, with the slots that a device has of it."""
    with jax.set_mesh(mesh):
        if pool_pages(config, 1, slots, None) is not None:
            slots = -(-slots // copies_of_head(config.n_kv_heads))
        return eval_shape_on_mesh(partial(init_cache, config, 1, slots))


def compile_step(
    config: ModelConfig, pod: Pod, mesh: jax.sharding.Mesh, batch: int, slots: int, T: int = 1
) -> CompiledProgram:
    """Compiles the forward pass of T tokens per row over the KV cache, without sampling.

    This is a decode step, or with T > 1 the prefill of a chunk of a prompt.

    Raises:
        DoesNotFit, InputError: as `compile_program`.
    """
    model = abstract_weights(config, mesh)
    with jax.set_mesh(mesh):
        cache = eval_shape_on_mesh(partial(init_engine_cache, config, batch, slots))
        tokens = abstract_integers(mesh, "BT", batch, T)
        lengths = abstract_integers(mesh, "B", batch)
        lowered = _step.lower(config, model, cache, tokens, lengths)
    return compile_program(lowered, pod.chip, {}, _ALTERNATIVES)


def compile_prefill(
    config: ModelConfig, pod: Pod, mesh: jax.sharding.Mesh, T: int
) -> CompiledProgram:
    """Compiles the prefill of one prompt of T tokens.

    Raises:
        DoesNotFit, InputError: as `compile_program`.
    """
    model = abstract_weights(config, mesh)
    with jax.set_mesh(mesh):
        tokens, lengths = abstract_integers(mesh, "BT", 1, T), abstract_integers(mesh, "B", 1)
        lowered = generate.prefill.lower(config, model, tokens, lengths, slots=T)
    return compile_program(lowered, pod.chip, {}, _ALTERNATIVES)


def compile_decode_loop(
    config: ModelConfig, pod: Pod, mesh: jax.sharding.Mesh, batch: int, slots: int
) -> CompiledProgram:
    """Compiles the decode loop over `_BLOCK` tokens, sampling included, to read its memory.

    Raises:
        DoesNotFit, InputError: as `compile_program`.
    """
    model = abstract_weights(config, mesh)
    with jax.set_mesh(mesh):
        state = eval_shape_on_mesh(partial(_init_state, config, batch, slots))
        lowered = generate.decode.lower(config, model, state, _BLOCK, capacity=_BLOCK)
    return compile_program(lowered, pod.chip, {}, _ALTERNATIVES)


def abstract_integers(mesh: jax.sharding.Mesh, dims: str, *shape: int) -> jax.ShapeDtypeStruct:
    """Returns an abstract int32 array, sharded as an activation with these dimensions."""
    return jax.ShapeDtypeStruct(
        shape, jnp.int32, sharding=jax.NamedSharding(mesh, activation_spec(dims))
    )


def _init_state(config: ModelConfig, batch: int, slots: int) -> DecodeState:
    """Returns a batch in which no row has generated a token yet. Call it while tracing."""

    def full(value: int, dims: str, *shape: int, dtype: type = jnp.int32) -> jax.Array:
        return jnp.full((batch, *shape), value, dtype, out_sharding=activation_spec(dims))

    V = config.vocab_size
    settings = stack_sampling([Sampling()] * batch)
    rows = Rows(
        remaining_B=full(slots, "B"),
        generated_B=full(0, "B"),
        ends_BE=full(NO_TOKEN, "BS", 1),
        seeds_B=full(0, "B", dtype=jnp.uint32),
        sampling=SamplingArrays(
            *(jax.reshard(jnp.asarray(x_B), activation_spec("B")) for x_B in settings)
        ),
        counts=TokenCounts(
            prompt_BV=full(False, "BS", V, dtype=jnp.bool_), generated_BV=full(0, "BS", V)
        ),
    )
    logits_BV = full(0, "BV", V, dtype=jnp.float32)
    cache = init_engine_cache(config, batch, slots)
    return DecodeState(cache=cache, logits_BV=logits_BV, rows=rows)


def init_engine_cache(config: ModelConfig, batch: int, slots: int) -> KVCache:
    """Returns an empty cache as the engine has it, with room for `batch` rows of `slots` tokens."""
    pages = pool_pages(config, batch, slots, None)
    if pages is None:
        return init_cache(config, batch, slots)
    return init_paged_cache(config, batch, pages, -(-slots // page_slots(config)))
