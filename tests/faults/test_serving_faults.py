"""Losses and changes under load: every stream goes on, every request is answered."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest
from serving_service import Service, publish, start_service

from cluster.errors import GateRefusedError
from cluster.head import MARKER
from cluster.serve_api import serve_api
from jobs.config import DeployConfig, ReplicaScaling
from jobs.deploy import deploy

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
# Not judged by times: other work on the machine disturbs them.
QUICK = ("limits.watch_s=4", "limits.min_requests=20", "limits.max_latency_ratio=100")


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with start_service(tmp_path_factory.mktemp("faults"), "serving-faults") as started:
        offer(started, "tiny@1", num_replicas=2)
        yield started


def offer(service: Service, reference: str, **changes) -> None:
    values = {
        "model": reference,
        "ledger": service.ledger,
        "cpus_per_replica": 0.3,
        "engine_options": {"max_slots": 16, "max_len": 4096},
        **changes,
    }
    registry = str(service.folder / "registry")
    deploy(DeployConfig(**values), registry, serve_api(service.session))


def ask(service: Service, prompt: str, num_tokens: int, model: str = "tiny") -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0}
    url = f"{service.url}/v1/completions"
    response = httpx.post(url, headers=service.headers, json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


@dataclass
class Load:
    """Streams that go on until they are told to stop, and how each ended."""

    service: Service
    num_tokens: int = 30
    texts: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def running(self, num_clients: int = 4) -> Iterator["Load"]:
        self._is_over = threading.Event()
        threads = [threading.Thread(target=self._client) for _ in range(num_clients)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._is_over.set()
            for thread in threads:
                thread.join(60)

    def _client(self) -> None:
        with self.service.client() as client:
            while not self._is_over.is_set():
                try:
                    stream = client.completions.create(
                        model="tiny",
                        prompt="def read_",
                        max_tokens=self.num_tokens,
                        temperature=0,
                        stream=True,
                    )
                    chunks = list(stream)
                    assert chunks[-1].choices[0].finish_reason == "length", "cut short"
                    self.texts.append("".join(chunk.choices[0].text for chunk in chunks))
                except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
                    self.failures.append(repr(error))


def test_streams_when_one_of_two_replicas_is_killed_go_on_token_for_token(service):
    prompts = [f"def read_{i}(" for i in range(12)]
    expected = [ask(service, prompt, 600) for prompt in prompts]
    found: dict[str, str] = {}
    started = threading.Barrier(len(prompts) + 1)

    def stream(prompt: str) -> None:
        with service.client() as client:
            chunks = client.completions.create(
                model="tiny", prompt=prompt, max_tokens=600, temperature=0, stream=True
            )
            text = next(chunks).choices[0].text
            started.wait(30)
            found[prompt] = text + "".join(chunk.choices[0].text for chunk in chunks)

    threads = [threading.Thread(target=stream, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    started.wait(30)
    pids = service.engine_pids()
    assert len(pids) == 2
    os.kill(pids[0], signal.SIGKILL)
    for thread in threads:
        thread.join(90)
    assert [found.get(prompt) for prompt in prompts] == expected


def test_requests_when_the_directory_is_killed_are_answered(service):
    (directory,) = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "ray::LocalDirectory" in " ".join(process.info["cmdline"] or ())
        and process.environ().get(MARKER) == service.session.head_id
    ]
    with Load(service).running() as load:
        time.sleep(0.5)
        directory.kill()
        time.sleep(5)
    assert load.failures == []
    assert len(set(load.texts)) == 1


def promote(service: Service, reference: str) -> subprocess.CompletedProcess:
    """Roll a version out as a person does: a job does it, and the command follows its log."""
    command = [sys.executable, "-m", "raysmith", "models", "promote", reference]
    command += ["--canary", "30%", "--registry", str(service.folder / "registry")]
    command += ["--name", service.session.name]
    for value in QUICK:
        command += ["--set", value]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)


def applications(service: Service) -> set[str]:
    return set(service.session.request("/api/serve/applications/")["applications"])


def test_rollout_when_the_version_is_good_takes_over_and_loses_nothing(service):
    reference = publish(service.folder, seed=3)  # The same weights: every answer agrees.
    service.registry.promote("tiny", "1")
    with Load(service).running() as load:
        result = promote(service, reference)
        time.sleep(1)
    assert result.returncode == 0, result.stderr
    assert "promoted: " in result.stderr
    assert load.failures == []
    assert len(set(load.texts)) == 1
    assert len(load.texts) > 20
    assert service.registry.resolve("tiny").reference == reference
    (model,) = service.client().models.list().data
    assert model.root == reference
    wait_until(lambda: applications(service) == {"gateway", f"engine--tiny--{reference[5:]}"})


@pytest.mark.parametrize(
    ("seed", "is_broken", "words"),
    [(9, False, "unlike the old version"), (3, True, "answered 500 to a parity prompt")],
)
def test_rollout_when_the_version_is_bad_rolls_back_by_itself(service, seed, is_broken, words):
    before = service.registry.resolve("tiny").reference
    expected = ask(service, "def read_", 30)
    reference = publish(service.folder, seed=seed, is_broken=is_broken)
    service.registry.promote("tiny", before.partition("@")[2])
    with Load(service).running() as load:
        result = promote(service, reference)
    assert result.returncode != 0
    assert words in result.stderr, result.stderr
    # A canary may answer otherwise, as it was allowed to for its share; no request is lost.
    assert load.failures == []
    assert service.registry.resolve("tiny").reference == before
    assert ask(service, "def read_", 30) == expected
    wait_until(lambda: f"engine--tiny--{reference[5:]}" not in applications(service))


def test_deployment_when_the_version_does_not_answer_as_its_model_leaves_the_old_one(service):
    before, expected = applications(service), ask(service, "def read_", 30)
    reference = publish(service.folder, seed=3, is_broken=True)
    with Load(service).running() as load, pytest.raises(GateRefusedError, match="a parity prompt"):
        offer(service, reference)
    assert load.failures == []
    assert ask(service, "def read_", 30) == expected
    wait_until(lambda: applications(service) == before)


def test_deployment_when_the_version_answers_as_its_model_takes_over(service):
    reference = publish(service.folder, seed=11)
    with Load(service).running() as load:
        offer(service, reference)
    assert load.failures == []
    (model,) = service.client().models.list().data
    assert model.root == reference
    wait_until(lambda: applications(service) == {"gateway", f"engine--tiny--{reference[5:]}"})


def test_model_when_nobody_asks_stops_and_comes_back_when_asked(service):
    publish(service.folder, seed=5, name="rare")
    scaling = ReplicaScaling(min_replicas=0, max_replicas=1, to_zero_delay_s=1)
    offer(service, "rare@1", scaling=scaling)
    expected = ask(service, "def", 8, model="rare")
    wait_until(lambda: service.engine_pids("engine--rare--1") == [], timeout_s=40)
    assert ask(service, "def", 8, model="rare") == expected


def wait_until(condition, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)
