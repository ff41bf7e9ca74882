"""The gateway's own numbers and its replicas', in Prometheus' text format.

Takes what happened; gives a page. It does not know how requests are answered. Labels have few
values: routes, models and teams that exist, never what a client made up.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.engines._protocol import EngineStats
from serving.gateway.call import Call
from serving.gateway.limits import Admission
from serving.messages import ReplicaStats

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_SERVED = ("model", "version", "team")
_REPLICA = ("model", "version", "replica")


@dataclass(frozen=True)
class TokenMeter:
    """Where one request's tokens are counted; found once, since there are many tokens."""

    first_token_s: Histogram
    between_tokens_s: Histogram


class GatewayMetrics:
    """Counters of one gateway process."""

    def __init__(
        self, admission: Admission, replicas: Callable[[], Sequence[ReplicaStats]]
    ) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "raysmith_requests", "Answered requests.", ("route", "status"), registry=registry
        )
        self._refusals = Counter(
            "raysmith_refusals",
            "Requests that were refused or cut short, by reason.",
            ("status", "reason", "team"),
            registry=registry,
        )
        self._duration_s = _histogram(
            registry, "raysmith_request_seconds", "To the end of an answer.", ("route",), _SECONDS
        )
        self._first_token_s = _histogram(
            registry, "raysmith_first_token_seconds", "To the first token.", _SERVED, _SECONDS
        )
        self._between_s = _histogram(
            registry, "raysmith_between_tokens_seconds", "A token.", _SERVED, _TOKEN_SECONDS
        )
        self._tokens = Counter(
            "raysmith_tokens",
            "Tokens read, of those from a cache, and generated.",
            (*_SERVED, "kind"),
            registry=registry,
        )
        accepted = Gauge("raysmith_accepted_choices", "Choices in work.", registry=registry)
        accepted.set_function(lambda: admission.num_accepted)
        limit = Gauge("raysmith_accepted_choices_limit", "Most choices.", registry=registry)
        limit.set(admission.limit)
        registry.register(_ReplicaCollector(replicas))

    def answered(self, call: Call, status: int, duration_s: float) -> None:
        """Count one request and its tokens."""
        self._requests.labels(call.route, str(status)).inc()
        self._duration_s.labels(call.route).observe(duration_s)
        if call.refused is not None:
            reason = call.refused.code or call.refused.status.phrase
            self._refusals.labels(str(int(call.refused.status)), reason, call.team).inc()
        if call.model is not None:
            served = (call.model.name, call.model.version, call.team)
            self._tokens.labels(*served, "prompt").inc(call.prompt_tokens)
            self._tokens.labels(*served, "cached").inc(call.cached_tokens)
            self._tokens.labels(*served, "generated").inc(call.generated_tokens)

    def meter(self, call: Call) -> TokenMeter:
        """Return where the tokens of this request are timed."""
        assert call.model is not None, "a request with tokens has a model"
        served = (call.model.name, call.model.version, call.team)
        return TokenMeter(self._first_token_s.labels(*served), self._between_s.labels(*served))

    def page(self) -> bytes:
        """Return all numbers as text."""
        return generate_latest(self._registry)


@dataclass(frozen=True)
class _Reading:
    name: str
    help: str
    value: Callable[[EngineStats], float]
    is_total: bool = False


_READINGS = (
    _Reading("running", "Sequences in the batch.", lambda s: s.num_running),
    _Reading("waiting", "Sequences in the queue.", lambda s: s.num_waiting),
    _Reading("queue_age_seconds", "How long the oldest has waited.", lambda s: s.queue_age_s),
    _Reading("tokens_in_flight", "Tokens still to be computed.", lambda s: s.tokens_in_flight),
    _Reading("cache_blocks", "Blocks of the cache.", lambda s: s.num_blocks),
    _Reading("cache_blocks_used", "Blocks that sequences hold.", lambda s: s.num_used_blocks),
    _Reading("ticks", "Batches computed.", lambda s: s.num_ticks, True),
    _Reading("prompt_tokens", "Prompt tokens taken in.", lambda s: s.prompt_tokens, True),
    _Reading("generated_tokens", "Tokens generated.", lambda s: s.generated_tokens, True),
    _Reading(
        "prefix_hit_tokens",
        "Prompt tokens read from shared blocks.",
        lambda s: s.cached_prompt_tokens,
        True,
    ),
    _Reading("preemptions", "Sequences put back for blocks.", lambda s: s.num_preemptions, True),
    _Reading("drafted_tokens", "Tokens guessed ahead.", lambda s: s.drafted_tokens, True),
    _Reading("accepted_tokens", "Guesses that were right.", lambda s: s.accepted_tokens, True),
)


class _ReplicaCollector(Collector):
    """Reads what replicas last said, when the page is asked for."""

    def __init__(self, replicas: Callable[[], Sequence[ReplicaStats]]) -> None:
        self._replicas = replicas

    def collect(self) -> Iterable[Metric]:
        """Yield one family a reading."""
        replicas = self._replicas()
        for reading in _READINGS:
            kind = CounterMetricFamily if reading.is_total else GaugeMetricFamily
            family = kind(f"raysmith_engine_{reading.name}", reading.help, labels=_REPLICA)
            for each in replicas:
                labels = (each.model, each.version, each.replica)
                family.add_metric(labels, reading.value(each.stats))
            yield family

    def describe(self) -> Iterable[Metric]:
        """Return nothing: replicas are not asked at the start."""
        return ()


def _histogram(
    registry: CollectorRegistry,
    name: str,
    text: str,
    labels: tuple[str, ...],
    buckets: tuple[float, ...],
) -> Histogram:
    return Histogram(name, f"Time, in seconds. {text}", labels, buckets=buckets, registry=registry)
