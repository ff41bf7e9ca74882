"""Whether a version may take over a name: a real model and ledger, and a server that may lie."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_server import PromptServer, running_server
from serving_service import publish

from cluster.accounting import ROLLOUT_TEAM
from cluster.errors import GateRefusedError
from cluster.ledger import Ledger
from cluster.storage import staged_directory
from jobs.evaluation.parity import offline_answers
from jobs.registry import Entry, Registry
from jobs.takeover import MAX_TOKENS, PROMPTS, check_takeover

ROUTE = {"context_tokens": 512}


@pytest.fixture
def server() -> Iterator[PromptServer]:
    with running_server() as state:
        yield state


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Entry:
    folder = tmp_path_factory.mktemp("takeover")
    return Registry(folder / "registry").resolve(publish(folder, seed=3))


@pytest.fixture
def gateway(tmp_path: Path, server: PromptServer) -> dict[str, Any]:
    return {"port": server.port, "host": "0.0.0.0", "ledger": str(tmp_path / "ledger.db")}


def test_check_when_too_few_answers_agree_refuses_and_shows_one(
    entry: Entry, server: PromptServer, gateway: dict[str, Any]
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
    entry: Entry, server: PromptServer, gateway: dict[str, Any], caplog: pytest.LogCaptureFixture
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
    server: PromptServer,
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
    assert "other@1 is not compared with its model" in caplog.text
