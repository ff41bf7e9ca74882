"""A gateway's view of replicas, over real sockets and a directory that says what the test wants."""

import asyncio
import socket
import sys
from contextlib import asynccontextmanager

import pytest
import uvloop
from fleet_fakes import MODEL, CountingReplica, request

from serving.directory import EXPIRY_S, LocalDirectory, Snapshot
from serving.membership import Membership
from serving.replica_host import ReplicaHost
from serving.transport import ReplicaConnection, ReplicaLostError


class ScriptedDirectory:
    """Answers each question with what the test puts into `answers`, or raises it."""

    def __init__(self) -> None:
        self.answers: asyncio.Queue[Snapshot | Exception] = asyncio.Queue()
        self.num_asked = 0

    async def watch(self, seen: int, timeout_s: float) -> Snapshot:
        self.num_asked += 1
        answer = await self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer


class Scene:
    """One replica, and a membership whose clock and directory the test moves."""

    def __init__(self) -> None:
        self.directory = ScriptedDirectory()
        self.now_s = 100.0
        self.membership = Membership(self.directory, "node", lambda: self.now_s)
        self.replica = CountingReplica(pause_at={2})
        self.host = ReplicaHost(self.replica, MODEL, LocalDirectory())

    async def answer(self, answer: Snapshot | Exception) -> None:
        """Return once the directory's answer was taken."""
        num_asked = self.directory.num_asked
        self.directory.answers.put_nowait(answer)
        while self.directory.num_asked == num_asked:  # noqa: ASYNC110 - no event to wait for
            await asyncio.sleep(0.005)

    async def named(self) -> None:
        await self.answer(Snapshot(1, (self.host._entry,), ()))
        while not self.membership.ready():
            await self.membership.wait_change(5)

    async def unnamed(self) -> None:
        await self.answer(Snapshot(2, (), ()))


@asynccontextmanager
async def scene():
    made = Scene()
    await made.host.start("127.0.0.1", "node")
    made.membership.start()
    try:
        while not made.directory.num_asked:  # noqa: ASYNC110 - no event to wait for
            await asyncio.sleep(0.005)
        await made.named()
        yield made
    finally:
        await made.membership.close()
        await made.host.stop(0)


def run(work):
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(asyncio.wait_for(work, 20))


async def lose(events) -> None:
    """Read until the replica is lost."""
    with pytest.raises(ReplicaLostError):
        async for _ in events:
            pass


def test_membership_when_a_replica_is_not_named_for_long_ends_its_connection():
    async def work():
        async with scene() as made:
            (member,) = made.membership.members
            events = member.connection.generate(request())
            await made.replica.is_paused.wait()  # As a frozen process: connected, but silent.
            await made.unnamed()
            made.now_s += 2 * EXPIRY_S - 0.1
            await made.unnamed()
            before = made.membership.ready()
            made.now_s += 0.1
            await made.unnamed()
            await lose(events)
            while made.membership.members:
                await made.membership.wait_change(5)
            return before, made.membership.ready()

    assert run(work()) == ({MODEL.reference}, set())


def test_membership_when_a_replica_is_named_again_in_time_keeps_its_connection():
    async def work():
        async with scene() as made:
            (member,) = made.membership.members
            for _ in range(3):
                await made.unnamed()
                made.now_s += 2 * EXPIRY_S - 1
                await made.named()
            return member.is_usable, list(made.membership.members) == [member]

    assert run(work()) == (True, True)


def test_membership_when_the_directory_was_away_counts_from_its_next_answer():
    async def work():
        async with scene() as made:
            await made.unnamed()
            await made.answer(ConnectionError("it restarts"))
            made.now_s += 10 * EXPIRY_S
            await made.unnamed()
            return made.membership.ready()

    assert run(work()) == {MODEL.reference}


@pytest.mark.skipif(sys.platform != "linux", reason="these options are Linux's")
def test_connection_when_by_port_ends_if_the_other_node_acknowledges_nothing():
    async def work():
        async with scene() as made:
            entry = made.host._entry
            connection = ReplicaConnection(entry.secret)
            await connection.open(entry.address, "another")
            connected = connection._protocol._transport.get_extra_info("socket")
            options = (
                connected.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
            )
            connection.close()
            return options

    assert run(work()) == (1, 3, 10_000)
