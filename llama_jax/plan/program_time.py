"""Estimates the time of a serving program: roofline, the compiler's cycles, and network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llama_jax.plan.compiler import CompiledProgram
from llama_jax.plan.schedule import Collective, KernelWork
from llama_jax.plan.topology import Pod, network_bandwidth

DEPTHS = 2, 3  # layers of the programs from which the figures of all layers are extrapolated
# The share of the peak that attention kernels reach with heads of 128: published measurements of
# splash attention lie between 40 and 60 %.
ATTENTION_EFFICIENCY = 0.5
_HOP_SECONDS = 1e-6  # latency of a message between neighbouring chips


@dataclass(frozen=True, kw_only=True)
class ProgramTime:
    """Time of a program on one chip, estimated in several ways [s].

    Attributes:
        memory: reads every byte of weights and cache once, at the memory bandwidth.
        compute: all FLOPs at the peak.
        network: all collectives one after the other: bytes over the links, plus latency of hops.
        cycles: the compiler's cycle count of all operations, at the chip's clock; of Pallas
            kernels, which it doesn't count, the longer of two times: the bytes that they access at
            the memory bandwidth, and their FLOPs at `ATTENTION_EFFICIENCY` of the peak.
        compiler: sum of the compiler's cost model over all operations, without network. It charges
            reads from the on-chip memory (VMEM) as if they came from HBM.
    """

    memory: float
    compute: float
    network: float
    cycles: float
    compiler: float

    @property
    def roofline(self) -> float:
        """Lower bound: memory, compute and network overlap perfectly."""
        return max(self.memory, self.compute, self.network)

    @property
    def estimate(self) -> float:
        """Expected time: the longest of memory, compute and cycles, plus the network.

        The network is added because the compiled programs wait for each all-reduce right where
        it starts.
        """
        return max(self.memory, self.compute, self.cycles) + self.network

    @property
    def bound(self) -> str:
        """The largest part of the roofline: 'memory', 'compute' or 'network'."""
        return max(("memory", "compute", "network"), key=lambda name: getattr(self, name))


def estimate_time(
    programs: Sequence[CompiledProgram], n_layers: int, bytes_read: float, pod: Pod
) -> ProgramTime:
    """Returns the time of a program with `n_layers` layers.

    Args:
        programs: the same program with each of `DEPTHS` layers.
        bytes_read: weights and cache that the program reads on one chip.
    """
    chip = pod.chip

    def all_layers(figure: Callable[[CompiledProgram], float]) -> float:
        return extrapolate([figure(program) for program in programs], n_layers)

    def kernel_seconds(kernel: KernelWork) -> float:
        compute = kernel.flops / (ATTENTION_EFFICIENCY * chip.bf16_tflops * 1e12)
        return max(compute, kernel.bytes / (chip.hbm_gb_per_s * 1e9))

    def network_seconds(program: CompiledProgram) -> float:
        return sum(collective_seconds(e.starts, pod) for e in program.events if e.starts)

    def operation_seconds(program: CompiledProgram) -> float:
        cycles = sum(event.cycles for event in program.events)
        kernels = (kernel_seconds(event.kernel) for event in program.events if event.kernel)
        return cycles / (chip.clock_ghz * 1e9) + sum(kernels)

    return ProgramTime(
        memory=bytes_read / (chip.hbm_gb_per_s * 1e9),
        compute=all_layers(lambda program: program.flops) / (chip.bf16_tflops * 1e12),
        network=all_layers(network_seconds),
        cycles=all_layers(operation_seconds),
        compiler=all_layers(lambda program: program.seconds),
    )


def extrapolate(figures: Sequence[float], n_layers: int) -> float:
    """Returns the figure of `n_layers` layers from the figures of `DEPTHS`, linearly."""
    fewer, more = figures
    return fewer + (n_layers - DEPTHS[0]) * (more - fewer)


def collective_seconds(collective: Collective, pod: Pod) -> float:
    """Returns the time of a collective: its bytes over the links, plus the latency of its hops.

    An all-reduce crosses the slice twice, to the farthest chip and back; other collectives once.
    The chips of a smaller group are assumed to be neighbors, as on the meshes that JAX constructs.
    """
    crossings = 2 if collective.kind == "all-reduce" else 1
    hops = min(pod.hops, collective.devices - 1)
    transfer = collective.bytes / (network_bandwidth(pod, collective.devices) * 1e9)
    return transfer + crossings * hops * _HOP_SECONDS
