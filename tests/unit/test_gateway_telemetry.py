"""Logs without prompts, traces where they are asked for, and what replicas say of themselves."""

import json
import logging

import pytest
from gateway_fakes import KEY, FakeBackend, Gateway, hello
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from cluster.errors import ConfigError
from serving.engines._protocol import EngineStats
from serving.gateway.app import create_app
from serving.gateway.limits import GatewayLimits
from serving.gateway.logs import start_access_log
from serving.gateway.telemetry import Tracer, make_tracer
from serving.messages import ReplicaStats


def logged(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [json.loads(r.getMessage()) for r in caplog.records if r.name == "raysmith.access"]


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "raysmith.access")


def test_log_when_a_request_was_answered_says_who_and_how_much_but_not_what(caplog):
    gateway = Gateway(FakeBackend(*hello()))
    response = gateway.complete(prompt="a great secret", user="secret too")
    (line,) = logged(caplog)
    assert line["request_id"] == response.headers["x-request-id"]
    assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/completions", 200)
    assert (line["team"], line["key"], line["model"]) == ("alice", "k1", "tiny@3")
    assert (line["prompt_tokens"], line["generated_tokens"]) == (4, 2)
    assert line["first_token_ms"] <= line["duration_ms"]
    assert "secret" not in caplog.text
    assert KEY not in caplog.text
    assert "Hel" not in caplog.text


def test_log_when_prompts_are_wanted_has_them(caplog):
    Gateway(FakeBackend(*hello()), is_logging_prompts=True).complete(prompt="a great secret")
    assert "a great secret" in logged(caplog)[0]["prompt"]


def test_log_when_refused_names_the_code_and_not_the_value(caplog):
    Gateway().complete(model="a great secret")
    (line,) = logged(caplog)
    assert (line["status"], line["refused"]) == (404, "model_not_found")
    assert "secret" not in caplog.text


def test_log_when_started_writes_one_line_each_to_stderr(capsys):
    logger = logging.getLogger("raysmith.access")
    try:
        start_access_log()
        start_access_log()
        response = Gateway().complete()
    finally:
        logger.handlers.clear()
        logger.propagate = True
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["request_id"] == response.headers["x-request-id"]


def test_log_when_health_is_asked_for_is_silent(caplog):
    Gateway().call("GET", "/healthz")
    assert logged(caplog) == []


@pytest.mark.parametrize("environment", [{}, {"OTEL_TRACES_EXPORTER": "none"}])
def test_tracer_when_not_asked_for_does_nothing(environment):
    with make_tracer(environment).span({"method": "GET", "headers": []}, None) as span:
        span.end(None, 200)


def test_tracer_when_its_exporter_is_missing_is_refused():
    with pytest.raises(ConfigError, match="opentelemetry-exporter-otlp"):
        make_tracer({"OTEL_TRACES_EXPORTER": "nowhere"})
    disabled = {"OTEL_TRACES_EXPORTER": "nowhere", "OTEL_SDK_DISABLED": "true"}
    assert make_tracer(disabled)._tracer is None


def traced(gateway: Gateway) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = Tracer(provider.get_tracer("test"))
    gateway.app = create_app(gateway.backend, gateway.accounts, GatewayLimits(), tracer=tracer)
    return exporter


def test_trace_when_a_request_was_answered_has_its_tokens_and_no_text():
    gateway = Gateway(FakeBackend(*hello()))
    exporter = traced(gateway)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {"traceparent": parent}
    body = {"model": "tiny", "prompt": "a great secret"}
    response = gateway.call("POST", "/v1/completions", json=body, headers=headers)
    (span,) = exporter.get_finished_spans()
    assert span.name == "/v1/completions"
    assert span.attributes["raysmith.request_id"] == response.headers["x-request-id"]
    assert span.attributes["gen_ai.usage.output_tokens"] == 2
    assert span.parent is None
    assert f"{span.links[0].context.trace_id:032x}" in parent
    assert "secret" not in span.to_json()


def test_trace_when_the_server_failed_is_an_error():
    gateway = Gateway(FakeBackend([object()]))
    exporter = traced(gateway)
    assert gateway.complete().status_code == 500
    assert exporter.get_finished_spans()[0].status.status_code is StatusCode.ERROR


def test_metrics_when_replicas_reported_show_their_load():
    gateway = Gateway()
    stats = EngineStats(
        num_running=3,
        num_waiting=2,
        num_free_slots=0,
        prompt_tokens=10,
        generated_tokens=20,
        num_ticks=5,
        queue_age_s=1.5,
        tokens_in_flight=99,
        num_blocks=64,
        num_used_blocks=32,
        cached_prompt_tokens=7,
    )
    gateway.backend.replicas = [ReplicaStats("tiny", "3", "r1", stats)]
    page = gateway.call("GET", "/metrics").text
    labels = '{model="tiny",replica="r1",version="3"}'
    for name, value in {
        "running": 3,
        "waiting": 2,
        "queue_age_seconds": 1.5,
        "tokens_in_flight": 99,
        "cache_blocks": 64,
        "cache_blocks_used": 32,
        "prefix_hit_tokens_total": 7,
        "ticks_total": 5,
    }.items():
        assert f"raysmith_engine_{name}{labels} {float(value)}" in page


def test_metrics_when_clients_invent_paths_and_models_have_no_label_for_them():
    gateway = Gateway()
    for number in range(5):
        gateway.call("GET", f"/v1/nothing{number}")
        gateway.complete(model=f"model{number}")
    page = gateway.call("GET", "/metrics").text
    assert "nothing" not in page
    assert "model0" not in page
    assert 'route="other",status="404"} 5.0' in page
