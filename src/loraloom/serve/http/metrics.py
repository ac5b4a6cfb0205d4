"""`/metrics`: what Prometheus reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from loraloom.generation.engine import Engine
from loraloom.generation.sequence import Row
from loraloom.routing.record import describe_router

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The numbers of an engine."""

    def __init__(self, engine: Engine):
        self.answers: Counter[tuple[str, int]] = Counter()
        """Answers of the server by path and status."""
        self.closed: Counter[str] = Counter()
        """Connections that the server closed, by reason."""
        self._registry = CollectorRegistry()
        self._registry.register(_Collector(engine, self))
        self._first_token = self._histogram(
            "loraloom_time_to_first_token_seconds", "From a request's arrival to its first token."
        )
        self._whole = self._histogram(
            "loraloom_request_seconds", "From a request's arrival to its end."
        )
        engine.on_end = self._observe

    def text(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ["model"], buckets=_SECONDS, registry=self._registry)

    def _observe(self, row: Row) -> None:
        self._whole.labels(row.owner).observe(row.seconds)
        if row.first_token_s is not None:
            self._first_token.labels(row.owner).observe(row.first_token_s - row.request.arrived_s)


class _Collector(Collector):
    """Reads counts when it is asked."""

    def __init__(self, engine: Engine, metrics: Metrics):
        self._engine = engine
        self._metrics = metrics

    def collect(self) -> Iterator[Any]:
        """Give all numbers."""
        engine, counts = self._engine, self._engine.counts
        for name, text, value in (
            ("requests_running", "Completions that are being made.", engine.num_running),
            ("requests_waiting", "Requests that wait.", engine.num_waiting),
            ("cache_tokens", "Size of the key-value cache.", engine.limits.cache_tokens),
            ("cache_tokens_used", "Tokens of it that rows use.", engine.cache_tokens_in_use),
            ("cache_tokens_kept", "Tokens of prompts kept for others.", engine.prefix_tokens),
        ):
            yield GaugeMetricFamily(f"loraloom_{name}", text, value)
        for name, text, value in (
            ("steps", "Steps of the engine.", counts.num_steps),
            ("preemptions", "Rows sent back to the queue for others.", counts.num_preempted),
        ):
            yield CounterMetricFamily(f"loraloom_{name}", text, value)
        for name, text, values in (
            ("prompt_tokens", "Tokens of prompts.", counts.prompt_tokens),
            ("prompt_tokens_cached", "Those known from prompts before.", counts.cached_tokens),
            ("generated_tokens", "Tokens that were chosen.", counts.generated_tokens),
        ):
            yield _counter(name, text, ["model"], _keyed(values))
        answers = {(path, str(code)): n for (path, code), n in self._metrics.answers.copy().items()}
        yield _counter("http_responses", "Answers.", ["path", "status"], answers)
        closed = _keyed(self._metrics.closed)
        yield _counter("closed_connections", "Closed on slow clients.", ["reason"], closed)
        yield _counter(
            "requests", "Requests that have ended.", ["model", "outcome"], dict(counts.requests)
        )
        yield _counter(
            "expert_tokens",
            "How often a mixture's experts were chosen, in one of 16 decoding steps.",
            ["model", "router", "expert"],
            {
                (model, describe_router(router), str(expert)): number
                for model, chosen in list(counts.expert_tokens.items())
                for (router, expert), number in list(chosen.items())
            },
        )


def _keyed(values: Mapping[str, int]) -> dict[Iterable[str], int]:
    return {(model,): number for model, number in list(values.items())}


def _counter(
    name: str, text: str, labels: list[str], values: Mapping[Any, int]
) -> CounterMetricFamily:
    family = CounterMetricFamily(f"loraloom_{name}", text, labels=labels)
    for key, number in values.items():
        family.add_metric(list(key), number)
    return family
