"""What dashboards read: counters and times, under the names that vLLM and llama.cpp use, with `haast:` before them.

Owns the names. Each server has a registry of its own, so that several may live in one process.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from haast.core import Request
from haast.stats import Stats

_FIRST = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5, 10, 20, 40, 80, 160)
_BETWEEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)


class Metrics:
    """Counters of one server.

    Args:
        model: its served name, a label of every series.
        running, waiting: how many requests do so now.
        cache_use: share of the KV pool that is in use.
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
            "Accepted drafts by their depth in the tree, 0 the first.",
            ["model_name", "position"],
            registry=self.registry,
        )
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._generated = self._counter("generation_tokens", "New tokens.")
        self._queried = self._counter("prefix_cache_queries", "Tokens of prompts that were looked for in the cache.")
        self._hit = self._counter("prefix_cache_hits", "Tokens of prompts that were found there, and not computed.")
        self._ended = Counter(
            "haast:request_success",
            "Requests by how they ended.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.refused = Counter(
            "haast:request_refused", "Requests by the status that refused them.", ["model_name", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.first_token = self._histogram("time_to_first_token_seconds", "From a request to its first token.", _FIRST)
        self._between = self._histogram("inter_token_latency_seconds", "From token to token.", _BETWEEN)
        self._whole = self._histogram("e2e_request_latency_seconds", "From a request to its last token.", _WHOLE)
        for name, words, value in (
            ("num_requests_running", "Requests that are prefilled or decode.", running),
            ("num_requests_waiting", "Requests that wait for room.", waiting),
            ("kv_cache_usage_perc", "Share of the KV pool that running requests hold, 0 to 1.", cache_use),
        ):
            gauge = Gauge(f"haast:{name}", words, ["model_name"], registry=self.registry)
            gauge.labels(model).set_function(value)

    def between(self, seconds: float, tokens: int) -> None:
        """So many tokens came together, after so long."""
        for _ in range(tokens):
            self._between.observe(seconds / tokens)

    def ended(self, request: Request, seconds: float) -> None:
        """A request has no more to say, for whatever reason."""
        stats: Stats = request.stats
        self._drafts.inc(stats.reached_by_depth[0] if stats.reached_by_depth else 0)
        self._drafted.inc(max(stats.nodes - stats.target_forwards, 0))
        self._accepted.inc(sum(stats.accepted_by_depth))
        for depth, count in enumerate(stats.accepted_by_depth):
            self._by_position.labels(self._model, str(depth)).inc(count)
        self._prompt.inc(stats.prompt_tokens)
        self._queried.inc(stats.prompt_tokens)
        self._hit.inc(stats.recalled_tokens)
        self._generated.inc(stats.tokens)
        self._ended.labels(self._model, request.finish_reason or "abort").inc()
        self._whole.observe(seconds)

    def refuse(self, status: int) -> None:
        """A request was answered with an error before it began."""
        self.refused.labels(self._model, str(status)).inc()

    def page(self) -> bytes:
        """All of it in Prometheus' text form."""
        return generate_latest(self.registry)

    def _counter(self, name: str, words: str) -> Counter:
        return Counter(f"haast:{name}", words, ["model_name"], registry=self.registry).labels(self._model)

    def _histogram(self, name: str, words: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(f"haast:{name}", words, ["model_name"], buckets=buckets, registry=self.registry)
        return made.labels(self._model)
