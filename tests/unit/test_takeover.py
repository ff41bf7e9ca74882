"""Whether a version may take over a name; what it answers is scripted, the ledger is real."""

import json
from pathlib import Path

import pytest
from tiny_models import decoder_config

from cluster.accounting import ROLLOUT_TEAM
from cluster.errors import GateRefusedError
from cluster.ledger import Ledger
from cluster.storage import staged_directory
from jobs import takeover
from jobs.evaluation.parity import Disagreement, Endpoint, ParityReport
from jobs.models._hf import to_hf_config
from jobs.registry import Entry, Registry

DIFFERENT = tuple(Disagreement(f"prompt {n}", "said offline", "said online") for n in range(3))


@pytest.fixture
def ledger(tmp_path: Path) -> str:
    return str(tmp_path / "ledger.db")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Endpoint]:
    """Let 13 of 16 prompts be answered alike; gives whom was asked."""
    endpoints: list[Endpoint] = []

    def check(directory: Path, endpoint: Endpoint, prompts: object, **_: object) -> ParityReport:
        endpoints.append(endpoint)
        return ParityReport(16, DIFFERENT)

    monkeypatch.setattr(takeover, "check_parity", check)
    return endpoints


def publish(tmp_path: Path, document: dict) -> Entry:
    with staged_directory(tmp_path / "source", {"kind": "model"}) as folder:
        (folder / "config.json").write_text(json.dumps(document))
    return Registry(tmp_path / "registry").publish(tmp_path / "source", "tiny")


def test_check_when_too_few_answers_agree_refuses_and_shows_one(
    tmp_path: Path, ledger: str, asked: list[Endpoint]
) -> None:
    entry = publish(tmp_path, to_hf_config(decoder_config()))
    gateway = {"port": 81, "host": "0.0.0.0", "ledger": ledger}
    with pytest.raises(GateRefusedError, match=r"13 of 16.*90%.*'prompt 0'.*'said online'"):
        takeover.check_takeover(entry, gateway, 0.9)
    takeover.check_takeover(entry, gateway, 0.8)
    assert [endpoint.base_url for endpoint in asked] == ["http://127.0.0.1:81/v1"] * 2
    assert {endpoint.model for endpoint in asked} == {"tiny@1"}
    with Ledger.open(ledger) as opened:
        keys = list(opened.snapshot().keys.values())
    assert [key.team for key in keys] == [ROLLOUT_TEAM] * 2
    assert all(key.revoked_s is not None for key in keys)


def test_check_when_no_offline_reference_reads_the_model_says_so(
    tmp_path: Path, ledger: str, asked: list[Endpoint], caplog: pytest.LogCaptureFixture
) -> None:
    entry = publish(tmp_path, {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"})
    takeover.check_takeover(entry, {"port": 81, "ledger": ledger}, 1.0)
    assert asked == []
    assert "tiny@1 takes over without a comparison" in caplog.text
    assert "GPTNeoXForCausalLM" in caplog.text or "gpt_neox" in caplog.text
