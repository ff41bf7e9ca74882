"""The gateway's way to all replicas: versions and replicas chosen, requests carried over a loss.

Takes the directory's replicas (membership.py) and the routing table; gives the gateway its
`Backend`. It does not know HTTP or Ray: the directory and the way to wake up a model are passed in.
"""

import asyncio
import logging
import random
import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from cluster.accounting import ROLLOUT_TEAM
from serving.continuation import MAX_LOSSES, NoReplicaError, ResumableEvents, unavailable
from serving.directory import HEARTBEAT_S, Directory
from serving.members import Member, MemberAttempt, is_of, prompt_tokens, start_of
from serving.membership import Membership
from serving.messages import (
    ENGINE_FAILED,
    Embedded,
    EmbeddingRequest,
    Events,
    InferenceRequest,
    Refused,
    ReplicaStats,
    ServedModel,
)
from serving.outcomes import Outcomes
from serving.routing import Load, Route, RoutingTable, affinity_of, effective_weight, pick
from serving.transport import DeclinedError, ReplicaLostError

_logger = logging.getLogger(__name__)
Wake = Callable[[Route], Awaitable[None]]


@dataclass(frozen=True)
class Waits:
    """How long a request may wait for a replica.

    `connect_s`: one is known and connected to at this moment. `replacement_s`: it lost its own in
    the middle. `cold_start_s`: the model was scaled to zero.
    """

    connect_s: float = 2.0
    replacement_s: float = 30.0
    cold_start_s: float = 120.0


class Fleet:
    """A `serving.gateway.backend.Backend` over replicas; used on one event loop."""

    def __init__(
        self, directory: Directory, node_id: str, wake: Wake, waits: Waits | None = None
    ) -> None:
        self._directory, self._wake = directory, wake
        self._waits = waits or Waits()
        self._name = secrets.token_hex(8)
        self._random = random.Random()
        self._table = RoutingTable()
        self._membership = Membership(directory, node_id)
        self._outcomes: dict[str, Outcomes] = {}
        self._waking: dict[str, asyncio.Task[None]] = {}
        self._reporting: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to follow the directory."""
        self._membership.start()
        self._reporting = asyncio.ensure_future(self._report())

    async def close(self) -> None:
        """Stop following and end every connection."""
        tasks = [*self._waking.values()]
        if self._reporting is not None:
            tasks.append(self._reporting)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._membership.close()

    def set_table(self, table: RoutingTable) -> None:
        """Offer exactly these versions from now on; what runs goes on."""
        self._table = table
        self._membership.tell()

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once every version has a replica that shall have one, or when the time is over."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + timeout_s
        while self._table.routes and await self.problem() is not None and loop.time() < end_s:
            await self._membership.wait_change(end_s - loop.time())

    @property
    def num_connected(self) -> int:
        """Replicas that can be asked now."""
        return sum(member.is_usable for member in self._membership.members)

    # What the gateway asks; see `Backend`.

    def models(self) -> Sequence[ServedModel]:
        """Return every version that is offered."""
        return [self._served(route) for route in self._table.routes]

    def choose(self, asked: str) -> ServedModel | None:
        """Return the version that answers one request."""
        route = self._table.choose(
            asked,
            self._random.random(),
            leases=self._membership.snapshot.leases,
            ready=self._membership.ready(),
        )
        return None if route is None else self._served(route)

    def generate(self, model: ServedModel, request: InferenceRequest) -> Events:
        """Start a request; closing the events cancels it."""
        outcomes = self._counted(model, request.team)
        return ResumableEvents(_Version(self, model), request, outcomes)

    async def embed(self, model: ServedModel, request: EmbeddingRequest) -> Embedded | Refused:
        """Return vectors, from another replica if one is lost."""
        outcomes = self._counted(model, request.team)
        answer = await self._embed(model, request)
        outcomes.ended(is_failed=isinstance(answer, Refused))
        return answer

    def stats(self) -> Sequence[ReplicaStats]:
        """Return what each replica last said of itself."""
        return [
            ReplicaStats(entry.model, entry.version, entry.replica, entry.stats)
            for entry in self._membership.snapshot.replicas
        ]

    async def problem(self) -> Refused | None:
        """Return why a model cannot answer now, or None if each can or is asleep on purpose."""
        ready, leases = self._membership.ready(), self._membership.snapshot.leases
        for route in self._table.routes:
            is_used = effective_weight(route, leases) > 0
            if is_used and not route.scales_to_zero and route.reference not in ready:
                return unavailable(f"model `{route.reference}` has no replica yet.")
        if not self._table.routes:
            return unavailable("no model is offered yet.")
        return None

    # What single requests ask.

    async def member(
        self, model: ServedModel, affinity: bytes, failed: set[str], *, is_begun: bool
    ) -> Member:
        """Return the replica to ask, waiting for one if that may help. Raises NoReplicaError."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        while True:
            usable = {m.entry.replica: m for m in self._membership.members if m.answers(model)}
            candidates = {key: m for key, m in usable.items() if key not in failed}
            if candidates:
                loads = [Load(key, m.tokens_in_flight) for key, m in candidates.items()]
                return candidates[pick(loads, affinity).replica]
            left_s = began_s + self._patience_s(model, is_begun=is_begun) - loop.time()
            if left_s <= 0:
                raise NoReplicaError(
                    f"no replica of `{model.reference}` can answer now. Try again in a moment."
                )
            await self._membership.wait_change(left_s)

    def _patience_s(self, model: ServedModel, *, is_begun: bool) -> float:
        known = [e for e in self._membership.snapshot.replicas if is_of(e, model)]
        route = self._table.find(model.reference)
        if route is not None and route.scales_to_zero:
            if all(entry.is_draining for entry in known):
                self._wake_up(route)
            return self._waits.cold_start_s
        if is_begun:
            return self._waits.replacement_s
        return self._waits.connect_s if known else 0.0

    def _wake_up(self, route: Route) -> None:
        task = self._waking.get(route.reference)
        if task is None or task.done():
            self._waking[route.reference] = asyncio.ensure_future(self._wake_safely(route))

    async def _wake_safely(self, route: Route) -> None:
        """Wake a model up, and not again before the directory can have heard of its replica."""
        try:
            await self._wake(route)
        except Exception:
            _logger.exception("%s could not be woken up", route.reference)
        await asyncio.sleep(HEARTBEAT_S)

    async def _embed(self, model: ServedModel, request: EmbeddingRequest) -> Embedded | Refused:
        affinity = affinity_of(request.team, "")
        failed: set[str] = set()
        is_begun = False
        tokens = sum(map(prompt_tokens, request.inputs))
        for _ in range(MAX_LOSSES):
            try:
                member = await self.member(model, affinity, failed, is_begun=is_begun)
            except NoReplicaError as error:
                return unavailable(str(error))
            member.tokens_in_flight += tokens
            try:
                answer = await member.connection.embed(request)
            except DeclinedError:
                failed.add(member.entry.replica)
                continue
            except ReplicaLostError as error:  # Its connection may be open again in a moment.
                _logger.warning("an embedding request lost its replica: %s", error)
                is_begun = True
                continue
            finally:
                member.tokens_in_flight -= tokens
            if not isinstance(answer, Refused) or answer.code != ENGINE_FAILED:
                return answer
            failed.add(member.entry.replica)
            is_begun = True
        return unavailable("the replicas that were asked failed. Try again in a moment.")

    def _counted(self, model: ServedModel, team: str) -> Outcomes:
        """Return where a request counts: a rollout's own show nothing of what clients get."""
        if team == ROLLOUT_TEAM:
            return Outcomes()
        return self._outcomes.setdefault(model.reference, Outcomes())

    def _served(self, route: Route) -> ServedModel:
        """Return what a route offers: as a replica says, else as its table's line does."""
        for member in self._membership.members:
            if member.reference == route.reference:
                entry = member.entry
                return msgspec.structs.replace(
                    route.model,
                    published_s=entry.published_s,
                    task=entry.task,
                    context_tokens=entry.context_tokens,
                )
        return route.model

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            try:
                await self._directory.note_outcomes(self._name, self._outcomes)
            except Exception as error:  # noqa: BLE001 - the next report says it all again
                _logger.info("the directory did not take a report: %s", error)


class _Version:
    """One version's replicas, for one request."""

    def __init__(self, fleet: Fleet, model: ServedModel) -> None:
        self._fleet, self._model = fleet, model

    async def attempt(
        self, request: InferenceRequest, *, failed: set[str], is_begun: bool
    ) -> MemberAttempt:
        affinity = affinity_of(request.team, start_of(request.prompts[0]))
        while True:
            member = await self._fleet.member(self._model, affinity, failed, is_begun=is_begun)
            with suppress(ReplicaLostError):  # Lost at this moment: the next one.
                return MemberAttempt(member, request)
