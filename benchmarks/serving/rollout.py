"""Requests during version changes and the loss of a replica: `rollout`.

Five thousand requests go on while a new version takes over, two bad ones are rolled back, and one
of two replicas is killed. A request counts as cut short if it ended neither whole nor with an error
that says so.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.serving.http_client import Api, Reply, ask
from benchmarks.serving.models import ROOT
from benchmarks.serving.service import SESSION, Service
from benchmarks.serving.workload import Request, together
from cluster.storage import MANIFEST, write_manifest
from serving.directory import HEARTBEAT_S

NAME = "rolling"
NUM_REQUESTS = 5000
_CLIENTS = 16
_PROMPT_TOKENS, _ANSWER_TOKENS = 32, 16
_NUM_PROMPTS = 200  # Each is asked many times: its answers have to be alike, whoever gave them.
_WATCH = ("limits.watch_s=10", "limits.min_requests=50")
_KILL_SHARE = 0.3


@dataclass(frozen=True)
class _Change:
    """A version that is promoted, and the share of all requests that is asked meanwhile."""

    phase: str
    reference: str
    share: float


def measure(
    service: Service,
    model: Path,
    options: dict[str, Any],
    vocab_size: int,
    say: Callable[[str], None],
    num_requests: int = NUM_REQUESTS,
) -> dict[str, Any]:
    """Return how many requests ended how, in each phase.

    Of the two bad versions one fails at every prompt, so that the check before the canary finds it.
    The other one fails at half of the load's prompts and at none of the check's.
    """
    publish, folder = service.publish, service.registry_root.parent
    service.offer(publish(model, NAME), options, num_replicas=2, cpus_per_replica=0.5)
    marked = vocab_size - 1
    changes = (
        _Change("good change", publish(model, NAME), 0.3),
        _Change("bad change", publish(_broken(model, folder / "bad", None), NAME), 0.2),
        _Change("bad canary", publish(_broken(model, folder / "worse", marked), NAME), 0.2),
    )
    prompts = _prompts(vocab_size, marked)
    return asyncio.run(_run(service, changes, _Load(prompts, num_requests), say))


async def _run(
    service: Service, changes: tuple[_Change, ...], load: "_Load", say: Callable[[str], None]
) -> dict[str, Any]:
    api = service.api(NAME)
    load.begin("before", 0.0)
    asking = [asyncio.create_task(load.client(api)) for _ in range(_CLIENTS)]
    codes = {}
    for change in changes:
        load.begin(change.phase, change.share)
        codes[change.phase] = await _promote(service, change.reference)
        await load.reach()
        say(f"{change.phase}: exit code {codes[change.phase]}, {dict(load.counts[change.phase])}")
    resumed_before = await _resumed(service)
    victim = service.processes(f"ServeReplica:engine--{NAME}")[0]
    load.begin("kill", _KILL_SHARE)
    in_flight = load.num_open
    os.kill(victim.pid, signal.SIGKILL)
    await load.reach()
    load.stop()
    await asyncio.gather(*asking)
    resumed = await _resumed(service) - resumed_before
    say(f"kill: {dict(load.counts['kill'])}, {resumed} of {in_flight} in flight went on elsewhere")
    endings = Counter[str]()
    for counts in load.counts.values():
        endings += counts
    return {
        "requests": endings.total(),
        "exit_codes": codes,
        "phases": {phase: dict(counts) for phase, counts in load.counts.items()},
        "cut_short": endings["cut short"],
        "answers_unlike_the_first": load.num_unlike,
        "continued": {"in_the_changes": resumed_before, "after_the_kill": resumed},
        "in_flight_at_the_kill": in_flight,
    }


class _Load:
    """Clients that ask one request after another until they are stopped."""

    def __init__(self, prompts: list[Request], num_requests: int) -> None:
        self._prompts, self._num_requests = prompts, num_requests
        self._answers: dict[int, tuple[int, ...]] = {}
        self._num_asked = 0
        self._is_stopped = False
        self._is_reached, self._num_wanted = asyncio.Event(), 0
        self.phase = ""
        self.num_open = 0
        self.num_unlike = 0
        self.counts: dict[str, Counter[str]] = {}

    async def client(self, api: Api) -> None:
        """Ask; an ending counts in the phase in which it was seen."""
        while not self._is_stopped:
            number = self._num_asked % len(self._prompts)
            self._num_asked += 1
            self.num_open += 1
            reply = await ask(api, self._prompts[number])
            self.num_open -= 1
            ending = _ending(reply, self._prompts[number].max_tokens)
            counts = self.counts[self.phase]
            counts[ending] += 1
            if counts.total() >= self._num_wanted:
                self._is_reached.set()
            if ending == "whole":
                tokens = reply.content.tokens
                self.num_unlike += self._answers.setdefault(number, tokens) != tokens

    def begin(self, phase: str, share: float) -> None:
        """Count endings in this phase from now on; it shall have this share of all requests."""
        self.phase, self._num_wanted = phase, round(share * self._num_requests)
        self.counts[phase] = Counter()
        self._is_reached.clear()

    async def reach(self) -> None:
        """Wait until the phase has its share."""
        await self._is_reached.wait()

    def stop(self) -> None:
        """Let clients end with the answer they wait for."""
        self._is_stopped = True


def _ending(reply: Reply, max_tokens: int) -> str:
    content = reply.content
    if content.is_whole and len(content.tokens) == max_tokens:
        return "whole"
    is_said = content.error is not None and reply.failure is None
    return f"clear error {content.status}" if is_said else "cut short"


def _prompts(vocab_size: int, marked: int) -> list[Request]:
    """Return prompts, of which every other one begins with the marked token and no other has it."""
    requests = together(_NUM_PROMPTS, _PROMPT_TOKENS, _ANSWER_TOKENS, vocab_size - 1)
    return [
        Request(0.0, (marked, *request.prompt[1:]), request.max_tokens) if number % 2 else request
        for number, request in enumerate(requests)
    ]


async def _promote(service: Service, reference: str) -> int:
    command = ["-m", "raysmith", "models", "promote", reference, "--canary", "10%"]
    command += ["--registry", str(service.registry_root), "--name", SESSION]
    command += [word for each in _WATCH for word in ("--set", each)]
    log = (ROOT / ".bench" / "logs" / f"promote-{reference}.log").open("w", encoding="utf-8")
    with log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, env=service.environment(), cwd=ROOT, stdout=log, stderr=log
        )
        return await process.wait()


async def _resumed(service: Service) -> int:
    """Return how many requests went on at another replica so far."""
    await asyncio.sleep(2 * HEARTBEAT_S)  # Gateways say so once a second.
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.serving.resumed",
        env=service.environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, "the cluster's directory did not answer"
    return sum(json.loads(output).values())


def _broken(model: Path, target: Path, token: int | None) -> Path:
    """Return a copy that loads, and in which a token (None: every one) is not a number."""
    shutil.copytree(model, target, ignore=shutil.ignore_patterns(MANIFEST))
    path = next(target.glob("*.safetensors"))
    tensors = load_file(path)
    rows = slice(None) if token is None else token
    tensors["model.embed_tokens.weight"][rows] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    write_manifest(target, {"kind": "model"})
    return target
