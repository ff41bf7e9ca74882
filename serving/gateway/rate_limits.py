"""Limits per key and team: requests and tokens a minute, choices at a time.

Takes bounds and what a request asks for; gives a hold, or RefusedError with the time to wait.
Counts live in this process and are exact to a second: no 60 s have more than the limit. It does not
know budgets or where limits come from.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus

from cluster.accounting import Limits
from serving.gateway.errors import RefusedError
from serving.messages import Refused

WINDOW_S = 60
RATE_LIMIT_CODE = "rate_limit_exceeded"
_BUSY_RETRY_S = 1


@dataclass(frozen=True)
class Bound:
    """Whose limits apply; `owner` is how a message names them, and tells counts apart."""

    owner: str
    limits: Limits


@dataclass(frozen=True)
class Asked:
    """What one request may use at most."""

    num_tokens: int
    num_choices: int


class RateLimits:
    """Counts of every key and team; used on one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counts: dict[str, _Counts] = {}

    def take(self, bounds: Sequence[Bound], asked: Asked) -> "Taken":
        """Count a request against every bound, or against none.

        Raises RefusedError: 400 if a limit can never hold so much, 429 if it does not now.
        """
        now_s = self._clock()
        counts = [self._counts.setdefault(bound.owner, _Counts()) for bound in bounds]
        for bound, count in zip(bounds, counts, strict=True):
            for check in count.checks(bound.limits, asked, now_s):
                check.refuse_if_over(bound.owner)
        return Taken([count.add(asked, now_s) for count in counts], asked)


class Taken:
    """One request's part of the counts."""

    def __init__(self, entries: "Sequence[_Entry]", asked: Asked) -> None:
        self._entries = entries
        self._asked = asked

    def release(self, used_tokens: int) -> None:
        """End the request: what it did not use is free again, the request itself counts on."""
        for entry in self._entries:
            entry.counts.tokens.change(entry.tokens, used_tokens - self._asked.num_tokens)
            entry.counts.num_choices -= self._asked.num_choices

    def undo(self) -> None:
        """Forget the request: it was refused elsewhere."""
        self.release(0)
        for entry in self._entries:
            entry.counts.requests.change(entry.request, -1)


@dataclass
class _Slot:
    """What happened in one second."""

    second: int
    amount: int = 0
    is_past: bool = False


class _Window:
    """A sum over the last 60 s. A slot goes when its last moment has."""

    def __init__(self) -> None:
        self._slots: deque[_Slot] = deque()
        self._total = 0

    def total(self, now_s: float) -> int:
        while self._slots and self._slots[0].second + 1 + WINDOW_S <= now_s:
            slot = self._slots.popleft()
            slot.is_past = True
            self._total -= slot.amount
        return self._total

    def add(self, amount: int, now_s: float) -> _Slot:
        second = int(now_s)
        if not self._slots or self._slots[-1].second != second:
            self._slots.append(_Slot(second))
        self.change(self._slots[-1], amount)
        return self._slots[-1]

    def change(self, slot: _Slot, amount: int) -> None:
        slot.amount += amount
        if not slot.is_past:
            self._total += amount

    def wait_s(self, excess: int, now_s: float) -> int:
        """Return after how many whole seconds the sum is lower by `excess`."""
        for slot in self._slots:
            excess -= slot.amount
            if excess <= 0:
                return max(1, math.ceil(slot.second + 1 + WINDOW_S - now_s))
        return WINDOW_S


@dataclass
class _Counts:
    requests: _Window = field(default_factory=_Window)
    tokens: _Window = field(default_factory=_Window)
    num_choices: int = 0

    def checks(self, limits: Limits, asked: Asked, now_s: float) -> "Iterator[_Check]":
        if limits.requests_per_min is not None:
            found = self.requests.total(now_s)
            limit = limits.requests_per_min
            wait_s = self.requests.wait_s(found + 1 - limit, now_s)
            yield _Check("requests a minute", limit, found, 1, wait_s)
        if limits.tokens_per_min is not None:
            found = self.tokens.total(now_s)
            limit = limits.tokens_per_min
            wait_s = self.tokens.wait_s(found + asked.num_tokens - limit, now_s)
            yield _Check("tokens a minute", limit, found, asked.num_tokens, wait_s)
        if limits.max_choices is not None:
            limit, found = limits.max_choices, self.num_choices
            yield _Check("choices at a time", limit, found, asked.num_choices, _BUSY_RETRY_S)

    def add(self, asked: Asked, now_s: float) -> "_Entry":
        self.requests.total(now_s)  # lets go of what is past, also where nothing is limited
        self.tokens.total(now_s)
        self.num_choices += asked.num_choices
        request = self.requests.add(1, now_s)
        return _Entry(self, request, self.tokens.add(asked.num_tokens, now_s))


@dataclass(frozen=True)
class _Entry:
    counts: _Counts
    request: _Slot
    tokens: _Slot


@dataclass(frozen=True)
class _Check:
    unit: str
    limit: int
    found: int
    asked: int
    wait_s: int

    def refuse_if_over(self, owner: str) -> None:
        if self.asked > self.limit:
            raise RefusedError(
                Refused(
                    HTTPStatus.BAD_REQUEST,
                    f"the request asks for up to {self.asked}, and {owner} may use at most "
                    f"{self.limit} {self.unit}. Ask for less, or have the limit raised.",
                    code=RATE_LIMIT_CODE,
                )
            )
        if self.found + self.asked > self.limit:
            raise RefusedError(
                Refused(
                    HTTPStatus.TOO_MANY_REQUESTS,
                    f"{owner} may use {self.limit} {self.unit}: {self.found} are taken, and this "
                    f"request asks for up to {self.asked}. Try again in {self.wait_s} s.",
                    code=RATE_LIMIT_CODE,
                    retry_after_s=self.wait_s,
                )
            )
