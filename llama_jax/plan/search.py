"""Looks for the fastest way to train on a pod: mesh, rematerialisation, micro-batches."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

from llama_jax.config.run import Config, MeshConfig
from llama_jax.errors import InputError
from llama_jax.parallel.mesh import divisors
from llama_jax.plan import training
from llama_jax.plan.topology import Pod
from llama_jax.plan.training import Plan

_MATRIX_EFFICIENCY = 0.85  # of the peak, for arithmetic alone
_TAKEN = 0.85  # of the memory by arithmetic; compiled programs took 0.80 to 1.06 of it
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
    # And all of the layer that is computed again, with its gradients.
    working = 3 * (D + kept["none"] / mesh.tensor)
    activations = tokens * size * (L * (D + split) + working)
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
    peak = pod.chip.bf16_tflops * 1e12
    sizes = asdict(mesh)
    products = weights * tokens * (1 + again[model.remat]) / pod.size / peak / _MATRIX_EFFICIENCY
    kernels = training.attention_seconds(config, sizes, pod.chip)
    # Gathered forward and backward in the compute type, and summed once, for each micro-batch.
    moved = model.n_params * (2 + 2 + 4) / mesh.tensor * config.training.micro_batches
    hidden = moved / training.network_bandwidth(pod, mesh.fsdp) / 1e9 if mesh.fsdp > 1 else 0.0
    network = max(_EXPOSED * hidden, hidden - products)
    if mesh.tensor > 1:
        # Two sums forward and two backward in each layer, of a token's width; nothing hides them.
        a_token = 4 * 2 * 2 * model.n_layers * model.dim
        local = tokens / (mesh.data * mesh.fsdp * mesh.context)
        network += local * a_token / training.network_bandwidth(pod, mesh.tensor) / 1e9
    return products + kernels + network


def search(config: Config, pod: Pod, compile_best: int, tell: Callable[[str], None]) -> list[Plan]:
    """Returns plans of the ways to run that arithmetic finds best, fastest first.

    It compiles until `compile_best` of them fit, at most twice as many.

    Raises:
        InputError: no way fits.
    """
    ways = list(candidates(config, pod))
    room, taken = pod.chip.hbm_gib * 2**30, _TAKEN
    fitting = [way for way in ways if taken * memory(way) < room]
    tell(f"{len(ways)} ways divide {pod}; {len(fitting)} fit by arithmetic")
    plans: list[Plan] = []
    tries = 0
    for way in sorted(fitting, key=lambda way: seconds(way, pod)):
        found = [plan for plan in plans if plan.fits]
        if len(found) == compile_best or tries == 2 * compile_best:
            break
        # What the last one took says more than any rule; of one mesh two are enough.
        same_mesh = sum(plan.config.mesh == way.mesh for plan in found)
        if taken * memory(way) >= room or same_mesh == 2:
            continue
        tries += 1
        tell(f"{tries}: {fragment(way)}, by arithmetic {seconds(way, pod):.2f} s")
        try:
            plan = training.make(way, pod, lambda _: None)
        except InputError as error:
            tell(f"    {error}")
            continue
        taken = plan.needed / memory(way)
        tell(f"    {_verdict(plan)}")
        plans.append(plan)
    if not any(plan.fits for plan in plans):
        raise InputError(
            f"no mesh and rematerialisation of {config.model.n_params:,} parameters that was tried"
            f" fits {pod}: take more chips, or fewer tokens (data.batch_size, data.seq_len)"
        )
    return sorted(plans, key=lambda plan: (not plan.fits, not plan.compiler, plan.step))


def _verdict(plan: Plan) -> str:
    if not plan.fits:
        return f"does not fit: {plan.needed / 2**30:.1f} of {plan.pod.chip.hbm_gib:g} GiB"
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
