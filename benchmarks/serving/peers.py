"""Tokens per second beside the engines people would pick instead: `engines` and `*_vs_best_peer`.

Every contender holds the same weights and gets the same prompts; they take turns. Peers run in
process, which spares them HTTP; this project answers over HTTP with streaming.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.serving.contender import Contender, Process
from benchmarks.serving.models import BENCH, Models, interpreter
from benchmarks.serving.workload import Answers, Request, together

OURS = "raysmith"
SCHEMES = ("w8a8", "w4a8")
_NEAR = 0.8  # of the fastest peer's rate: runs differ by that much
Engines = Mapping[str, Mapping[str, Any]]  # figures by contender and name of case


@dataclass(frozen=True)
class Peer:
    """An engine of another project: its environment, module, and bits of its weights."""

    name: str
    module: str
    bits: int
    model: Callable[[Models], Path]


PEERS = (
    Peer("openvino-int8", "openvino", 8, lambda models: models.openvino("int8")),
    Peer("openvino-int4", "openvino", 4, lambda models: models.openvino("int4")),
    Peer("llama.cpp-Q8_0", "llama_cpp", 8, lambda models: models.gguf("Q8_0")),
    Peer("llama.cpp-Q4_0", "llama_cpp", 4, lambda models: models.gguf("Q4_0")),
    Peer("vllm-bf16", "vllm", 16, Models.dense),
    Peer("vllm-w8a8", "vllm", 8, lambda models: models.compressed("w8a8", has_head=False)),
    Peer("transformers-bf16", "transformers", 16, Models.dense),
)


@dataclass(frozen=True)
class Case:
    """Equal requests that arrive at once."""

    num_requests: int
    prompt_tokens: int
    new_tokens: int

    @classmethod
    def parse(cls, text: str) -> "Case":
        """Read `n/prompt/answer`. Raises ValueError."""
        num_requests, prompt_tokens, new_tokens = map(int, text.split("/"))
        return cls(num_requests, prompt_tokens, new_tokens)

    @property
    def name(self) -> str:
        """A name that says all of it."""
        return f"n={self.num_requests} {self.prompt_tokens}/{self.new_tokens}"

    def requests(self, vocab_size: int, turn: int) -> list[Request]:
        """Return the requests of one turn."""
        return together(self.num_requests, self.prompt_tokens, self.new_tokens, vocab_size, turn)


CASES = (
    Case(1, 128, 64),
    Case(16, 128, 64),
    Case(32, 128, 64),
    Case(1, 512, 32),
    Case(16, 512, 32),
    Case(1, 32, 256),
    Case(16, 32, 256),
)


def start_peer(stack: ExitStack, peer: Peer, models: Models) -> Process:
    """Start a peer; it ends with the stack."""
    log = BENCH / "logs" / f"{peer.name}.log"
    process = Process(interpreter(peer.module), peer.module, [str(peer.model(models))], log)
    return stack.enter_context(process)


def compare(
    contenders: Mapping[str, Contender],
    cases: Sequence[Case],
    vocab_size: int,
    rounds: int,
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Return rates and times by contender and case; contenders take turns within each round."""
    for contender in contenders.values():
        contender.run(together(4, 64, 8, vocab_size))
    found: dict[str, dict[str, Any]] = {name: {} for name in contenders}
    for case in cases:
        answers: dict[str, list[Answers]] = {name: [] for name in contenders}
        for turn in range(rounds):
            requests = case.requests(vocab_size, turn)
            for name, contender in contenders.items():
                answers[name].append(contender.run(requests))
        for name, runs in answers.items():
            found[name][case.name] = _figures(runs)
            say(f"{case.name:14} {name:20} {found[name][case.name]['tokens_per_s']:8.1f} tokens/s")
    return found


def _figures(runs: Sequence[Answers]) -> dict[str, Any]:
    rates = [run.tokens_per_s for run in runs]
    return {
        "tokens_per_s": median(rates),
        "rates": rates,
        "first_token_ms": 1e3 * median([median(run.first_token_s()) for run in runs]),
        "between_tokens_ms": 1e3 * median([median(run.between_tokens_s()) for run in runs]),
    }


@dataclass(frozen=True)
class Claim:
    """A ratio that is reported: of which engine of ours, in which case, over the best of whom."""

    key: str
    ours: str
    case: Case
    peers: tuple[str, ...]

    def near_best(self, engines: Engines) -> list[str]:
        """Return the peers that another run could find to be the fastest."""
        best = self._best_rate(engines)
        return [name for name in self.peers if self._rate(engines, name) >= _NEAR * best]

    def ratio(self, engines: Engines, peers: Engines) -> float:
        """Return our rate over that of the fastest of those peers that were measured."""
        return self._rate(engines, self.ours) / self._best_rate(peers)

    def _best_rate(self, peers: Engines) -> float:
        return max(self._rate(peers, name) for name in self.peers if name in peers)

    def _rate(self, engines: Engines, name: str) -> float:
        return float(engines[name][self.case.name]["tokens_per_s"])


def claims(cases: Sequence[Case]) -> list[Claim]:
    """Return the claims about these cases."""
    names = {bits: tuple(p.name for p in PEERS if p.bits == bits) for bits in (4, 8)}
    every = tuple(peer.name for peer in PEERS)
    every_claim = (
        Claim("batch32_vs_best_peer", f"{OURS}-w8a8", Case(32, 128, 64), every),
        Claim("batch16_vs_best_peer", f"{OURS}-w8a8", Case(16, 128, 64), every),
        Claim("batch1_int8_vs_best_peer", f"{OURS}-w8a8", Case(1, 128, 64), names[8]),
        Claim("batch1_int4_vs_best_peer", f"{OURS}-w4a8", Case(1, 128, 64), names[4]),
    )
    return [claim for claim in every_claim if claim.case in cases]
