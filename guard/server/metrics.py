"""What the server counts, for Prometheus. Each application has its own registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from guard.server.pool import BatchRecord
from guard.types import Verdict

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters and histograms, all named safe_rlhf_v_guard_*."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        prefix: str = "safe_rlhf_v_guard_"
        shared: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(prefix + "requests", "Requests by route and status.", ("route", "status"), **shared)
        self.verdicts = Counter(prefix + "verdicts", "Verdicts by kind and action.", ("kind", "action"), **shared)
        self.categories = Counter(prefix + "flagged", "Flagged, by likeliest category.", ("category",), **shared)
        self.degraded = Counter(prefix + "degraded", "Not judged: failed closed or open.", ("kind",), **shared)
        self.failed_open = Counter(prefix + "failed_open", "Not judged and let pass, as configured.", **shared)
        self.cache_hits = Counter(prefix + "verdict_cache_hits", "Verdicts found in the cache.", **shared)
        self.rounds = Histogram(
            prefix + "rounds", "New attempts of an answer.", buckets=(0, 1, 2, 3, 4, 5, 10, 20), **shared
        )
        self.outcomes = Counter(prefix + "answers", "Choices of guarded answers by outcome.", ("outcome",), **shared)
        self.batch_size = Histogram(
            prefix + "batch_size", "Items a batch.", buckets=(1, 2, 4, 8, 16, 32, 64, 128), **shared
        )
        self.seconds = {
            part: Histogram(f"{prefix}{part}_seconds", text, buckets=_SECONDS, **shared)
            for part, text in {
                "queue": "Of an item, before its batch.",
                "encoding": "Of a batch: pictures decoded, text tokenised.",
                "forward": "Of a batch, in the model.",
                "request": "Of a whole request.",
            }.items()
        }
        self._gauges = {
            name: Gauge(prefix + name, text, **shared)
            for name, text in {
                "queue_length": "Items waiting.",
                "workers_ready": "Workers that can take a batch.",
                "worker_restarts": "Workers started anew.",
                "ready": "1 when ready.",
            }.items()
        }

    def watch(self, name: str, read: Callable[[], float]) -> None:
        """A figure that is read when asked for: queue_length, workers_ready, worker_restarts or ready."""
        self._gauges[name].set_function(read)

    def batch(self, record: BatchRecord) -> None:
        self.batch_size.observe(record.size)
        for waited in record.waited:
            self.seconds["queue"].observe(waited)
        for part in ("encoding", "forward"):
            if part in record.figures:
                self.seconds[part].observe(record.figures[part])

    def verdict(self, verdict: Verdict) -> None:
        self.verdicts.labels(verdict.kind, verdict.action).inc()
        if verdict.degraded:
            self.degraded.labels(verdict.kind).inc()
        if verdict.failed_open:
            self.failed_open.inc()
        if verdict.flagged and verdict.top_category:
            self.categories.labels(verdict.top_category).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
