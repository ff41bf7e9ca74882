"""A head with published models and a gateway, for tests that ask over HTTP."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from cluster.accounting import Key, Scope, Team
from cluster.ledger import Ledger
from cluster.session import HeadConfig, Session, start_head, stop_head
from cluster.storage import write_manifest
from jobs.config import DecoderConfig
from jobs.data.tokenizer import train_tokenizer
from jobs.models.decoder import Decoder, build, load, save
from jobs.registry import Registry

MAX_LEN = 32768


@dataclass
class Service:
    """Where the gateway answers, and who may ask."""

    folder: Path
    session: Session
    key: str

    @property
    def url(self) -> str:
        return self.session.serve_url

    @property
    def ledger(self) -> str:
        return str(self.folder / "ledger.db")

    @property
    def registry(self) -> Registry:
        return Registry(self.folder / "registry")

    def client(self, **options: Any) -> openai.OpenAI:
        options = {"api_key": self.key, "max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers=self.headers, timeout=15)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def model(self, reference: str = "tiny@1") -> Decoder:
        return load(self.registry.resolve(reference).path)

    def wait_until_ready(self, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        status, text = 0, ""
        while status != 200:
            assert time.monotonic() < deadline, f"not ready: {status} {text}"
            try:
                response = self.get("/readyz")
                status, text = response.status_code, response.text
            except httpx.TransportError as error:
                text = str(error)
            time.sleep(0.1)

    def engine_pids(self, application: str = "engine--tiny--1") -> list[int]:
        """Return the processes of the replicas that run."""
        details = self.session.request("/api/serve/applications/")
        replicas = details["applications"][application]["deployments"]["engine"]["replicas"]
        return [replica["pid"] for replica in replicas if replica["state"] == "RUNNING"]


@contextmanager
def start_service(folder: Path, name: str) -> Iterator[Service]:
    """Start a head with a ledger and one published model, `tiny@1`; nothing is deployed yet."""
    publish(folder, seed=3)
    patch = pytest.MonkeyPatch()
    patch.setenv("RAYSMITH_STATE", str(folder / "state"))
    patch.setenv("RAYSMITH_LEDGER", str(folder / "ledger.db"))
    patch.setenv("OMP_NUM_THREADS", "1")
    with Ledger.open(None) as ledger:
        ledger.add_team(Team(name="test"))
        _, key = ledger.new_key(Key(id="", team="test", scopes=frozenset(Scope)))
    ports = {"gcs_port": 0, "dashboard_port": 0, "serve_port": 0}
    session = start_head(HeadConfig(name=name, num_cpus=2, **ports))
    try:
        with torch.inference_mode():
            yield Service(folder, session, key)
    finally:
        stop_head(session)
        patch.undo()


def publish(folder: Path, seed: int, name: str = "tiny", *, is_broken: bool = False) -> str:
    """Publish a tiny model whose greedy answers do not end early; return its reference.

    A broken one computes values that are not finite.
    """
    shape = DecoderConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        max_seq_len=MAX_LEN,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    source = Path(tempfile.mkdtemp(dir=folder)) / "source"
    train_tokenizer(["def read_file(path): return path\n" * 20], 300, source)
    model = build(shape, seed=seed)
    with torch.no_grad():  # Its logit is 0, never the highest.
        model.model.embed_tokens.weight[1] = 0
        if is_broken:
            model.model.norm.weight.fill_(float("nan"))
    save(model, source)
    write_manifest(source, {"kind": "model"})
    registry = Registry(folder / "registry")
    entry = registry.publish(source, name)
    registry.promote(name, entry.version)
    return entry.reference
