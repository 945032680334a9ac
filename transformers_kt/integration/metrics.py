"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from transformers_kt.integration.batching import Batcher, Request

OUTCOMES = ("answered", "cancelled", "failed", "refused")

# From a small model on a large machine to a prompt of 100,000 tokens on a small one.
_FIRST_TOKEN_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_TOKEN_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)

_SEQUENCES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class Metrics:
    """Counts over all models of a server, as an `Observer` of its batchers."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, batchers: Callable[[], list[Batcher]]) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)

        def named(kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
            return kind(f"transformers_kt_{name}", text, labels, registry=self._registry, **options)

        self._requests = named(Counter, "requests", "Requests that ended", "outcome")
        for outcome in OUTCOMES:
            self._requests.labels(outcome)
        self._prompt = named(Counter, "prompt_tokens", "Tokens of prompts, cached ones too")
        self._cached = named(Counter, "cached_tokens", "Tokens of prompts whose keys were kept from earlier requests")
        self._generated = named(Counter, "generated_tokens", "Tokens of answers")
        self._first = named(Histogram, "time_to_first_token_seconds", "From request to token", buckets=_FIRST_TOKEN_S)
        self._next = named(Histogram, "time_per_token_seconds", "From token to token", buckets=_TOKEN_S)
        self._together = named(Histogram, "sequences_per_pass", "Requests computed as one", buckets=_SEQUENCES)
        for name, text, value in (
            ("requests_running", "Requests being answered", lambda batcher: len(batcher.running)),
            ("requests_waiting", "Requests that wait for a place", lambda batcher: len(batcher.waiting)),
            ("kept_bytes", "Keys of finished requests", lambda batcher: batcher.kept.nbytes),
        ):
            gauge = named(Gauge, name, text)
            gauge.set_function(lambda value=value: sum(map(value, batchers())))

    def token(self, request: Request, seconds: float) -> None:
        if request.generated == 1:
            self._prompt.inc(len(request.ids))
            self._cached.inc(request.reused)
            self._first.observe(seconds)
        else:
            self._next.observe(seconds)
        self._generated.inc()

    def passed(self, sequences: int) -> None:
        self._together.observe(sequences)

    def ended(self, request: Request, outcome: str) -> None:
        self._requests.labels(outcome).inc()

    def text(self) -> bytes:
        """In the text format of Prometheus."""
        return generate_latest(self._registry)
