"""What the server counts, in the format of Prometheus."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from llama_jax.inference.engine.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 600)

# Of the engine's statistics: those that may fall are gauges.
_GAUGES = {
    "waiting": "Requests in the queue.",
    "running": "Requests in the batch.",
}
_COUNTERS = {
    "finished": "Requests that came to their end.",
    "cancelled": "Requests that were cancelled.",
    "prompt_tokens": "Tokens of prompts.",
    "made_tokens": "Tokens made.",
    "reused_tokens": "Tokens of prompts whose keys and values were there already.",
    "prefill_seconds": "Time spent on prompts.",
    "decode_seconds": "Time spent on making tokens.",
    "decode_steps": "Steps of decoding, each a token of every running request.",
    "bytes_read": "Bytes of weights and cache that decoding read.",
    "compile_seconds": "Time spent on compiling.",
}


class _EngineCollector(Collector):
    def __init__(self, engine: Engine, copy_bandwidth: float | None):
        self._engine, self._copy_bandwidth = engine, copy_bandwidth

    def collect(self) -> Iterator[Any]:
        statistics = self._engine.statistics()
        for name, about in _GAUGES.items():
            yield GaugeMetricFamily(f"llama_jax_{name}", about, getattr(statistics, name))
        for name, about in _COUNTERS.items():
            yield CounterMetricFamily(f"llama_jax_{name}", about, getattr(statistics, name))
        if self._copy_bandwidth is not None:
            about = "What the machine copies, read and written, measured at the start."
            name = "llama_jax_copy_bandwidth_bytes_per_second"
            yield GaugeMetricFamily(name, about, self._copy_bandwidth)
            about = "Share of it that decoding has read, since the start."
            reached = statistics.bytes_read / max(statistics.decode_seconds, 1e-9)
            share = reached / self._copy_bandwidth
            yield GaugeMetricFamily("llama_jax_bandwidth_share", about, share)


class Metrics:
    """Counts of HTTP requests, and the engine's.

    Args:
        engine: whose statistics are told.
        copy_bandwidth: of the machine [bytes/s]; None: it is not told.
    """

    def __init__(self, engine: Engine, copy_bandwidth: float | None = None):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine, copy_bandwidth))
        self._requests = Counter(
            "llama_jax_http_requests", "HTTP requests answered.", ["route", "status"],
            registry=self._registry,
        )  # fmt: skip
        self._duration = Histogram(
            "llama_jax_http_request_duration_seconds", "Time until the answer is whole.", ["route"],
            registry=self._registry, buckets=_SECONDS,
        )  # fmt: skip
        self._first_token = Histogram(
            "llama_jax_time_to_first_token_seconds", "Time until the first token.", ["route"],
            registry=self._registry, buckets=_SECONDS,
        )  # fmt: skip

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Counts an answered request."""
        self._requests.labels(route, str(status)).inc()
        self._duration.labels(route).observe(seconds)

    def first_token(self, route: str, seconds: float) -> None:
        """Counts the time to the first token of a request."""
        self._first_token.labels(route).observe(seconds)

    def text(self) -> bytes:
        """Returns all counts in Prometheus' text format."""
        return generate_latest(self._registry)
