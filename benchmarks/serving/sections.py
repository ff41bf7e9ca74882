"""The sections of the serving benchmark: what each starts, and which keys it reports.

Takes a `Bench`; gives a part of the report. How a figure is taken stands in the section's module.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.serving import (
    cancel,
    embeddings,
    fairness,
    floors,
    overhead,
    overload,
    peers,
    prefix,
    rollout,
    speculative,
    sweep,
)
from benchmarks.serving.contender import Contender, Process
from benchmarks.serving.http_client import Served
from benchmarks.serving.models import BENCH, REFERENCE, ROOT, SMALL, Models, interpreter
from benchmarks.serving.service import Service
from cluster.errors import ConfigError, ModelNotFoundError
from jobs.registry import Registry
from serving.directory import HEARTBEAT_S

OPTIONS = {
    "max_slots": 32,
    "max_len": 1024,
    "max_batch_tokens": 2048,  # Half of what the peers are given.
    "cache_dtype": "bfloat16",
}
# Where the time between tokens counts, or how soon work ends, a pass must not be long.
EVEN_OPTIONS = {**OPTIONS, "max_batch_tokens": 192}
# Ray gives a replica as many threads as CPUs.
CPUS = float(os.cpu_count() or 1)
# Each engine at the bits at which it answers most requests.
_SWEEP_PEERS = ("openvino-int8", "llama.cpp-Q4_0", "vllm-w8a8")
_OVERLOAD_S = (60.0, 180.0)  # To find the peak, and at five times of it.
_BUDGET_TOKENS = 4_000
Section = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What a section may use: a stack that stops what it starts, and a place for plots."""

    stack: ExitStack
    rounds: int
    cases: Sequence[peers.Case]
    plots: Path
    say: Callable[[str], None]

    def service(self) -> Service:
        """Start a cluster; it ends with the section."""
        return self.stack.enter_context(Service())

    def bare(self, model: Path, name: str) -> Process:
        """Start the engine alone."""
        arguments = [str(model), "--options", json.dumps(OPTIONS)]
        log = BENCH / "logs" / f"bare-{name}.log"
        process = Process(Path(sys.executable), "native", arguments, log)
        return self.stack.enter_context(process)

    def served(
        self, service: Service, model: Path, name: str, options: dict[str, Any] = OPTIONS
    ) -> Served:
        """Publish and offer a model, and return it as a contender."""
        service.offer(service.publish(model, name), options, cpus_per_replica=CPUS)
        return Served(service.api(name))


def _peers(bench: Bench) -> Section:
    models, vocab_size = Models(REFERENCE), REFERENCE.vocab_size
    claims = peers.claims(bench.cases)
    others: dict[str, Contender] = {}
    with ExitStack() as cluster:
        service = replace(bench, stack=cluster).service()
        ours: dict[str, Contender] = {
            f"{peers.OURS}-{scheme}": bench.served(service, models.compressed(scheme), scheme)
            for scheme in peers.SCHEMES
        }
        for peer in peers.PEERS:
            others[peer.name] = peers.start_peer(bench.stack, peer, models)
        engines = peers.compare(
            {**ours, **others}, bench.cases, vocab_size, bench.rounds, bench.say
        )
    # Peers answered beside an idle cluster so far. The best ones again, without it.
    near_best = [name for claim in claims for name in claim.near_best(engines)]
    bench.say("the best peers, the cluster stopped:")
    alone = peers.compare(
        {name: others[name] for name in dict.fromkeys(near_best)},
        list(dict.fromkeys(claim.case for claim in claims)),
        vocab_size,
        bench.rounds,
        bench.say,
    )
    found: Section = {"engines": engines, "best_peers_alone": alone}
    for claim in claims:
        found[claim.key] = claim.ratio(engines, engines)
        found[f"{claim.key}_alone"] = claim.ratio(engines, alone)
        bench.say(f"{claim.key} {found[claim.key]:.2f}, alone {found[f'{claim.key}_alone']:.2f}")
    return {**found, "floors": floors.measure(REFERENCE)}


def _gateway_overhead(bench: Bench) -> Section:
    model = Models(REFERENCE).compressed("w8a8")

    @contextmanager
    def start() -> Iterator[tuple[Contender, Contender]]:
        with ExitStack() as stack:
            own = replace(bench, stack=stack)
            yield own.served(own.service(), model, "w8a8"), own.bare(model, "w8a8")

    return {"gateway_overhead": overhead.measure(start, REFERENCE.vocab_size, bench.say)}


def _sweep(bench: Bench) -> Section:
    models = Models(REFERENCE)
    contenders: dict[str, Contender] = {
        f"{peers.OURS}-w8a8": bench.served(
            bench.service(), models.compressed("w8a8"), "w8a8", EVEN_OPTIONS
        )
    }
    batch_tokens = str(EVEN_OPTIONS["max_batch_tokens"])
    for peer in peers.PEERS:
        if peer.name in _SWEEP_PEERS:
            arguments = [str(peer.model(models)), "--batch-tokens", batch_tokens]
            log = BENCH / "logs" / f"sweep-{peer.name}.log"
            process = Process(interpreter(peer.module), peer.module, arguments, log)
            contenders[peer.name] = bench.stack.enter_context(process)
    found = sweep.measure(contenders, REFERENCE.vocab_size, bench.say)
    sweep.plot(found, bench.plots / "goodput.png")
    return {"sweep": found}


def _prefix(bench: Bench) -> Section:
    served = bench.served(bench.service(), Models(REFERENCE).compressed("w8a8"), "w8a8")
    found = prefix.measure(served.api, REFERENCE.vocab_size)
    bench.say(f"second request's first token {found['ratio']:.1f} times sooner")
    return {"prefix": found}


def _trained_model() -> Path:
    registry = Registry(ROOT / "runs" / "demo" / "registry")
    try:
        return registry.resolve("stdlib-tiny@production").path
    except ModelNotFoundError as error:
        raise ConfigError(
            "`speculative` needs the trained model, which is missing. Run `make demo` first."
        ) from error


def _speculative(bench: Bench) -> Section:
    python, model = Path(sys.executable), _trained_model()
    return {"speculative": speculative.measure(python, model, {"max_slots": 1}, bench.say)}


def _overload(bench: Bench) -> Section:
    service = bench.service()
    served = bench.served(service, Models(REFERENCE).compressed("w8a8"), "w8a8")
    processes = service.processes("ServeReplica")

    def resident_bytes() -> int:
        return sum(process.memory_info().rss for process in processes)

    with overload.cores_at_once() as at_once:
        if not at_once:
            bench.say("no right to real-time scheduling: refusals' times hold the clients' waits")
        found = overload.measure(
            served.api, REFERENCE.vocab_size, resident_bytes, _OVERLOAD_S, bench.say
        )
    return {"overload": {"clients_realtime": at_once, **found}}


def _fairness(bench: Bench) -> Section:
    service = bench.service()
    bench.served(service, Models(REFERENCE).compressed("w8a8"), "w8a8", EVEN_OPTIONS)
    small, large = service.api("w8a8", "small"), service.api("w8a8", "large")
    return {"fairness": fairness.measure(small, large, REFERENCE.vocab_size)}


def _rollout(bench: Bench) -> Section:
    # A cache as exact as the offline reference, which a version has to agree with.
    options = {**OPTIONS, "num_threads": 1, "cache_dtype": "float32"}
    model = Models(SMALL).compressed("w8a8")
    found = rollout.measure(bench.service(), model, options, SMALL.vocab_size, bench.say)
    return {"rollout": found}


def _cancel(bench: Bench) -> Section:
    service = bench.service()
    served = bench.served(service, Models(REFERENCE).compressed("w8a8"), "w8a8", EVEN_OPTIONS)

    (replica,) = service.processes("ServeReplica:engine")

    def engine_cpu_s() -> float:
        used = replica.cpu_times()
        return float(used.user + used.system)

    def computed() -> int:
        time.sleep(2 * HEARTBEAT_S)  # Replicas say once a second what they did.
        return int(service.metric(served.api, "raysmith_engine_generated_tokens_total"))

    def charged() -> int:
        return service.used(served.api, "bench")["generated_tokens"]

    probe = cancel.Probe(engine_cpu_s, computed, charged)
    left = cancel.leave(served.api, REFERENCE.vocab_size, probe)
    bench.say(f"{left}")
    poor = service.api("w8a8", "poor", tokens_per_month=_BUDGET_TOKENS)
    budget = cancel.budget(
        poor,
        REFERENCE.vocab_size,
        _BUDGET_TOKENS,
        lambda: sum(service.used(served.api, "poor").values()),
    )
    bench.say(f"{budget}")
    return {"cancel": {**left, "budget": budget}}


def _embeddings(bench: Bench) -> Section:
    service = bench.service()
    model = embeddings.quantized_minilm(BENCH / "models" / "minilm-w8a8")
    service.offer(service.publish(model, "minilm"), {}, cpus_per_replica=CPUS)
    found = embeddings.measure(service.api("minilm"), bench.say)
    return {"embeddings": found}


def check_ready(names: Iterable[str]) -> None:
    """Raise ConfigError for what a section lacks, before the first one takes its time."""
    if "speculative" in names:
        _trained_model()


SECTIONS: dict[str, Callable[[Bench], Section]] = {
    "peers": _peers,
    "gateway_overhead": _gateway_overhead,
    "prefix": _prefix,
    "speculative": _speculative,
    "overload": _overload,
    "fairness": _fairness,
    "rollout": _rollout,
    "cancel": _cancel,
    "embeddings": _embeddings,
    "sweep": _sweep,
}
