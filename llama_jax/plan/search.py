"""Searches for the fastest way to train on a pod: mesh, rematerialization, micro-batches."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

from llama_jax.config.mesh import MeshConfig
from llama_jax.config.run import Config
from llama_jax.errors import InputError
from llama_jax.parallel.mesh import divisors
from llama_jax.plan.topology import Pod, network_bandwidth
from llama_jax.plan.training import TrainingPlan, attention_seconds, plan_training
from llama_jax.plan.training_report import gib

_MATRIX_EFFICIENCY = 0.85  # share of the peak that matrix products reach, for the arithmetic
# First ratio of the compiler's memory to the arithmetic's; compiled programs took 0.80 to 1.06.
_MEMORY_RATIO = 0.85
# Smallest exposed share of the communication: the ends of a step, and its last reduction.
_EXPOSED = 0.1
_LONG = 32_768  # tokens from which splitting sequences may pay off


def candidates(config: Config, pod: Pod) -> Iterator[Config]:
    """Yields all variants of `config` whose mesh and micro-batches divide the pod and the model."""
    model, data = config.model, config.data
    for tensor, context in itertools.product(
        divisors(min(16, pod.n_devices)), divisors(pod.n_devices)
    ):
        heads = (model.n_kv_heads, model.n_heads, model.hidden_dim, model.vocab_size)
        if any(size % tensor for size in heads):
            continue
        if context > 1 and (data.seq_len < _LONG or data.seq_len % (256 * context)):
            continue
        if pod.n_devices % (tensor * context):
            continue
        rest = pod.n_devices // tensor // context
        for fsdp in divisors(rest):
            replicas = rest // fsdp
            if model.dim % fsdp or replicas % pod.n_slices or data.batch_size % rest:
                continue
            mesh = MeshConfig(data=replicas, fsdp=fsdp, context=context, tensor=tensor)
            for micro in divisors(data.batch_size // rest):
                for remat in ("none", "products", "projections", "attention", "full", "offload"):
                    yield replace(
                        config,
                        mesh=mesh,
                        model=replace(model, remat=remat),
                        training=replace(config.training, micro_batches=micro),
                    )


def estimate_memory(config: Config) -> float:
    """Returns a rough number of bytes that a chip needs, by arithmetic alone."""
    model, mesh, size = config.model, config.mesh, 2 if config.model.dtype == "bfloat16" else 4
    D, F, L = model.dim, model.hidden_dim, model.n_layers
    NH, KH = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    parts = mesh.fsdp * mesh.tensor
    accumulated = 4 if config.training.micro_batches > 1 else 0
    trained = config.lora.n_params(model) if config.lora else model.n_params
    state = trained * (4 + 4 + 8 + accumulated) / parts  # weights, gradients, moments
    state += _frozen_bytes(config) * model.n_params / parts
    tokens = config.data.batch_size * config.data.seq_len / config.training.micro_batches
    tokens /= mesh.data * mesh.fsdp * mesh.context
    # Numbers saved per token and layer, in addition to the layer's input (D), which 'offload' moves
    # to the host.
    saved = {"offload": -D, "full": 0, "attention": NH, "projections": 2 * NH + 2 * KH}
    saved["products"] = saved["projections"] + D + 2 * F
    saved["none"] = saved["products"] + 2 * D + NH + F
    per_chip = saved[model.remat] / (mesh.tensor if saved[model.remat] > 0 else 1)
    # All activations of the layer that is being recomputed, with their gradients.
    working = 3 * (D + saved["none"] / mesh.tensor)
    activations = tokens * size * (L * (D + per_chip) + working)
    gathered = 2 * size * model.n_params / L / mesh.tensor
    head_gradients = 4 if config.lora else 4 + 4
    head = model.vocab_size * D * (size + head_gradients) / mesh.tensor
    return state + activations + gathered + head


def _frozen_bytes(config: Config) -> int:
    """Returns the bytes of a frozen weight of LoRA or DPO; 0 if there are none."""
    if not config.has_base:
        return 0
    if config.model.quantized == "int8":
        return 1
    return 4 if config.model.param_dtype == "float32" else 2


def estimate_seconds(config: Config, pod: Pod) -> float:
    """Returns a rough time of a step, by arithmetic alone."""
    model, mesh, T = config.model, config.mesh, config.data.seq_len
    tokens = config.data.batch_size * T
    weights = model.n_params - (0 if model.tied_head else model.vocab_size * model.dim)
    is_dpo = config.training.objective == "dpo"
    # For each weight; a frozen one has no gradient; the reference has a forward pass.
    flops = (4 if config.lora else 6) + (2 if is_dpo else 0)
    recomputed = {"none": 0, "products": 0.01, "projections": 0.2, "attention": 0.3, "full": 1 / 3}
    recomputed["offload"] = 0.34  # the transfer to the host and back is hidden, but not free
    peak = pod.chip.bf16_tflops * 1e12
    products = weights * tokens * (flops + 6 * recomputed[model.remat]) / pod.n_devices / peak
    products /= _MATRIX_EFFICIENCY
    kernels = attention_seconds(config, asdict(mesh), pod.chip)
    # Each micro-batch gathers the weights for forward (also of a reference) and backward in the
    # compute dtype, or in int8, and reduces the gradients once in float32.
    size = 1 if model.quantized == "int8" else 2
    gathers = 3 if is_dpo else 2
    moved = model.n_params * (gathers * size + (0 if config.lora else 4)) / mesh.tensor
    moved *= config.training.micro_batches
    transfer = moved / network_bandwidth(pod, mesh.fsdp) / 1e9 if mesh.fsdp > 1 else 0.0
    network = max(_EXPOSED * transfer, transfer - products)
    if mesh.tensor > 1:
        # Each layer has two all-reduces of D numbers per token forward and two backward; all are
        # exposed.
        bytes_per_token = 4 * 2 * 2 * model.n_layers * model.dim
        local = tokens / (mesh.data * mesh.fsdp * mesh.context)
        network += local * bytes_per_token / network_bandwidth(pod, mesh.tensor) / 1e9
    return products + kernels + network


def find_fastest(
    config: Config, pod: Pod, compile_best: int, log: Callable[[str], None]
) -> list[TrainingPlan]:
    """Compiles the candidates that are fastest by arithmetic; returns their plans, fastest first.

    Plans that don't fit come last.

    Args:
        compile_best: the search ends when so many plans fit, or after twice as many compilations.
        log: called with lines of progress.

    Raises:
        InputError: no compiled candidate fits.
    """
    variants = list(candidates(config, pod))
    capacity, ratio = pod.chip.hbm_gib * 2**30, _MEMORY_RATIO
    fitting = [variant for variant in variants if ratio * estimate_memory(variant) < capacity]
    log(f"{len(variants)} ways divide {pod}; {len(fitting)} fit by arithmetic")
    plans: list[TrainingPlan] = []
    tries = 0
    for variant in sorted(fitting, key=lambda variant: estimate_seconds(variant, pod)):
        found = [plan for plan in plans if plan.fits]
        if len(found) == compile_best or tries == 2 * compile_best:
            break
        # The memory ratio of the last compiled plan corrects the arithmetic. Two fitting plans per
        # mesh are enough.
        same_mesh = sum(plan.config.mesh == variant.mesh for plan in found)
        if ratio * estimate_memory(variant) >= capacity or same_mesh == 2:
            continue
        tries += 1
        seconds = estimate_seconds(variant, pod)
        log(f"{tries}: {as_overrides(variant)}, by arithmetic {seconds:.2f} s")
        try:
            plan = plan_training(variant, pod, lambda _: None)
        except InputError as error:
            log(f"    {error}")
            continue
        if math.isfinite(plan.needed_bytes):  # the compiler may reject a program without a number
            ratio = plan.needed_bytes / estimate_memory(variant)
        log(f"    {_summary(plan)}")
        plans.append(plan)
    if not any(plan.fits for plan in plans):
        raise InputError(
            f"no mesh and rematerialization of {config.model.n_params:,} parameters that was tried"
            f" fits {pod}: take more chips, or fewer tokens (data.batch_size, data.seq_len)"
        )
    return sorted(plans, key=lambda p: (not p.fits, not p.compiler_seconds, p.step_seconds))


def _summary(plan: TrainingPlan) -> str:
    """Returns the time and the memory of a plan in one line."""
    needed = gib(plan.needed_bytes, 1)
    if not plan.fits:
        return f"does not fit: {needed} of {plan.pod.chip.hbm_gib:g} GiB"
    if not plan.compiler_seconds:
        return f"fits in {needed} GiB; no estimate of time"
    return (
        f"{plan.step_seconds:.3f} s, MFU {plan.mfu(plan.step_seconds):.1%} (the compiler's estimate"
        f" alone {plan.mfu(plan.compiler_seconds):.1%}), {needed} GiB"
    )


def as_overrides(config: Config) -> str:
    """Returns the searched settings as overrides for the command line."""
    mesh = " ".join(f"mesh.{axis}={size}" for axis, size in asdict(config.mesh).items())
    micro_batches = config.training.micro_batches
    return f"{mesh} model.remat={config.model.remat} training.micro_batches={micro_batches}"


def as_yaml(config: Config) -> str:
    """Returns the searched settings as a fragment of a configuration file."""
    mesh = ", ".join(f"{axis}: {size}" for axis, size in asdict(config.mesh).items())
    return (
        f"model: {{remat: {config.model.remat}}}\nmesh: {{{mesh}}}\n"
        f"training: {{micro_batches: {config.training.micro_batches}}}"
    )
