"""What a run on a pod will need and reach, from what the compiler says of its training step."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from llama_jax.config.run import Config, MeshConfig
from llama_jax.parallel.mesh import check_divides, make_mesh
from llama_jax.plan import compiler
from llama_jax.plan import topology as pods
from llama_jax.plan.compiler import DoesNotFit
from llama_jax.plan.schedule import Collective, Traffic, traffic
from llama_jax.plan.topology import Pod
from llama_jax.runtime.chips import PlannableChip

# The share of the peak that attention kernels reach with heads of 128: published measurements of
# splash attention lie between 40 and 60 %.
ATTENTION_EFFICIENCY = 0.5
_RECOMPUTES_ATTENTION = ("full", "offload")
_BETWEEN_SLICES = 6.25  # GB/s for each chip: a host's 200 Gbit/s, over its 4 chips


@dataclass
class Plan:
    """What a run will need and reach. Bytes are of one chip, seconds of one step.

    Attributes:
        memory: bytes by kind.
        refused: the compiler found no program that fits.
        compiler: the compiler's own estimate of a step, without attention and network [s]; 0 where
            the run does not fit.
        attention: time of the attention kernels, by the model of `attention_seconds` [s].
        traffic: what each kind of collective costs.
        flops: of the hardware, attention included, on one chip in a step.
    """

    config: Config
    pod: Pod
    memory: dict[str, float] = field(default_factory=dict)
    refused: bool = False
    compiler: float = 0.0
    attention: float = 0.0
    traffic: dict[str, Traffic] = field(default_factory=dict)
    flops: float = 0.0
    compile_seconds: float = 0.0

    @property
    def needed(self) -> float:
        """Bytes of memory that a chip needs."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Tells whether that is there: the compiler keeps a little for itself."""
        return not self.refused and self.needed <= self.pod.chip.hbm_gib * 2**30

    @property
    def network(self) -> float:
        """Seconds in which collectives travel and nothing computes."""
        return sum(kind.exposed for kind in self.traffic.values())

    @property
    def step(self) -> float:
        """Seconds of a step, all in all."""
        return self.compiler + self.attention + self.network

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.config.data.batch_size * self.config.data.seq_len

    def mfu(self, seconds: float, *, causal: bool = True) -> float:
        """Returns the share of the peak that the model's FLOPs are, in a step of `seconds`.

        Causal counting takes the half of attention that causality leaves; full counting, which
        some publish, takes all of it.
        """
        model, T = self.config.model, self.config.data.seq_len
        a_token = model.flops_per_token(T)
        if not causal:
            a_token += 6 * model.n_layers * model.n_heads * model.head_dim * T
        return a_token * self.tokens / seconds / (self.pod.size * self.pod.chip.bf16_tflops * 1e12)

    @property
    def hfu(self) -> float:
        """The same share of all FLOPs that the hardware does, what is done twice included."""
        return self.flops / self.step / (self.pod.chip.bf16_tflops * 1e12)


def make(config: Config, pod: Pod, tell: Callable[[str], None]) -> Plan:
    """Compiles the step of a run three times, and returns what it tells.

    The whole program says how much memory it takes. Two of one and of two layers, unrolled, say
    what a layer and what the rest costs, because the compiler counts the body of a loop once.

    Args:
        tell: is told what is being done.

    Raises:
        InputError: the mesh does not divide the pod, the model or the batch.
    """
    mesh = make_mesh(config.mesh, pods.devices(pod))
    rows = config.data.batch_size // config.training.micro_batches
    check_divides(mesh, config.model, rows, config.data.seq_len)
    config = replace(config, mesh=MeshConfig(**dict(mesh.shape)))  # -1 is filled
    plan = Plan(config, pod)
    tell("compiling the whole step, for its memory and its schedule …")
    begun = time.monotonic()
    try:
        whole = compiler.compiled(config, mesh, pod.chip)
    except DoesNotFit as error:
        plan.refused, plan.memory = True, {"all": float(error.needed or math.inf)}
        return plan
    plan.memory = {
        "weights": whole.weights,
        "optimizer": whole.optimizer,
        "batch": whole.arguments - whole.weights - whole.optimizer,
        "activations": whole.kept,
        "temporaries": whole.peak - whole.arguments - whole.kept,
    }
    tell(f"compiled in {time.monotonic() - begun:.0f} s; now one layer and two, for their time …")
    depths = (compiler.of_depth(config, layers) for layers in (1, 2))
    try:
        # Not both at once: libtpu 0.0.42.1 then ends the process, in two of five such plans.
        one, two = (compiler.compiled(run, mesh, pod.chip) for run in depths)
    except DoesNotFit:
        tell("the whole step fits, layers out of their loop do not: memory alone is told")
        return plan
    plan.compile_seconds = time.monotonic() - begun
    layers, micro = config.model.n_layers, config.training.micro_batches

    def extrapolated(first: float, second: float) -> float:
        return micro * (first + (layers - 1) * (second - first))

    plan.compiler = extrapolated(one.seconds, two.seconds)
    plan.attention = attention_seconds(config, dict(mesh.shape), pod.chip)
    plan.flops = extrapolated(one.flops, two.flops)
    plan.flops += attention_flops(config, dict(mesh.shape))
    # Cycles and seconds are two models of the compiler's: the schedule is played at their ratio.
    hertz = sum(event.cycles for event in two.events) / two.seconds
    plan.traffic = traffic(whole.events, hertz, lambda collective: _seconds(collective, pod))
    return plan


def _seconds(collective: Collective, pod: Pod) -> float:
    return collective.bytes / (network_bandwidth(pod, collective.devices) * 1e9)


def network_bandwidth(pod: Pod, devices: int) -> float:
    """Returns how fast a chip sends within a group of `devices` [GB/s].

    A group spans the fewest dimensions of the network that hold it: both links of those that it
    fills and that are rings, and one of others, in which it is a line. One that is larger than a
    slice waits for the network between slices.
    """
    if devices > pod.size // pod.slices:
        return _BETWEEN_SLICES
    held, links = 1, 0
    for size, ring in sorted(zip(pod.shape, pod.rings, strict=True)):
        if held < devices and size > 1:
            links += 2 if ring and devices >= held * size else 1
            held *= size
    return pod.chip.ici_link_gb_per_s * max(1, links)


def attention_flops(config: Config, mesh: dict[str, int]) -> float:
    """Returns what the attention kernels of a step compute on one chip.

    They make two products forward and five backward, of which causality leaves half, and the
    forward ones again where `model.remat` keeps none of attention's results.
    """
    model, T = config.model, config.data.seq_len
    products = 9 if model.remat in _RECOMPUTES_ATTENTION else 7
    a_product = config.data.batch_size * T * T * model.n_heads * model.head_dim  # half of 2·T²
    return products * model.n_layers * a_product / math.prod(mesh.values())


def attention_seconds(config: Config, mesh: dict[str, int], chip: PlannableChip) -> float:
    """Returns the time of the attention kernels of a step, at `ATTENTION_EFFICIENCY` of the peak.

    Heads below 128 fill the matrix unit in part.
    """
    efficiency = ATTENTION_EFFICIENCY * min(1.0, config.model.head_dim / 128)
    return attention_flops(config, mesh) / (chip.bf16_tflops * 1e12 * efficiency)
