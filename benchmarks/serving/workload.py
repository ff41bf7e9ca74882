"""What is asked of every contender, and what its answers' times say.

Takes lengths and rates; gives seeded requests with arrival times, and figures from the times of
their tokens. It does not know who answers.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """A prompt that arrives `at_s` after the start, and how many tokens follow it."""

    at_s: float
    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True)
class Answers:
    """The time of every token of every request, in seconds after the start."""

    requests: tuple[Request, ...]
    times_s: tuple[tuple[float, ...], ...]

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over the time from the first arrival to the last token."""
        last_s = max(times[-1] for times in self.times_s if times)
        first_s = min(request.at_s for request in self.requests)
        return sum(map(len, self.times_s)) / (last_s - first_s)

    def first_token_s(self) -> list[float]:
        """Return the time to first token of each answered request."""
        pairs = zip(self.requests, self.times_s, strict=True)
        return [times[0] - request.at_s for request, times in pairs if times]

    def between_tokens_s(self) -> list[float]:
        """Return the mean time between tokens of each request with two tokens or more."""
        return [(t[-1] - t[0]) / (len(t) - 1) for t in self.times_s if len(t) > 1]

    def share_within(self, limit: "Limit") -> float:
        """Return the share of requests whose answers are whole and within the limit."""
        pairs = zip(self.requests, self.times_s, strict=True)
        return sum(limit.holds(request, times) for request, times in pairs) / len(self.requests)


@dataclass(frozen=True)
class Limit:
    """What a user puts up with, in seconds."""

    first_token_s: float
    between_tokens_s: float

    def holds(self, request: Request, times_s: Sequence[float]) -> bool:
        """Say whether one answer is whole, began soon and came evenly."""
        if len(times_s) < request.max_tokens:
            return False
        if times_s[0] - request.at_s > self.first_token_s:
            return False
        gaps = max(len(times_s) - 1, 1)
        return (times_s[-1] - times_s[0]) / gaps <= self.between_tokens_s


def together(
    count: int, prompt_tokens: int, max_tokens: int, vocab_size: int, turn: int = 0
) -> list[Request]:
    """Return equal requests that arrive at once, with seeded random prompts.

    Another `turn` has other prompts, so that no contender answers from what it cached.
    """
    draws = random.Random(f"{count} {prompt_tokens} {max_tokens} {turn}")
    return [
        Request(0.0, _prompt(draws, prompt_tokens, vocab_size), max_tokens) for _ in range(count)
    ]


def poisson(rate_per_s: float, duration_s: float, vocab_size: int, turn: int = 0) -> list[Request]:
    """Return an open loop: random times, prompts of 16-512 and answers of 8-128 tokens.

    As many requests come as the rate says, at uniform times: a Poisson process whose count is
    known. Lengths are log-uniform, as conversations' are nearer to than to uniform. The same
    lengths come at every rate, another `turn` has others. Prompts differ always, so that no
    contender answers from what it cached.
    """
    lengths, draws = random.Random(turn), random.Random(f"{rate_per_s} {duration_s} {turn}")
    num_requests = round(rate_per_s * duration_s)
    requests = []
    for at_s in sorted(draws.uniform(0.0, duration_s) for _ in range(num_requests)):
        prompt = _prompt(draws, _log_uniform(lengths, 16, 512), vocab_size)
        requests.append(Request(at_s, prompt, _log_uniform(lengths, 8, 128)))
    return requests


def fresh(requests: Sequence[Request], vocab_size: int) -> list[Request]:
    """Return requests of the same lengths with other prompts, all at once."""
    draws = random.Random(len(requests))
    return [
        Request(0.0, _prompt(draws, len(request.prompt), vocab_size), request.max_tokens)
        for request in requests
    ]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share of them lies, by the nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def _log_uniform(draws: random.Random, low: int, high: int) -> int:
    return round(low * (high / low) ** draws.random())


def _prompt(draws: random.Random, length: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(draws.randrange(2, vocab_size) for _ in range(length))
