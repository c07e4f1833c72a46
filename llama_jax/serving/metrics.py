"""The server's metrics, in Prometheus' text format."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from llama_jax.inference.engine.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 600)  # [s]

# Documentation of the engine's statistics. Gauges may decrease, counters never do.
_GAUGES = {
    "waiting": "Requests in the queue.",
    "running": "Requests in the batch.",
}
_COUNTERS = {
    "finished": "Requests that finished.",
    "cancelled": "Requests that were cancelled.",
    "prompt_tokens": "Prompt tokens that were prefilled.",
    "generated_tokens": "Generated tokens.",
    "reused_tokens": "Prompt tokens whose keys and values were already in the KV cache.",
    "prefill_seconds": "Time spent on prefill.",
    "decode_seconds": "Time spent on decoding.",
    "decode_steps": "Decode steps; each generates one token of every running request.",
    "bytes_read": "Bytes of weights and KV cache that decoding has read.",
    "compile_seconds": "Time spent on compilation.",
}


class _EngineCollector(Collector):
    def __init__(self, engine: Engine, copy_bandwidth: float | None):
        self._engine, self._copy_bandwidth = engine, copy_bandwidth

    def collect(self) -> Iterator[Any]:
        statistics = self._engine.statistics()
        for name, documentation in _GAUGES.items():
            value = getattr(statistics, name)
            yield GaugeMetricFamily(f"llama_jax_{name}", documentation, value)
        for name, documentation in _COUNTERS.items():
            value = getattr(statistics, name)
            yield CounterMetricFamily(f"llama_jax_{name}", documentation, value)
        if self._copy_bandwidth is not None:
            yield GaugeMetricFamily(
                "llama_jax_copy_bandwidth_bytes_per_second",
                "Bandwidth of a memory copy, bytes read plus bytes written, measured at the start.",
                self._copy_bandwidth,
            )
            bandwidth = statistics.bytes_read / max(statistics.decode_seconds, 1e-9)
            yield GaugeMetricFamily(
                "llama_jax_bandwidth_share",
                "Bandwidth of decoding since the start, as a share of the copy bandwidth.",
                bandwidth / self._copy_bandwidth,
            )


class Metrics:
    """Counts HTTP requests, and exports the engine's statistics.

    Args:
        engine: source of the statistics.
        copy_bandwidth: of the machine [bytes/s]; None: don't export it.
    """

    def __init__(self, engine: Engine, copy_bandwidth: float | None = None):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine, copy_bandwidth))
        self._requests = Counter(
            "llama_jax_http_requests", "HTTP requests answered.", ["route", "status"],
            registry=self._registry,
        )  # fmt: skip
        self._duration = Histogram(
            "llama_jax_http_request_duration_seconds",
            "Time from the request to the end of the response.",
            ["route"],
            registry=self._registry,
            buckets=_BUCKETS,
        )
        self._first_token = Histogram(
            "llama_jax_time_to_first_token_seconds",
            "Time from the request to the first token.",
            ["route"],
            registry=self._registry,
            buckets=_BUCKETS,
        )

    def count_response(self, route: str, status: int, seconds: float) -> None:
        """Counts a response, and the time from the request to its end."""
        self._requests.labels(route, str(status)).inc()
        self._duration.labels(route).observe(seconds)

    def observe_first_token(self, route: str, seconds: float) -> None:
        """Counts the time from a request to its first token."""
        self._first_token.labels(route).observe(seconds)

    def render(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
