"""Plans the serving of a model on a pod: memory, largest batch and speed from compiled programs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import jax

from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError
from llama_jax.plan import serving_program as programs
from llama_jax.plan.compiler import CompiledProgram, DoesNotFit, bytes_per_device
from llama_jax.plan.program_time import DEPTHS, ProgramTime, estimate_time, extrapolate
from llama_jax.plan.topology import Pod

_MAX_COMPILATIONS = 6  # of the decode loop, to find the largest batch


class WeightBytes(NamedTuple):
    """Bytes of the weights on one chip.

    Attributes:
        embedding: token embeddings.
        layers: all layers.
        head: output matrix and final norm; only the norm where the head is tied to the embedding.
    """

    embedding: int
    layers: int
    head: int


@dataclass(kw_only=True)
class InferencePlan:
    """Memory and speed of serving a model. Bytes are of one chip, rows of one slice.

    Attributes:
        config: of the model.
        context: slots of a row [tokens].
        batch: requested rows.
        cache_bytes_per_row: KV cache of a row.
        decode_peak_bytes: peak memory of decoding at the requested batch; math.inf if the compiler
            rejects the program and reports no number.
        prefill_bytes: memory that the prefill of one prompt needs in addition to the weights, its
            own cache included; None if no program fits that prefills the prompt in one piece.
        largest_batch: largest number of rows of `context` tokens; 0 if none fits. It was compiled,
            and the compiler accepted it.
        largest_batch_bytes: peak memory of decoding at `largest_batch`.
        decode_bytes_per_row: peak memory that one more row adds.
        largest_context: slots that decoding has memory for at batch 1, by arithmetic.
        decode_times: time of a decode step by batch, for the batches that fit.
        prefill_time: time to prefill `context` tokens.
    """

    config: ModelConfig
    pod: Pod
    context: int
    batch: int
    weights: WeightBytes
    cache_bytes_per_row: int
    decode_peak_bytes: float = math.inf
    prefill_bytes: int | None = None
    largest_batch: int = 0
    largest_batch_bytes: float = 0.0
    decode_bytes_per_row: float = 0.0
    largest_context: int = 0
    decode_times: dict[int, ProgramTime] = field(default_factory=dict)
    prefill_time: ProgramTime | None = None

    @property
    def usable_bytes(self) -> float:
        """Memory that the compiler allows a program."""
        return self.pod.chip.usable_hbm_gib * 2**30

    @property
    def largest_cache_tokens(self) -> int:
        """Tokens of the KV cache at the largest batch: in pages, rows of any lengths share them."""
        return self.largest_batch * self.context

    @property
    def cache_bytes(self) -> int:
        """KV cache of the requested batch."""
        return self.batch * self.cache_bytes_per_row

    @property
    def decode_temporary_bytes(self) -> float:
        """Memory of decoding in addition to weights and cache."""
        return self.decode_peak_bytes - sum(self.weights) - self.cache_bytes

    @property
    def prefill_peak_bytes(self) -> float:
        """Memory while one prompt is prefilled and the cache of the requested batch is allocated.

        Only weights and cache where no program fits that prefills the prompt in one piece.
        """
        return sum(self.weights) + self.cache_bytes + (self.prefill_bytes or 0)

    @property
    def needed_bytes(self) -> float:
        """Memory of decoding or of prefill, whichever is larger: they alternate."""
        return max(self.decode_peak_bytes, self.prefill_peak_bytes)

    @property
    def fits(self) -> bool:
        """True if the requested batch can be served."""
        return self.needed_bytes <= self.usable_bytes

    def tokens_per_second(self, batch: int) -> float:
        """Returns the tokens that all slices generate in a second, with `batch` rows each."""
        return batch * self.pod.n_slices / self.decode_times[batch].estimate

    @property
    def prefill_mfu(self) -> float:
        """The model's FLOPs as a share of the peak, in the prefill of one prompt."""
        assert self.prefill_time is not None
        peak = self.pod.devices_per_slice * self.pod.chip.bf16_tflops * 1e12
        return prefill_flops(self.config, self.context) / self.prefill_time.estimate / peak


def plan_inference(
    config: ModelConfig, pod: Pod, context: int, batch: int, log: Callable[[str], None]
) -> InferencePlan:
    """Compiles the programs that serve a model and returns the plan.

    Args:
        config: of the model, in the dtypes in which it is served.
        context: slots of each row, for prompt and continuation [tokens].
        batch: rows of each slice.
        log: called with a line of progress before each compilation.

    Raises:
        InputError: the context is longer than the model's, the pod does not divide the model, or
            the compiler fails.
    """
    check_context_and_batch(config, context, batch)
    mesh = programs.slice_mesh(config, pod)
    weights, cache_bytes_per_row = weight_and_cache_bytes(config, mesh, context)
    plan = InferencePlan(
        config=config, pod=pod, context=context, batch=batch, weights=weights,
        cache_bytes_per_row=cache_bytes_per_row,
    )  # fmt: skip
    log("compiling the prefill of two layers and of three …")
    prefill = _compile_two_depths(
        config, lambda shallow: programs.compile_prefill(shallow, pod, mesh, context)
    )
    if prefill is not None:
        extra = [program.peak_bytes - program.argument_bytes for program in prefill]
        plan.prefill_bytes = int(extrapolate(extra, config.n_layers))
        if not pod.chip.gpu:
            bytes_read = sum(plan.weights) + plan.cache_bytes_per_row
            plan.prefill_time = estimate_time(prefill, config.n_layers, bytes_read, pod)
    log("compiling the complete decode loop, for its memory …")
    peak_bytes = _DecodePeaks(
        lambda rows: programs.compile_decode_loop(config, pod, mesh, rows, context), log
    )
    plan.decode_peak_bytes = peak_bytes(batch)
    _find_largest_batch(plan, peak_bytes)
    if pod.chip.gpu:  # the compiler has no estimates of time
        return plan
    for rows in sorted(n for n in {1, batch, plan.largest_batch} if 0 < n <= plan.largest_batch):
        log(f"compiling a decode step of {rows} row(s), with two layers and with three …")
        step = _compile_two_depths(
            config, partial(programs.compile_step, pod=pod, mesh=mesh, batch=rows,
                            slots=context),
        )  # fmt: skip
        if step is not None:
            bytes_read = decode_step_bytes(plan, rows)
            plan.decode_times[rows] = estimate_time(step, config.n_layers, bytes_read, pod)
    return plan


def check_context_and_batch(config: ModelConfig, context: int, batch: int) -> None:
    """Checks that the context is one of the model's, and the batch not empty.

    Raises:
        InputError: names the option that is out of range.
    """
    if not 1 <= context <= config.context:
        raise InputError(
            f"--context {context} is not in 1 … {config.context}, the model's own: take one that is"
        )
    if batch < 1:
        raise InputError(f"--batch must be at least 1, not {batch}")


def weight_and_cache_bytes(
    config: ModelConfig, mesh: jax.sharding.Mesh, context: int
) -> tuple[WeightBytes, int]:
    """Returns the bytes on one chip of a model's weights, and of the KV cache of one row."""
    model = programs.abstract_weights(config, mesh)
    weights = WeightBytes(
        embedding=bytes_per_device(model.tok_embeddings),
        layers=bytes_per_device(model.layers),
        head=bytes_per_device((model.norm, model.output)),
    )
    return weights, bytes_per_device(programs.abstract_row_cache(config, mesh, context).layers)


def decode_step_bytes(plan: InferencePlan, batch: int) -> int:
    """Returns the bytes that a decode step reads on one chip, all slots of the cache included.

    The embedding counts only where it is the head too: the lookup reads one vector per row, which
    is negligible.
    """
    head = plan.weights.head if not plan.config.tied_head else plan.weights.embedding
    return plan.weights.layers + head + batch * plan.cache_bytes_per_row


def prefill_flops(config: ModelConfig, T: int) -> float:
    """Returns the model's FLOPs for T prompt tokens: the head once, attention's causal half."""
    D, V, N, H = config.shape("DVNH")
    embedding_and_head = (1 if config.tied_head else 2) * V * D
    products = 2.0 * (config.n_params - embedding_and_head) * T + 2.0 * V * D
    return products + 2.0 * config.n_layers * N * H * T * T


def largest_batch_within(
    capacity: float, peak_bytes: float, batch: int, bytes_per_row: float
) -> int:
    """Returns the number of rows that fit in `capacity` bytes, where `batch` take `peak_bytes`."""
    return max(0, batch + math.floor((capacity - peak_bytes) / bytes_per_row))


class _DecodePeaks:
    """Peak bytes of decoding by batch. Compiles each batch once."""

    def __init__(self, compile_: Callable[[int], CompiledProgram], log: Callable[[str], None]):
        self._compile, self._log = compile_, log
        self._peaks: dict[int, float] = {}

    def __call__(self, batch: int) -> float:
        if batch not in self._peaks:
            self._log(f"    batch {batch} …")
            try:
                self._peaks[batch] = float(self._compile(batch).peak_bytes)
            except DoesNotFit as error:
                self._peaks[batch] = float(error.needed_bytes or math.inf)
        return self._peaks[batch]


def _find_largest_batch(plan: InferencePlan, peak_bytes: Callable[[int], float]) -> None:
    """Fills in the largest batch, its memory, and the largest context.

    Two compiled batches give the memory of a row. The batch that is the largest by arithmetic is
    compiled next; its peak corrects the arithmetic, until arithmetic and compiler agree.
    """
    plan.decode_bytes_per_row = float(plan.cache_bytes_per_row)
    if math.isinf(plan.decode_peak_bytes):
        return
    # The prefill of a prompt needs memory while the caches of all rows are allocated.
    cache_capacity = plan.usable_bytes - sum(plan.weights) - (plan.prefill_bytes or 0)
    prefill_limit = max(0, math.floor(cache_capacity / plan.cache_bytes_per_row))

    def next_largest(batch: int, peak: float) -> int:
        decode_limit = largest_batch_within(
            plan.usable_bytes, peak, batch, plan.decode_bytes_per_row
        )
        return max(1, min(decode_limit, prefill_limit))

    batch, peak = plan.batch, plan.decode_peak_bytes
    for _ in range(_MAX_COMPILATIONS if prefill_limit else 0):
        next_batch = next_largest(batch, peak)
        next_peak = peak_bytes(next_batch)
        if math.isinf(next_peak):
            break
        if next_batch != batch:
            slope = (next_peak - peak) / (next_batch - batch)
            plan.decode_bytes_per_row = max(plan.cache_bytes_per_row, slope)
        batch, peak = next_batch, next_peak
        if peak <= plan.usable_bytes and batch > plan.largest_batch:
            plan.largest_batch, plan.largest_batch_bytes = batch, peak
        if next_largest(batch, peak) == batch:
            break
    if plan.largest_batch:
        fixed = plan.largest_batch_bytes - plan.largest_batch * plan.decode_bytes_per_row
        bytes_per_slot = plan.decode_bytes_per_row / plan.context
        plan.largest_context = math.floor((plan.usable_bytes - fixed) / bytes_per_slot)


def _compile_two_depths(
    config: ModelConfig, compile_: Callable[[ModelConfig], CompiledProgram]
) -> list[CompiledProgram] | None:
    """Returns the program with two layers and the one with three; None where these don't fit.

    One layer and two would not do: the second layer may reuse memory that the first allocated, so
    one layer underestimates the memory of each further layer.
    """
    try:
        return [compile_(replace(config, n_layers=n_layers)) for n_layers in DEPTHS]
    except DoesNotFit:
        return None
