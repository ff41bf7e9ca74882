"""Requests during version changes and the loss of a replica: `rollout`.

Five thousand requests go on while a new version takes over, another one fails and is rolled back,
and one of two replicas is killed. A request counts as lost if it ended neither whole nor with an
error that says so.
"""

import asyncio
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.serving.http_client import Api, Reply, ask
from benchmarks.serving.models import ROOT
from benchmarks.serving.service import SESSION, Service
from benchmarks.serving.workload import together
from cluster.storage import MANIFEST, write_manifest

NAME = "rolling"
_NUM_REQUESTS = 5000
_CLIENTS = 16
_PROMPT_TOKENS, _ANSWER_TOKENS = 32, 16
_WATCH = ("limits.watch_s=10", "limits.min_requests=50")


def measure(
    service: Service,
    model: Path,
    options: dict[str, Any],
    vocab_size: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Return how many requests ended how, in each phase."""
    first = service.publish(model, NAME)
    service.offer(first, options, num_replicas=2, cpus_per_replica=0.5)
    second = service.publish(model, NAME)
    broken = service.publish(_broken(model, service.registry_root.parent / "broken"), NAME)
    return asyncio.run(_run(service, (second, broken), vocab_size, say))


async def _run(
    service: Service, versions: tuple[str, str], vocab_size: int, say: Callable[[str], None]
) -> dict[str, Any]:
    api, load = service.api(NAME), _Load(vocab_size)
    asking = [asyncio.create_task(load.client(api)) for _ in range(_CLIENTS)]
    codes = {}
    for phase, reference in zip(("change", "failing change"), versions, strict=True):
        load.phase = phase
        codes[phase] = await _promote(service, reference)
        say(f"{phase}: exit code {codes[phase]}, {load.num_done} requests so far")
    load.phase = "kill"
    victim = service.processes(f"ServeReplica:engine--{NAME}")[0]
    os.kill(victim.pid, signal.SIGKILL)
    await asyncio.gather(*asking)
    say(f"after the kill: {dict(load.counts['kill'])}")
    served = await ask(api, together(1, 8, 1, vocab_size)[0])
    return {
        "requests": load.num_done,
        "exit_codes": codes,
        "phases": {phase: dict(counts) for phase, counts in load.counts.items()},
        "lost": sum(counts["cut short"] for counts in load.counts.values()),
        "answers_after": served.is_whole,
    }


class _Load:
    """Clients that ask one request after another until all were asked."""

    def __init__(self, vocab_size: int) -> None:
        self._requests = together(_NUM_REQUESTS, _PROMPT_TOKENS, _ANSWER_TOKENS, vocab_size)
        self._next = iter(self._requests)
        self.phase = "change"
        self.num_done = 0
        self.counts: dict[str, Counter[str]] = {}

    async def client(self, api: Api) -> None:
        for request in self._next:
            phase = self.phase
            reply = await ask(api, request)
            self.num_done += 1
            self.counts.setdefault(phase, Counter())[_ending(reply, request.max_tokens)] += 1


def _ending(reply: Reply, max_tokens: int) -> str:
    if reply.is_whole and len(reply.tokens) == max_tokens:
        return "whole"
    return "clear error" if reply.error and reply.status else "cut short"


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


def _broken(model: Path, target: Path) -> Path:
    """Return a copy whose last norm is not a number: it loads, and every answer fails."""
    shutil.copytree(model, target, ignore=shutil.ignore_patterns(MANIFEST))
    path = next(target.glob("*.safetensors"))
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})
    write_manifest(target, {"kind": "model"})
    return target
