"""The directory as a named actor of the cluster.

Takes calls of replicas, gateways and rollouts; passes them to the one actor, which is started where
there is none. It does not know what a directory holds.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from serving.directory import LocalDirectory, ReplicaEntry, Snapshot
from serving.outcomes import Outcomes

ACTOR_NAME = "raysmith-directory"
NAMESPACE = "raysmith"


class RayDirectory:
    """See `serving.directory.Directory`; usable on any event loop of a process that joined Ray."""

    def __init__(self) -> None:
        self._actor: ActorHandle | None = None

    async def report(self, entry: ReplicaEntry) -> None:
        """Note that a replica lives."""
        await self._call("report", entry)

    async def leave(self, replica: str) -> None:
        """Forget a replica."""
        await self._call("leave", replica)

    async def watch(self, seen: int, timeout_s: float) -> Snapshot:
        """Return a snapshot as soon as its revision is not `seen`, or when the time is over."""
        snapshot: Snapshot = await self._call("watch", seen, timeout_s)
        return snapshot

    async def note_outcomes(self, gateway: str, outcomes: Mapping[str, Outcomes]) -> None:
        """Note how requests ended at one gateway."""
        await self._call("note_outcomes", gateway, dict(outcomes))

    async def outcomes(self) -> dict[str, dict[str, Outcomes]]:
        """Return what every gateway said last, by gateway and version."""
        said: dict[str, dict[str, Outcomes]] = await self._call("outcomes")
        return said

    async def renew_lease(self, lease: str, ttl_s: float) -> None:
        """Keep a lease alive for some time from now."""
        await self._call("renew_lease", lease, ttl_s)

    async def end_lease(self, lease: str) -> None:
        """Let a lease end at once."""
        await self._call("end_lease", lease)

    async def _call(self, method: str, *arguments: Any) -> Any:
        if self._actor is None:
            self._actor = await asyncio.to_thread(_find_or_start)
        try:
            return await getattr(self._actor, method).remote(*arguments)
        except RayActorError:
            self._actor = None  # It may have been ended for good: the next call looks again.
            raise


def _find_or_start() -> ActorHandle:
    actor_class = ray.remote(LocalDirectory).options(
        name=ACTOR_NAME,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
    )
    return actor_class.remote()
