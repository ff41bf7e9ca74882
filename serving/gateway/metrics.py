"""The gateway's own numbers, in Prometheus' text format.

Takes what happened; gives a page. It does not know how requests are answered. Labels have few
values: routes and models that exist, never what a client made up.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.gateway.limits import Admission

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class GatewayMetrics:
    """Counters of one gateway process."""

    def __init__(self, admission: Admission) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "raysmith_requests", "Answered requests.", ("route", "status"), registry=registry
        )
        self._duration_s = Histogram(
            "raysmith_request_seconds",
            "Time from a request to the end of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._first_token_s = Histogram(
            "raysmith_first_token_seconds",
            "Time from a request to its first token.",
            ("model",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._tokens = Counter(
            "raysmith_tokens", "Tokens read and generated.", ("model", "kind"), registry=registry
        )
        accepted = Gauge("raysmith_accepted_choices", "Choices in work.", registry=registry)
        accepted.set_function(lambda: admission.num_accepted)
        limit = Gauge("raysmith_accepted_choices_limit", "Most choices.", registry=registry)
        limit.set(admission.limit)

    def answered(self, route: str, status: int, duration_s: float) -> None:
        """Count one request."""
        self._requests.labels(route, str(status)).inc()
        self._duration_s.labels(route).observe(duration_s)

    def first_token(self, model: str, after_s: float) -> None:
        """Note when the first token of a request came."""
        self._first_token_s.labels(model).observe(after_s)

    def tokens(self, model: str, *, prompt: int = 0, generated: int = 0) -> None:
        """Count tokens."""
        self._tokens.labels(model, "prompt").inc(prompt)
        self._tokens.labels(model, "generated").inc(generated)

    def page(self) -> bytes:
        """Return all numbers as text."""
        return generate_latest(self._registry)
