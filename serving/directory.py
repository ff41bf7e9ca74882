"""The directory: which replicas live, where they listen, what they do; and who holds a lease.

Takes reports of replicas and gateways; gives snapshots. Everything in it is said again every
second, so that a directory that starts afresh is complete after one. The state is pure; the actor
around it adds waiting. It does not know engines, HTTP or how a request is routed.
"""

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Protocol

from serving.engines._protocol import EngineStats
from serving.messages import Message, Task
from serving.outcomes import Outcomes
from serving.replica_server import ReplicaAddress

HEARTBEAT_S = 1.0
EXPIRY_S = 5.0
# Longer than rollouts watch: what a gateway counted before it was replaced tells of the version.
OUTCOMES_EXPIRY_S = 3600.0


class ReplicaEntry(Message, frozen=True):
    """What a replica says of itself."""

    replica: str
    model: str
    version: str
    address: ReplicaAddress
    secret: bytes
    stats: EngineStats
    published_s: int = 0
    task: Task = "generate"
    is_draining: bool = False
    context_tokens: int | None = None


class Snapshot(Message, frozen=True):
    """What lives now. `revision` changes when a replica comes, goes or begins to drain."""

    revision: int
    replicas: tuple[ReplicaEntry, ...]
    leases: tuple[str, ...]


class DirectoryState:
    """Entries and leases that expire; pure but for the clock that its callers pass."""

    def __init__(self, expiry_s: float = EXPIRY_S) -> None:
        self._expiry_s = expiry_s
        self._entries: dict[str, tuple[ReplicaEntry, float]] = {}
        self._outcomes: dict[str, tuple[Mapping[str, Outcomes], float]] = {}
        self._leases: dict[str, float] = {}
        self.revision = 0

    def report(self, entry: ReplicaEntry, now_s: float) -> None:
        """Note that a replica lives."""
        known = self._entries.get(entry.replica)
        self._entries[entry.replica] = entry, now_s
        if known is None or known[0].is_draining != entry.is_draining:
            self.revision += 1

    def leave(self, replica: str) -> None:
        """Forget a replica."""
        if self._entries.pop(replica, None) is not None:
            self.revision += 1

    def note_outcomes(self, gateway: str, outcomes: Mapping[str, Outcomes], now_s: float) -> None:
        """Note how requests to each version ended at one gateway, in all since it started."""
        self._outcomes[gateway] = outcomes, now_s
        self._forget_outcomes(now_s)

    def outcomes(self, now_s: float) -> dict[str, dict[str, Outcomes]]:
        """Return what every gateway said last, by gateway and version, and forget old reports.

        A gateway that reports again comes back with all it has counted.
        """
        self._forget_outcomes(now_s)
        return {gateway: dict(said) for gateway, (said, _) in self._outcomes.items()}

    def renew_lease(self, lease: str, ttl_s: float, now_s: float) -> None:
        """Keep a lease alive for some time from now."""
        if lease not in self._leases:
            self.revision += 1
        self._leases[lease] = now_s + ttl_s

    def end_lease(self, lease: str) -> None:
        """Let a lease end at once."""
        if self._leases.pop(lease, None) is not None:
            self.revision += 1

    def snapshot(self, now_s: float) -> Snapshot:
        """Return what lives now, and forget what does not."""
        gone = [key for key, (_, at_s) in self._entries.items() if now_s - at_s > self._expiry_s]
        ended = [lease for lease, until_s in self._leases.items() if until_s <= now_s]
        for key in gone:
            del self._entries[key]
        for lease in ended:
            del self._leases[lease]
        self.revision += bool(gone or ended)
        entries = tuple(entry for entry, _ in self._entries.values())
        return Snapshot(self.revision, entries, tuple(self._leases))

    def _forget_outcomes(self, now_s: float) -> None:
        said = self._outcomes.items()
        old = [gateway for gateway, (_, at_s) in said if now_s - at_s > OUTCOMES_EXPIRY_S]
        for gateway in old:
            del self._outcomes[gateway]


class Directory(Protocol):
    """The directory as its clients see it, wherever it runs."""

    async def report(self, entry: ReplicaEntry) -> None:
        """Note that a replica lives."""
        ...

    async def leave(self, replica: str) -> None:
        """Forget a replica."""
        ...

    async def watch(self, seen: int, timeout_s: float) -> Snapshot:
        """Return a snapshot as soon as its revision is not `seen`, or when the time is over."""
        ...

    async def note_outcomes(self, gateway: str, outcomes: Mapping[str, Outcomes]) -> None:
        """Note how requests ended at one gateway."""
        ...


class LocalDirectory:
    """A directory in this process; the actor runs one, and so do tests."""

    def __init__(self, expiry_s: float = EXPIRY_S) -> None:
        self._state = DirectoryState(expiry_s)
        self._changed = asyncio.Event()

    async def report(self, entry: ReplicaEntry) -> None:
        """Note that a replica lives."""
        self._state.report(entry, time.monotonic())
        self._tell()

    async def leave(self, replica: str) -> None:
        """Forget a replica."""
        self._state.leave(replica)
        self._tell()

    async def watch(self, seen: int, timeout_s: float) -> Snapshot:
        """Return a snapshot as soon as its revision is not `seen`, or when the time is over."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            snapshot = self._state.snapshot(time.monotonic())
            left_s = deadline_s - time.monotonic()
            if snapshot.revision != seen or left_s <= 0:
                return snapshot
            # Not wait_for: it loses a cancellation that comes with the event (cpython#86296).
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._changed.wait()

    async def note_outcomes(self, gateway: str, outcomes: Mapping[str, Outcomes]) -> None:
        """Note how requests ended at one gateway."""
        self._state.note_outcomes(gateway, outcomes, time.monotonic())

    async def outcomes(self) -> dict[str, dict[str, Outcomes]]:
        """Return what every gateway said last, by gateway and version."""
        return self._state.outcomes(time.monotonic())

    async def renew_lease(self, lease: str, ttl_s: float) -> None:
        """Keep a lease alive for some time from now."""
        self._state.renew_lease(lease, ttl_s, time.monotonic())
        self._tell()

    async def end_lease(self, lease: str) -> None:
        """Let a lease end at once."""
        self._state.end_lease(lease)
        self._tell()

    def _tell(self) -> None:
        """Wake those who watch; they look whether the revision changed."""
        self._changed.set()
        self._changed = asyncio.Event()
