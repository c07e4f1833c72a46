"""What serving a model on a pod needs and reaches, from what the compiler says of its programs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax

from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError
from llama_jax.plan import serving_program as programs
from llama_jax.plan.compiler import DoesNotFit, Reading, on_a_device
from llama_jax.plan.schedule import Collective
from llama_jax.plan.topology import Pod
from llama_jax.plan.training import network_bandwidth

_HOP = 1e-6  # s: of a message between neighbours, before its bytes count
_DEPTHS = 2, 3
_COMPILATIONS = 6  # of whole programs at most, to find the largest batch


class Time(NamedTuple):
    """How long a program takes by several counts, in seconds of one chip.

    Attributes:
        memory: every byte of weights and cache is read once, at the memory's bandwidth.
        compute: all FLOPs are done at the peak.
        network: collectives, one after the other: bytes over the links, and hops.
        cycles: of all operations, as the compiler counts them, at the chip's clock.
        compiler: its cost model's sum over all operations, without network; it counts what stays
            in the chip's own fast memory as read from the large one.
    """

    memory: float
    compute: float
    network: float
    cycles: float
    compiler: float

    @property
    def roofline(self) -> float:
        """Seconds where memory, products and network never wait for each other."""
        return max(self.memory, self.compute, self.network)

    @property
    def estimate(self) -> float:
        """Seconds to expect: the compiler's cycles, or memory or compute where these are more.

        The network comes on top: as programs are compiled, sums are awaited where they are made.
        """
        return max(self.memory, self.compute, self.cycles) + self.network

    @property
    def bound(self) -> str:
        """Which of memory, compute and network the roofline is most of."""
        return max(("memory", "compute", "network"), key=lambda name: getattr(self, name))


class Weights(NamedTuple):
    """Bytes of a chip."""

    embedding: int
    layers: int
    head: int  # and the last norm; 0 where the embedding is the head


@dataclass
class InferencePlan:
    """What serving a model will need and reach. Bytes are of one chip, rows of one slice.

    Attributes:
        config: of the model, with a key/value head for each chip at least.
        parameters: of the model, copies of key/value heads not counted.
        decode_peak: all that decoding holds, at the asked batch; math.inf if the compiler refuses
            without a number.
        prefill_room: what reading one prompt holds beside the weights, its own cache included;
            None where the compiler finds no program that reads it in one piece and fits.
        largest_batch: of rows of `context` tokens; 0 where none fits. Compiled, and accepted.
        largest_peak: all that decoding holds then.
        row_slope: bytes that one more row takes.
        largest_context: of a batch of 1, by arithmetic: slots that decoding has memory for.
        decode: time of a step by batch; those that don't fit are left out.
    """

    config: ModelConfig
    parameters: int
    pod: Pod
    context: int
    batch: int
    weights: Weights
    cache_row: int
    decode_peak: float = math.inf
    prefill_room: int | None = None
    largest_batch: int = 0
    largest_peak: float = 0.0
    row_slope: float = 0.0
    largest_context: int = 0
    decode: dict[int, Time] = field(default_factory=dict)
    prefill: Time | None = None
    prefill_flops: float = 0.0

    @property
    def usable(self) -> float:
        """Bytes that the compiler gives a program."""
        return self.pod.chip.usable_hbm_gib * 2**30

    @property
    def cache(self) -> int:
        """Bytes of the asked batch's keys and values."""
        return self.batch * self.cache_row

    @property
    def decode_temporaries(self) -> float:
        """Bytes of decoding beside weights and cache."""
        return self.decode_peak - sum(self.weights) - self.cache

    @property
    def needed(self) -> float:
        """Bytes of decoding, or of reading a prompt beside the batch's cache: the larger."""
        beside = sum(self.weights) + self.cache + (self.prefill_room or 0)
        return max(self.decode_peak, beside)

    @property
    def fits(self) -> bool:
        """Tells whether the asked batch can be served."""
        return self.needed <= self.usable

    def tokens_per_second(self, batch: int) -> float:
        """Returns the tokens that all slices make in a second, with `batch` rows each."""
        return batch * self.pod.slices / self.decode[batch].estimate

    @property
    def prefill_mfu(self) -> float:
        """The share of the peak that the model's own FLOPs are, in reading one prompt."""
        assert self.prefill is not None
        chips = self.pod.size // self.pod.slices
        peak = chips * self.pod.chip.bf16_tflops * 1e12
        return self.prefill_flops / self.prefill.estimate / peak


def make(
    config: ModelConfig, pod: Pod, context: int, batch: int, tell: Callable[[str], None]
) -> InferencePlan:
    """Compiles the programs that serve a model, and returns what they tell.

    Args:
        config: of the model, in the types it is to be served in.
        context: slots of each row, for prompt and continuation [tokens].
        batch: rows of each slice.
        tell: is told what is being done.

    Raises:
        InputError: the context is not the model's, or the pod does not divide the model.
    """
    check(config, context, batch)
    mesh = programs.mesh_of(config, pod)
    wide = programs.over(config, mesh)
    plan = InferencePlan(wide, config.n_params, pod, context, batch, *sizes(wide, mesh, context))
    plan.prefill_flops = prefill_flops(config, context)
    tell("compiling two layers and three of the reading of a prompt …")
    prefill = _two_depths(
        wide, lambda shallow: programs.compile_prefill(shallow, pod, mesh, context)
    )
    if prefill is not None:
        rooms = [read.peak - read.arguments for read in prefill]
        plan.prefill_room = int(_extrapolated(rooms, wide.n_layers))
        plan.prefill = _time(plan, prefill, read=sum(plan.weights) + plan.cache_row)
    tell("compiling the whole loop over new tokens, for its memory …")
    peak = _Peaks(lambda rows: programs.compile_decode(wide, pod, mesh, rows, context), tell)
    plan.decode_peak = peak(batch)
    _find_largest(plan, peak)
    for rows in sorted(n for n in {1, batch, plan.largest_batch} if 0 < n <= plan.largest_batch):
        tell(f"compiling two layers and three of a step of {rows} row(s) …")

        def step(shallow: ModelConfig, rows: int = rows) -> Reading:
            return programs.compile_step(shallow, pod, mesh, rows, context)

        readings = _two_depths(wide, step)
        if readings is not None:
            plan.decode[rows] = _time(plan, readings, read=step_bytes(plan, rows))
    return plan


def check(config: ModelConfig, context: int, batch: int) -> None:
    """Refuses what no chip could serve.

    Raises:
        InputError: names what is out of range.
    """
    if not 1 <= context <= config.context:
        raise InputError(
            f"--context {context} is not in 1 … {config.context}, the model's own: take one that is"
        )
    if batch < 1:
        raise InputError(f"--batch must be at least 1, not {batch}")


def sizes(config: ModelConfig, mesh: jax.sharding.Mesh, context: int) -> tuple[Weights, int]:
    """Returns the bytes on a chip of a model's weights, and of one row's keys and values."""
    model = programs.weights(config, mesh)
    weights = Weights(
        on_a_device(model.tok_embeddings),
        on_a_device(model.layers),
        on_a_device((model.norm, model.output)),
    )
    return weights, on_a_device(programs.cache(config, mesh, 1, context).layers)


def step_bytes(plan: InferencePlan, batch: int) -> int:
    """Returns what a step of decoding reads of a chip's memory, all slots of the cache included.

    Of an embedding that is not the head too it reads one vector a row, which is nothing.
    """
    ends = plan.weights.head if not plan.config.tied_head else plan.weights.embedding
    return plan.weights.layers + ends + batch * plan.cache_row


def prefill_flops(config: ModelConfig, T: int) -> float:
    """Returns the model's own FLOPs of reading T tokens: the head once, attention's causal half."""
    D, V, N, H = config.shape("DVNH")
    ends = (1 if config.tied_head else 2) * V * D
    products = 2.0 * (config.n_params - ends) * T + 2.0 * V * D
    return products + 2.0 * config.n_layers * N * H * T * T


def batch_that_fits(room: float, peak: float, batch: int, slope: float) -> int:
    """Returns how many rows fit in `room` bytes where `batch` take `peak`, each more `slope`."""
    return max(0, batch + math.floor((room - peak) / slope))


class _Peaks:
    """The bytes that decoding takes at a batch: compiled once for each that is asked for."""

    def __init__(self, compile_: Callable[[int], Reading], tell: Callable[[str], None]):
        self._compile, self._tell = compile_, tell
        self.known: dict[int, float] = {}

    def __call__(self, batch: int) -> float:
        if batch not in self.known:
            self._tell(f"    batch {batch} …")
            try:
                self.known[batch] = float(self._compile(batch).peak)
            except DoesNotFit as error:
                self.known[batch] = float(error.needed or math.inf)
        return self.known[batch]


def _find_largest(plan: InferencePlan, peak: Callable[[int], float]) -> None:
    """Finds the largest batch and context, by arithmetic from what is compiled, and compiles it.

    Two batches say what a row takes; then the one that should be the largest is compiled, and where
    the compiler refuses it, the next that should.
    """
    plan.row_slope = float(plan.cache_row)
    if math.isinf(plan.decode_peak):
        return
    # Reading a prompt while all rows' caches are there takes room too.
    beside = plan.usable - sum(plan.weights) - (plan.prefill_room or 0)
    prompt_limit = max(0, math.floor(beside / plan.cache_row))

    def arithmetic(batch: int, at: float) -> int:
        by_decoding = batch_that_fits(plan.usable, at, batch, plan.row_slope)
        return max(1, min(by_decoding, prompt_limit))

    known, at = plan.batch, plan.decode_peak
    for _ in range(_COMPILATIONS if prompt_limit else 0):
        found = arithmetic(known, at)
        now = peak(found)
        if math.isinf(now):
            break
        if found != known:
            plan.row_slope = max(plan.cache_row, (now - at) / (found - known))
        known, at = found, now
        if at <= plan.usable and known > plan.largest_batch:
            plan.largest_batch, plan.largest_peak = known, at
        if arithmetic(known, at) == known:
            break
    if plan.largest_batch:
        fixed = plan.largest_peak - plan.largest_batch * plan.row_slope
        slot = plan.row_slope / plan.context
        plan.largest_context = math.floor((plan.usable - fixed) / slot)


def _two_depths(
    config: ModelConfig, compile_: Callable[[ModelConfig], Reading]
) -> list[Reading] | None:
    """Returns what the compiler says of two layers and of three; None where these don't fit.

    The first may take room that the second finds there, so one layer would say too little.
    """
    depths = [replace(config, n_layers=layers) for layers in _DEPTHS]
    try:
        return [compile_(shallow) for shallow in depths]
    except DoesNotFit:
        return None


def _extrapolated(figures: Sequence[float], layers: int) -> float:
    """Returns what all layers make, from what those of `_DEPTHS` do."""
    fewer, more = figures
    return fewer + (layers - _DEPTHS[0]) * (more - fewer)


def _time(plan: InferencePlan, readings: list[Reading], read: float) -> Time:
    chip, layers = plan.pod.chip, plan.config.n_layers

    def all_layers(figure: Callable[[Reading], float]) -> float:
        return _extrapolated([figure(reading) for reading in readings], layers)

    return Time(
        memory=read / (chip.hbm_gb_per_s * 1e9),
        compute=all_layers(lambda r: r.flops) / (chip.bf16_tflops * 1e12),
        network=all_layers(
            lambda r: sum(collective_seconds(e.starts, plan.pod) for e in r.events if e.starts)
        ),
        cycles=all_layers(lambda r: sum(e.cycles for e in r.events)) / (chip.clock_ghz * 1e9),
        compiler=all_layers(lambda r: r.seconds),
    )


def collective_seconds(collective: Collective, pod: Pod) -> float:
    """Returns how long a collective takes: its bytes over the links, and the hops of its messages.

    A sum goes to the farthest chip and comes back; what is only gathered or scattered goes once.
    """
    crossings = 2 if collective.kind == "all-reduce" else 1
    moved = collective.bytes / (network_bandwidth(pod, collective.devices) * 1e9)
    return moved + crossings * pod.hops * _HOP
