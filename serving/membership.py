"""The replicas that a gateway knows: named by the directory, each with a connection kept open.

Takes the directory's snapshots; gives members, and says when anything about them changed. While the
directory is away, the replicas it named last stay. One that it answers without for long is frozen
or cut off, whatever its connection looks like: that is ended, so that its requests go elsewhere. It
does not know versions, routes or requests.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Set
from contextlib import suppress

import msgspec

from serving.directory import EXPIRY_S, HEARTBEAT_S, Directory, Snapshot
from serving.members import Member
from serving.transport import ReplicaConnection, ReplicaLostError

_logger = logging.getLogger(__name__)
_REDIAL_S = 0.25
_WATCH_TIMEOUT_S = 5 * HEARTBEAT_S
_LEASE_FAILURES = 5
# A directory that starts afresh names everything within a second.
_FORGOTTEN_S = 2 * EXPIRY_S


class Membership:
    """Follows the directory and dials replicas; used on one event loop."""

    def __init__(
        self, directory: Directory, node_id: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._directory, self._node_id, self._clock = directory, node_id, clock
        self._snapshot = Snapshot(-1, (), ())
        self._members: dict[str, Member] = {}
        self._unnamed_since_s: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def snapshot(self) -> Snapshot:
        """What the directory last said."""
        return self._snapshot

    @property
    def members(self) -> Collection[Member]:
        """Every replica that is named or still connected."""
        return self._members.values()

    def ready(self) -> set[str]:
        """Return the versions that a replica can be asked for now."""
        return {member.reference for member in self._members.values() if member.is_usable}

    def start(self) -> None:
        """Begin to follow the directory."""
        self._spawn(self._follow())

    async def close(self) -> None:
        """Stop following and end every connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for member in self._members.values():
            member.connection.close()

    def tell(self) -> None:
        """Let everybody who waits for a change look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_change(self, timeout_s: float) -> None:
        """Return once something changed, or when the time is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    async def _follow(self) -> None:
        num_failures = 0
        while True:
            try:
                async with asyncio.timeout(_WATCH_TIMEOUT_S):
                    snapshot = await self._directory.watch(self._snapshot.revision, HEARTBEAT_S)
            except Exception as error:  # noqa: BLE001 - whatever it is, it may end: ask again
                num_failures += 1
                self._unnamed_since_s.clear()  # It names nobody now.
                _logger.warning("the directory does not answer: %r", error)
                if num_failures == _LEASE_FAILURES:  # Nobody can renew them: they have ended.
                    self._snapshot = msgspec.structs.replace(self._snapshot, leases=())
                await asyncio.sleep(HEARTBEAT_S)
                continue
            num_failures = 0
            self._see(snapshot)

    def _see(self, snapshot: Snapshot) -> None:
        """Connect to new replicas and forget those that are neither named nor connected."""
        self._snapshot = snapshot
        for entry in snapshot.replicas:
            known = self._members.get(entry.replica)
            if known is not None:
                known.entry = entry
            elif not entry.is_draining:
                self._members[entry.replica] = member = Member(entry)
                self._spawn(self._keep_connected(member))
        self._end_forgotten({entry.replica for entry in snapshot.replicas})
        self.tell()

    def _end_forgotten(self, named: Set[str]) -> None:
        """End connections of replicas that have not been named for long."""
        now_s, known_s = self._clock(), self._unnamed_since_s
        unnamed = self._members.keys() - named
        self._unnamed_since_s = {replica: known_s.get(replica, now_s) for replica in unnamed}
        for replica, since_s in self._unnamed_since_s.items():
            if now_s - since_s >= _FORGOTTEN_S and self._members[replica].connection.is_open:
                _logger.warning("replica %s is silent: its requests go elsewhere", replica)
                self._members[replica].connection.abort()

    async def _keep_connected(self, member: Member) -> None:
        """Connect, and again whenever the connection breaks, as long as the replica is named."""
        while True:
            connection = ReplicaConnection(member.entry.secret)
            try:
                await connection.open(member.entry.address, self._node_id)
            except ReplicaLostError as error:
                _logger.info("replica %s: %s", member.entry.replica, error)
                await asyncio.sleep(_REDIAL_S)
            else:
                member.connection = connection
                self.tell()
                try:
                    await connection.lost
                finally:
                    connection.close()
                self.tell()
            named = {entry.replica for entry in self._snapshot.replicas}
            if member.entry.replica not in named or member.entry.is_draining:
                del self._members[member.entry.replica]
                return

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
