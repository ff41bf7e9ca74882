"""Traces in OpenTelemetry, only where OTEL_* asks for them.

Takes requests; gives spans to the exporter that OTEL_TRACES_EXPORTER names. It does not know
metrics or logs, and neither prompts nor answers are in a span. A client's `traceparent` becomes a
link, not the parent: a client does not decide what is sampled here.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points

from opentelemetry import trace
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

from cluster.errors import ConfigError
from serving.gateway.call import Call

_NAME = "raysmith.gateway"
_FIRST_SERVER_ERROR = 500


class RequestSpan:
    """The span of one request, or nothing where traces are off."""

    def __init__(self, span: Span | None) -> None:
        self._span = span

    def end(self, call: Call, status: int) -> None:
        """Write down how the request went."""
        if self._span is None:
            return
        self._span.update_name(call.route)
        self._span.set_attributes(_attributes(call, status))
        if call.first_token_s is not None:
            self._span.set_attribute("raysmith.first_token_s", call.first_token_s)
        if status >= _FIRST_SERVER_ERROR:
            self._span.set_status(Status(StatusCode.ERROR))


class Tracer:
    """Starts spans."""

    def __init__(self, tracer: trace.Tracer | None) -> None:
        self._tracer = tracer
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def span(self, scope: Scope, call: Call) -> Iterator[RequestSpan]:
        """Trace one request; what the engines are asked for carries the same request id."""
        if self._tracer is None:
            yield RequestSpan(None)
            return
        attributes = {
            "http.request.method": scope["method"],
            "raysmith.request_id": call.request_id,
        }
        with self._tracer.start_as_current_span(
            scope["method"], kind=SpanKind.SERVER, attributes=attributes, links=self._links(scope)
        ) as span:
            yield RequestSpan(span)

    def _links(self, scope: Scope) -> list[Link]:
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        context = self._propagator.extract(headers)
        remote = trace.get_current_span(context).get_span_context()
        return [Link(remote)] if remote.is_valid else []


def make_tracer(environment: Mapping[str, str] = os.environ) -> Tracer:
    """Return a tracer as OTEL_* says; without OTEL_TRACES_EXPORTER, one that does nothing.

    Raises ConfigError for an exporter that is not installed.
    """
    name = environment.get("OTEL_TRACES_EXPORTER", "none")
    if name == "none" or environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return Tracer(None)
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

    exporters = {e.name: e for e in entry_points(group="opentelemetry_traces_exporter")}
    if name not in exporters:
        known = ", ".join(f"`{known}`" for known in sorted(exporters))
        raise ConfigError(
            f"OTEL_TRACES_EXPORTER=`{name}` is not installed; there is: {known}. Install "
            "`opentelemetry-exporter-otlp` for `otlp`, or unset it."
        )
    exporter: SpanExporter = exporters[name].load()()
    provider = TracerProvider()  # Reads OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER and others.
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracer(provider.get_tracer(_NAME))


def _attributes(call: Call, status: int) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {
        "http.route": call.route,
        "http.response.status_code": status,
        "raysmith.team": call.team,
    }
    if call.model is not None:
        attributes |= {
            "gen_ai.request.model": call.model.reference,
            "gen_ai.usage.input_tokens": call.prompt_tokens,
            "gen_ai.usage.output_tokens": call.generated_tokens,
        }
    return attributes
