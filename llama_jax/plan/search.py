"""Looks for the fastest way to train on a pod: mesh, rematerialisation, micro-batches."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

from llama_jax.config import Config, MeshConfig
from llama_jax.errors import InputError
from llama_jax.plan import estimate
from llama_jax.plan.estimate import Plan
from llama_jax.plan.pod import Pod
from llama_jax.sharding import divisors

_MATRIX_EFFICIENCY = 0.85  # of the peak, for arithmetic alone
_ROOM = 0.86  # of the memory: compiled programs took 13 to 19 % more than this arithmetic
_EXPOSED = 0.1  # of what travels beside computation, at least: the ends of a step, and the last sum
_LONG = 32_768  # tokens, from which on splitting sequences may pay


def candidates(config: Config, pod: Pod) -> Iterator[Config]:
    """Yields the ways to run `config` on `pod` whose sizes divide."""
    model, data = config.model, config.data
    for tensor, context in itertools.product(divisors(min(16, pod.size)), divisors(pod.size)):
        heads = (model.n_kv_heads, model.n_heads, model.hidden_dim, model.vocab_size)
        if any(size % tensor for size in heads):
            continue
        if context > 1 and (data.seq_len < _LONG or data.seq_len % (256 * context)):
            continue
        if pod.size % (tensor * context):
            continue
        rest = pod.size // tensor // context
        for fsdp in divisors(rest):
            replicas = rest // fsdp
            if model.dim % fsdp or replicas % pod.slices or data.batch_size % rest:
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


def memory(config: Config) -> float:
    """Returns about how many bytes a chip needs, by arithmetic alone."""
    model, mesh, size = config.model, config.mesh, 2 if config.model.dtype == "bfloat16" else 4
    D, F, L = model.dim, model.hidden_dim, model.n_layers
    NH, KH = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    parts = mesh.fsdp * mesh.tensor
    summed = 4 if config.training.micro_batches > 1 else 0
    state = model.n_params * (4 + 4 + 8 + summed) / parts  # weights, gradients, moments
    tokens = config.data.batch_size * config.data.seq_len / config.training.micro_batches
    tokens /= mesh.data * mesh.fsdp * mesh.context
    kept = {"offload": -D, "full": 0, "attention": NH, "projections": 2 * NH + 2 * KH}
    kept["products"] = kept["projections"] + D + 2 * F
    kept["none"] = kept["products"] + 2 * D + NH + F
    split = kept[model.remat] / (mesh.tensor if kept[model.remat] > 0 else 1)
    activations = tokens * size * (L * (D + split) + 2 * F / mesh.tensor + 4 * D)
    gathered = 2 * size * model.n_params / L / mesh.tensor
    head = model.vocab_size * D * (size + 4 + 4) / mesh.tensor
    return state + activations + gathered + head


def seconds(config: Config, pod: Pod) -> float:
    """Returns about how long a step takes, by arithmetic alone."""
    model, mesh, T = config.model, config.mesh, config.data.seq_len
    tokens = config.data.batch_size * T
    weights = 6 * (model.n_params - (0 if model.tied_head else model.vocab_size * model.dim))
    again = {"none": 0, "products": 0.01, "projections": 0.2, "attention": 0.3, "full": 1 / 3}
    again["offload"] = 0.34  # its way to the host and back is hidden, but not free
    peak = pod.chip.tflops * 1e12
    sizes = asdict(mesh)
    products = weights * tokens * (1 + again[model.remat]) / pod.size / peak / _MATRIX_EFFICIENCY
    kernels = estimate.attention_seconds(config, sizes, pod.chip)
    # Gathered forward and backward in the compute type, and summed once, for each micro-batch.
    moved = model.n_params * (2 + 2 + 4) / mesh.tensor * config.training.micro_batches
    hidden = moved / estimate.network_bandwidth(pod, mesh.fsdp) / 1e9 if mesh.fsdp > 1 else 0.0
    network = max(_EXPOSED * hidden, hidden - products)
    if mesh.tensor > 1:
        # Two sums forward and two backward in each layer, of a token's width; nothing hides them.
        a_token = 4 * 2 * 2 * model.n_layers * model.dim
        local = tokens / (mesh.data * mesh.fsdp * mesh.context)
        network += local * a_token / estimate.network_bandwidth(pod, mesh.tensor) / 1e9
    return products + kernels + network


def search(config: Config, pod: Pod, compile_best: int, tell: Callable[[str], None]) -> list[Plan]:
    """Returns plans of the ways to run that arithmetic finds best, fastest first.

    Raises:
        InputError: no way fits.
    """
    ways = list(candidates(config, pod))
    fitting = [way for way in ways if memory(way) < _ROOM * pod.chip.hbm * 2**30]
    tell(f"{len(ways)} ways divide {pod}; {len(fitting)} fit by arithmetic")
    if not fitting:
        raise InputError(
            f"no mesh and rematerialisation of {config.model.n_params:,} parameters fits {pod}:"
            " take more chips, or fewer tokens (data.batch_size, data.seq_len)"
        )
    ranked = sorted(fitting, key=lambda way: seconds(way, pod))
    plans: list[Plan] = []
    for i, way in enumerate(_distinct(ranked, compile_best)):
        tell(f"{i + 1} of {compile_best}: {fragment(way)}, by arithmetic {seconds(way, pod):.2f} s")
        try:
            plan = estimate.make(way, pod, lambda _: None)
        except InputError as error:
            tell(f"    {error}")
            continue
        tell(f"    {_verdict(plan)}")
        plans.append(plan)
    if not plans:
        raise InputError(f"none of the {compile_best} ways that were tried compiles for {pod}")
    return sorted(plans, key=lambda plan: (not plan.fits, not plan.compiler, plan.step))


def _distinct(ranked: list[Config], count: int) -> list[Config]:
    """Returns the first of `ranked`, of each mesh the two best at most."""
    chosen: list[Config] = []
    for way in ranked:
        if sum(other.mesh == way.mesh for other in chosen) < 2:
            chosen.append(way)
        if len(chosen) == count:
            break
    return chosen


def _verdict(plan: Plan) -> str:
    if not plan.fits:
        return f"does not fit: {plan.needed / 2**30:.1f} of {plan.pod.chip.hbm:g} GiB"
    if not plan.compiler:
        return f"fits in {plan.needed / 2**30:.1f} GiB; no estimate of time"
    return (
        f"{plan.step:.3f} s, MFU {plan.mfu(plan.step):.1%} (the compiler's estimate alone"
        f" {plan.mfu(plan.compiler):.1%}), {plan.needed / 2**30:.1f} GiB"
    )


def fragment(config: Config) -> str:
    """Returns what sets a way of running apart, as overrides of a configuration."""
    mesh = " ".join(f"mesh.{axis}={size}" for axis, size in asdict(config.mesh).items())
    micro = config.training.micro_batches
    return f"{mesh} model.remat={config.model.remat} training.micro_batches={micro}"


def yaml(config: Config) -> str:
    """Returns the same as a fragment of a configuration file."""
    mesh = ", ".join(f"{axis}: {size}" for axis, size in asdict(config.mesh).items())
    return (
        f"model: {{remat: {config.model.remat}}}\nmesh: {{{mesh}}}\n"
        f"training: {{micro_batches: {config.training.micro_batches}}}"
    )
