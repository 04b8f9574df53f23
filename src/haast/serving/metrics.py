"""Prometheus metrics of a server, under the names that vLLM and llama.cpp use, prefixed with `haast:`.

Owns the metric names. Each server has a registry of its own, so several can run in one process.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from haast.core import Request
from haast.stats import Stats

_FIRST_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5, 10, 20, 40, 80, 160)
_BETWEEN_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
_WHOLE_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)


class Metrics:
    """Metrics of one server.

    Args:
        model: its served name, the label `model_name` of every series.
        running, waiting: return the number of such requests now.
        cache_use: returns the share of the KV pool that is in use, 0 to 1.
    """

    def __init__(
        self, model: str, running: Callable[[], int], waiting: Callable[[], int], cache_use: Callable[[], float]
    ) -> None:
        self.registry, self._model = CollectorRegistry(), model
        self._drafts = self._counter("spec_decode_num_drafts", "Steps that had drafts to verify.")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Drafted tokens that were verified.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.")
        self._by_position = Counter(
            "haast:spec_decode_num_accepted_tokens_per_pos",
            "Accepted drafted tokens by depth in the tree; 0 is the first drafted level.",
            ["model_name", "position"],
            registry=self.registry,
        )
        self._prompt = self._counter("prompt_tokens", "Prompt tokens.")
        self._generated = self._counter("generation_tokens", "Generated tokens.")
        self._queried = self._counter("prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache.")
        self._cached = self._counter(
            "prefix_cache_hits", "Prompt tokens that were found in the prefix cache, and not computed."
        )
        self._ended = Counter(
            "haast:request_success",
            "Finished requests by finish reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.refused = Counter(
            "haast:request_refused", "Refused requests by HTTP status.", ["model_name", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "Seconds from a request's start to its first token.", _FIRST_BUCKETS
        )
        self._between = self._histogram("inter_token_latency_seconds", "Seconds between two tokens.", _BETWEEN_BUCKETS)
        self._whole = self._histogram(
            "e2e_request_latency_seconds", "Seconds from a request's start to its last token.", _WHOLE_BUCKETS
        )
        for name, description, value in (
            ("num_requests_running", "Requests in prefill or decode.", running),
            ("num_requests_waiting", "Requests that wait for a place in the batch.", waiting),
            ("kv_cache_usage_perc", "Share of the KV pool that running requests hold, 0 to 1.", cache_use),
        ):
            gauge = Gauge(f"haast:{name}", description, ["model_name"], registry=self.registry)
            gauge.labels(model).set_function(value)

    def between(self, seconds: float, tokens: int) -> None:
        """Record `tokens` that came in one emission, `seconds` after the last."""
        for _ in range(tokens):
            self._between.observe(seconds / tokens)

    def ended(self, request: Request, seconds: float) -> None:
        """Count a finished request, whatever its finish reason."""
        stats: Stats = request.stats
        self._drafts.inc(stats.reached_by_depth[0] if stats.reached_by_depth else 0)
        self._drafted.inc(max(stats.nodes - stats.target_forwards, 0))
        self._accepted.inc(sum(stats.accepted_by_depth))
        for depth, count in enumerate(stats.accepted_by_depth):
            self._by_position.labels(self._model, str(depth)).inc(count)
        self._prompt.inc(stats.prompt_tokens)
        self._queried.inc(stats.prompt_tokens)
        self._cached.inc(stats.recalled_tokens)
        self._generated.inc(stats.tokens)
        self._ended.labels(self._model, request.finish_reason or "abort").inc()
        self._whole.observe(seconds)

    def refuse(self, status: int) -> None:
        """Count a request that was answered with an error before it started."""
        self.refused.labels(self._model, str(status)).inc()

    def page(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, description: str) -> Counter:
        return Counter(f"haast:{name}", description, ["model_name"], registry=self.registry).labels(self._model)

    def _histogram(self, name: str, description: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"haast:{name}", description, ["model_name"], buckets=buckets, registry=self.registry)
        return histogram.labels(self._model)
