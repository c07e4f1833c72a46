"""Lowers the training step for a pod that need not be there, and compiles it."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.checkpoint.tree import abstract_model, eval_shape_on_mesh
from llama_jax.config.run import Config
from llama_jax.data.windows import Batch
from llama_jax.errors import InputError
from llama_jax.parallel.sharding import activation_spec
from llama_jax.plan.compiler import CompiledProgram, bytes_per_device, compile_program
from llama_jax.runtime.chips import PlannableChip
from llama_jax.training.step import init_state, train_step


@dataclass(frozen=True, kw_only=True)
class CompiledTrainStep:
    """A compiled training step, and the bytes of its largest parts on one device.

    Attributes:
        weights: bytes of the trained parameters.
        frozen: bytes of the frozen weights of a run of LoRA or DPO, otherwise 0.
        optimizer: bytes of the optimizer state.
        saved_activations: bytes that the forward pass saves for the backward pass.
        program: the compiler's figures.
    """

    weights: int
    frozen: int = 0
    optimizer: int
    saved_activations: int
    program: CompiledProgram


def compile_train_step(
    config: Config, mesh: jax.sharding.Mesh, chip: PlannableChip
) -> CompiledTrainStep:
    """Compiles the training step of `config` for `mesh`.

    Raises:
        DoesNotFit: the step needs more memory than a device has.
        InputError: the compiler fails for another reason.
    """
    traced, trained, opt_state, base = trace_train_step(config, mesh)
    with jax.set_mesh(mesh):
        lowered = traced.lower()
    alternatives = "model.remat or training.micro_batches"
    return CompiledTrainStep(
        weights=bytes_per_device(trained),
        frozen=bytes_per_device(base),
        optimizer=bytes_per_device(opt_state),
        saved_activations=saved_activation_bytes(traced.jaxpr.jaxpr, config.model.n_layers),
        program=compile_program(lowered, chip, chip.compiler_options, alternatives),
    )


def trace_train_step(config: Config, mesh: jax.sharding.Mesh) -> tuple[Any, Any, Any, Any]:
    """Returns the traced training step, and abstract: what it trains, optimizer state, base.

    Raises:
        InputError: a run on preferences has no segments.
    """
    if config.training.objective == "dpo" and not config.data.isolate_documents:
        raise InputError(
            "training.objective is dpo, whose windows contain several preferences: set"
            " data.isolate_documents to true"
        )
    with jax.set_mesh(mesh):
        trained, opt_state = eval_shape_on_mesh(lambda: init_state(config, jax.random.key(0)))
        A, B, T = config.training.micro_batches, config.data.batch_size, config.data.seq_len
        sharding = jax.NamedSharding(mesh, activation_spec("ABT"))
        rows_ABT = jax.ShapeDtypeStruct((A, B // A, T), jnp.int32, sharding=sharding)
        segments_ABT = rows_ABT if config.data.isolate_documents else None
        batch = Batch(rows_ABT, rows_ABT, rows_ABT, segments_ABT)
        step = jax.ShapeDtypeStruct((), jnp.int32)
        base = abstract_model(config.model) if config.has_base else None
        traced = train_step.trace(config, trained, opt_state, batch, step, base)
        return traced, trained, opt_state, base


def saved_activation_bytes(jaxpr: Any, n_layers: int) -> int:
    """Returns the bytes on one device that the forward pass saves for the backward pass.

    These are the stacked outputs of the first scan over layers. 0 if the layers are unrolled.
    """
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and equation.params["length"] == n_layers:
            layer_outputs = equation.params["jaxpr"].out_avals
            stacked = [
                variable.aval
                for variable, output in zip(equation.outvars, layer_outputs, strict=True)
                if variable.aval.ndim > output.ndim
            ]
            if stacked:
                return bytes_per_device(stacked)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns") and (found := saved_activation_bytes(inner, n_layers)):
                return found
    return 0


def config_of_depth(config: Config, n_layers: int) -> Config:
    """Returns the same run with `n_layers` unrolled layers and a single micro-batch."""
    rows = config.data.batch_size // config.training.micro_batches
    return replace(
        config,
        model=replace(config.model, n_layers=n_layers, scan=False),
        data=replace(config.data, batch_size=rows),
        training=replace(config.training, micro_batches=1),
    )
