"""Plans a training run on a pod: memory, step time and MFU from the compiled training step."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from llama_jax.config.mesh import MeshConfig
from llama_jax.config.run import Config
from llama_jax.parallel.mesh import check_divides, make_mesh
from llama_jax.plan import topology, training_program
from llama_jax.plan.compiler import CompiledProgram, DoesNotFit
from llama_jax.plan.program_time import ATTENTION_EFFICIENCY
from llama_jax.plan.schedule import Collective, Traffic, simulate_traffic
from llama_jax.plan.topology import Pod, network_bandwidth
from llama_jax.plan.training_program import CompiledTrainStep
from llama_jax.runtime.chips import PlannableChip

_RECOMPUTES_ATTENTION = ("full", "offload")


@dataclass(kw_only=True)
class TrainingPlan:
    """Memory and time that a run needs. Bytes are of one device, seconds of one step.

    Attributes:
        memory: bytes by kind; {'all': math.inf} if the compiler rejects the program and reports no
            number.
        rejected: the compiler found no program that fits.
        compiler_seconds: the compiler's own estimate of a step, without attention and network;
            0 where the run does not fit.
        attention_seconds: time of the attention kernels, modelled by `attention_seconds`.
        traffic: cost of the collectives by kind.
        hardware_flops: FLOPs of one device in a step, attention and recomputation included.
        compile_seconds: time of all compilations.
    """

    config: Config
    pod: Pod
    memory: dict[str, float] = field(default_factory=dict)
    rejected: bool = False
    compiler_seconds: float = 0.0
    attention_seconds: float = 0.0
    traffic: dict[str, Traffic] = field(default_factory=dict)
    hardware_flops: float = 0.0
    compile_seconds: float = 0.0

    @property
    def needed_bytes(self) -> float:
        """Memory that a device needs."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """True if the compiler accepts the program and a device has the memory it needs.

        The TPU compiler reserves a little for itself, so it may reject a program that needs less.
        """
        return not self.rejected and self.needed_bytes <= self.capacity_bytes

    @property
    def capacity_bytes(self) -> float:
        """Memory of a device; of a GPU, what a program can have."""
        chip = self.pod.chip
        return (chip.usable_hbm_gib if chip.gpu else chip.hbm_gib) * 2**30

    @property
    def exposed_seconds(self) -> float:
        """Exposed communication: time in which collectives run and nothing computes."""
        return sum(kind.exposed for kind in self.traffic.values())

    @property
    def step_seconds(self) -> float:
        """Estimated time of a step: compute, attention and exposed communication."""
        return self.compiler_seconds + self.attention_seconds + self.exposed_seconds

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.config.data.batch_size * self.config.data.seq_len

    def tokens_per_second_per_chip(self, step_seconds: float) -> float:
        """Returns the rate of a chip, for a step of `step_seconds`."""
        return self.tokens_per_step / step_seconds / self.pod.n_chips

    def chip_hours(self, step_seconds: float) -> float:
        """Returns the cost of the complete run, for a step of `step_seconds`."""
        return step_seconds * self.config.training.steps * self.pod.n_chips / 3600

    def mfu(self, seconds: float, *, causal: bool = True) -> float:
        """Returns the model's FLOPs as a share of the peak, for a step of `seconds`.

        The causal count includes only the lower half of attention's scores; the full count, which
        some papers publish, includes all of them.
        """
        model, T = self.config.model, self.config.data.seq_len
        flops_per_token = self.config.flops_per_token
        if not causal:
            flops_per_token += 6 * model.n_layers * model.n_heads * model.head_dim * T
        peak = self.pod.n_devices * self.pod.chip.bf16_tflops * 1e12
        return flops_per_token * self.tokens_per_step / seconds / peak

    @property
    def hfu(self) -> float:
        """The hardware's FLOPs as a share of the peak; recomputation counts here."""
        return self.hardware_flops / self.step_seconds / (self.pod.chip.bf16_tflops * 1e12)


def plan_training(config: Config, pod: Pod, log: Callable[[str], None]) -> TrainingPlan:
    """Compiles the training step three times and returns the plan; for GPUs once, without times.

    The memory and the schedule come from the complete program. The compiler counts the body of a
    loop once, so the time comes from two programs with one and two unrolled layers: their
    difference is the time of a layer. XLA has no estimates of time for GPUs.

    Args:
        log: called with a line of progress before each compilation.

    Raises:
        InputError: the mesh does not divide the pod, the model or the batch; the compiler fails.
    """
    mesh = make_mesh(config.mesh, topology.devices(pod))
    rows = config.data.batch_size // config.training.micro_batches
    check_divides(mesh, config.model, rows, config.data.seq_len)
    config = replace(config, mesh=MeshConfig(**dict(mesh.shape)))  # replaces -1 by the real size
    plan = TrainingPlan(config=config, pod=pod)
    log("compiling the complete step, for its memory and its schedule …")
    start = time.monotonic()
    try:
        step = training_program.compile_train_step(config, mesh, pod.chip)
    except DoesNotFit as error:
        plan.rejected, plan.memory = True, {"all": float(error.needed_bytes or math.inf)}
        return plan
    plan.memory = _memory_by_kind(config, step)
    plan.compile_seconds = elapsed = time.monotonic() - start
    if pod.chip.gpu:
        return plan
    log(f"compiled in {elapsed:.0f} s; compiling one layer and two, for their time …")
    try:
        # One after the other: compiled in parallel, libtpu 0.0.42.1 aborts the process in two of
        # five such plans.
        one, two = (
            training_program.compile_train_step(
                training_program.config_of_depth(config, n_layers), mesh, pod.chip
            ).program
            for n_layers in (1, 2)
        )
    except DoesNotFit:
        log("the complete step fits, but unrolled layers do not: the plan has no estimate of time")
        return plan
    plan.compile_seconds = time.monotonic() - start
    estimate_step(plan, step.program, one, two, dict(mesh.shape))
    return plan


def _memory_by_kind(config: Config, step: CompiledTrainStep) -> dict[str, float]:
    """Returns the bytes of the step's arguments and temporaries by kind."""
    arguments, peak = step.program.argument_bytes, step.program.peak_bytes
    weights = {"frozen weights": step.frozen} if config.has_base else {}
    weights["low-rank pairs" if config.lora else "weights"] = step.weights
    return {
        **weights,
        "optimizer": step.optimizer,
        "batch": arguments - sum(weights.values()) - step.optimizer,
        "activations": step.saved_activations,
        "temporaries": peak - arguments - step.saved_activations,
    }


def estimate_step(
    plan: TrainingPlan,
    complete: CompiledProgram,
    one: CompiledProgram,
    two: CompiledProgram,
    mesh: dict[str, int],
) -> None:
    """Fills in times, FLOPs and traffic from the complete step and from one and two layers."""
    config, pod = plan.config, plan.pod
    n_layers, micro_batches = config.model.n_layers, config.training.micro_batches

    def extrapolate(first: float, second: float) -> float:
        return micro_batches * (first + (n_layers - 1) * (second - first))

    def seconds(collective: Collective) -> float:
        return collective.bytes / (network_bandwidth(pod, collective.devices) * 1e9)

    plan.compiler_seconds = extrapolate(one.seconds, two.seconds)
    plan.attention_seconds = attention_seconds(config, mesh, pod.chip)
    plan.hardware_flops = extrapolate(one.flops, two.flops) + attention_flops(config, mesh)
    # The compiler estimates cycles and seconds by two different models, so the simulation converts
    # cycles to seconds by their ratio and not by the chip's clock.
    hertz = sum(event.cycles for event in two.events) / two.seconds
    plan.traffic = simulate_traffic(complete.events, hertz, seconds)


def attention_flops(config: Config, mesh: dict[str, int]) -> float:
    """Returns the FLOPs of the attention kernels on one chip in a step.

    The kernels compute two products in the forward pass and five in the backward pass, half of each
    because of the causal mask. The two forward products run again where `model.remat` saves no
    result of attention, and once more for the reference of DPO.
    """
    model, T = config.model, config.data.seq_len
    products = 9 if model.remat in _RECOMPUTES_ATTENTION else 7
    products += 2 if config.training.objective == "dpo" else 0
    # A product takes 2·T² FLOPs per row, head and head dimension; the causal half is T².
    flops_per_product = config.data.batch_size * T * T * model.n_heads * model.head_dim
    return products * model.n_layers * flops_per_product / math.prod(mesh.values())


def attention_seconds(config: Config, mesh: dict[str, int], chip: PlannableChip) -> float:
    """Returns the time of the attention kernels in a step, at `ATTENTION_EFFICIENCY` of the peak.

    Heads smaller than 128 fill only a part of the matrix unit.
    """
    efficiency = ATTENTION_EFFICIENCY * min(1.0, config.model.head_dim / 128)
    return attention_flops(config, mesh) / (chip.bf16_tflops * 1e12 * efficiency)
