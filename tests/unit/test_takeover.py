"""Whether a version may take over a name: a real model and ledger, and a server that may lie."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from serving_service import publish

from cluster.accounting import ROLLOUT_TEAM
from cluster.errors import GateRefusedError
from cluster.ledger import Ledger
from cluster.storage import staged_directory
from jobs.evaluation.parity import offline_answers
from jobs.registry import Entry, Registry
from jobs.takeover import MAX_TOKENS, PROMPTS, check_takeover

ROUTE = {"context_tokens": 512}


@dataclass
class Server:
    """Answers prompts from a table; what is not there with 404."""

    port: int = 0
    answers: dict[str, str] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.asked.append(body)
            text = state.answers.get(body["prompt"])
            self.send_response(404 if text is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"text": text}]}).encode())

        def log_message(self, *_: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.port = listening.server_address[1]
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    yield state
    listening.shutdown()
    listening.server_close()
    thread.join(5)


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Entry:
    folder = tmp_path_factory.mktemp("takeover")
    return Registry(folder / "registry").resolve(publish(folder, seed=3))


@pytest.fixture
def gateway(tmp_path: Path, server: Server) -> dict[str, Any]:
    return {"port": server.port, "host": "0.0.0.0", "ledger": str(tmp_path / "ledger.db")}


def test_check_when_too_few_answers_agree_refuses_and_shows_one(
    entry: Entry, server: Server, gateway: dict[str, Any]
) -> None:
    offline = offline_answers(entry.path, PROMPTS, max_tokens=MAX_TOKENS)
    server.answers = dict(zip(PROMPTS, offline, strict=True))
    check_takeover(entry, gateway, ROUTE, 1.0)
    server.answers |= dict.fromkeys(PROMPTS[:3], "something else")
    check_takeover(entry, gateway, ROUTE, 0.8)
    with pytest.raises(GateRefusedError, match=r"13 of 16.*90%.*'something else' instead of"):
        check_takeover(entry, gateway, ROUTE, 0.9)
    assert {body["model"] for body in server.asked} == {"tiny@1"}
    with Ledger.open(gateway["ledger"]) as ledger:
        keys = list(ledger.snapshot().keys.values())
    assert [key.team for key in keys] == [ROLLOUT_TEAM] * 3
    assert all(key.revoked_s is not None for key in keys)


def test_check_when_a_prompt_is_refused_says_which_ledger_the_key_is_in(
    entry: Entry, gateway: dict[str, Any]
) -> None:
    with pytest.raises(GateRefusedError, match=r"answered 404.*ledger\.db.*--min-parity 0"):
        check_takeover(entry, gateway, ROUTE, 0.9)


def test_check_when_nobody_listens_says_so(entry: Entry, tmp_path: Path) -> None:
    gateway = {"port": 9, "ledger": str(tmp_path / "ledger.db")}
    with pytest.raises(GateRefusedError, match="did not answer a parity prompt"):
        check_takeover(entry, gateway, ROUTE, 0.9)


def test_check_when_a_prompt_is_too_long_for_the_version_does_without_it(
    entry: Entry, server: Server, gateway: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    offline = offline_answers(entry.path, PROMPTS, max_tokens=MAX_TOKENS)
    server.answers = dict(zip(PROMPTS, offline, strict=True))
    check_takeover(entry, gateway, {"context_tokens": MAX_TOKENS + 12}, 1.0)
    num_asked = len(server.asked)
    assert 0 < num_asked < len(PROMPTS)
    check_takeover(entry, gateway, {"context_tokens": MAX_TOKENS}, 1.0)
    assert len(server.asked) == num_asked
    assert "no prompt fits" in caplog.text


@pytest.mark.parametrize("kind", ["gpt_neox", "bert", "gptq"])
def test_check_when_no_offline_reference_reads_the_model_says_so(
    entry: Entry,
    server: Server,
    gateway: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    document = json.loads((entry.path / "config.json").read_text())
    if kind == "gptq":
        document["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    else:
        document |= {"model_type": kind, "architectures": [kind]}
    with staged_directory(tmp_path / "source", {"kind": "model"}) as folder:
        for path in entry.path.glob("token*"):
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "config.json").write_text(json.dumps(document))
    other = Registry(tmp_path / "registry").publish(tmp_path / "source", "other")
    check_takeover(other, gateway, ROUTE, 1.0)
    assert server.asked == []
    assert "other@1 takes over without a comparison" in caplog.text
