"""The ledger's one writer for all gateways of a cluster: a named, detached Ray actor.

Takes batches; gives answers. An actor runs one call at a time, so batches of several gateways never
contend; it keeps nothing in memory, so Ray may restart it at any moment. A batch whose answer was
lost is sent again and known by its number. It does not know what a batch is about.
"""

import asyncio
import hashlib
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, ActorUnschedulableError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.accounting import Answer, Batch
from cluster.errors import ClusterError, LedgerError, RaysmithError
from cluster.ledger import Ledger
from cluster.ledger_address import LEDGER_VARIABLE, is_file, ledger_url

NAMESPACE = "raysmith"
_CALL_TIMEOUT_S = 15.0


class Steward:
    """Writes the one ledger that it is named after."""

    def __init__(self, given: str | None, name: str) -> None:
        self._given, self._name = given, name
        self._ledger: Ledger | None = None

    def apply(self, batch: Batch) -> Answer:
        """Write a batch, unless it was written before, and return its answer.

        Raises LedgerError if this process would open another ledger than was meant.
        """
        # Not at the start: an error there would reach callers only as the actor's death.
        if self._ledger is None:
            self._ledger = self._open()
        return self._ledger.apply(batch)

    def _open(self) -> Ledger:
        if steward_name(self._given) != self._name:
            found = ledger_url(self._given).render_as_string(hide_password=True)
            raise LedgerError(
                f"the steward would write the ledger {found}, and its gateway meant another. Set "
                f"{LEDGER_VARIABLE} to the same on every node before Ray is started there."
            )
        return Ledger.open(self._given)


class RemoteSteward:
    """Reaches a ledger's steward, and starts it where none runs."""

    def __init__(self, given: str | None = None) -> None:
        self._given = given
        self._actor: ActorHandle | None = None

    async def apply(self, batch: Batch) -> Answer:
        """Have a batch written and return its answer.

        Raises ClusterError if the steward does not answer, which says nothing about whether the
        batch was written: send it again. Raises LedgerError if it could not be.
        """
        try:
            actor: Any = self._actor or await asyncio.to_thread(start_steward, self._given)
            self._actor = actor
            call = asyncio.wrap_future(actor.apply.remote(batch).future())
            # Not wait_for: it loses a cancellation that comes with the answer (cpython#86296).
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                answer: Answer = await call
        except RayTaskError as error:
            if isinstance(error.cause, RaysmithError):
                raise error.cause from None
            raise ClusterError(f"the ledger's steward failed: {error}") from error
        except (RayError, TimeoutError) as error:
            if isinstance(error, ActorDiedError | ActorUnschedulableError):
                self._actor = None  # it or its node is gone for good: start another, here
            raise ClusterError(
                f"the ledger's steward does not answer: {str(error).rstrip('. ') or 'too slow'}. "
                "Try again."
            ) from None
        return answer


def start_steward(given: str | None = None) -> ActorHandle:
    """Return the steward of a ledger, started if there is none on this cluster.

    It runs on this node, where a ledger that is a file is, and where the environment names the one
    that is meant. Raises ClusterError if it cannot start.
    """
    url, name = ledger_url(given), steward_name(given)
    node = ray.get_runtime_context().get_node_id()
    options: dict[str, Any] = {
        "name": name,
        "namespace": NAMESPACE,
        "get_if_exists": True,
        "lifetime": "detached",
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": 0,  # callers send a batch again themselves, and count their patience
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
    }
    # The actor may start in another folder, so a path is made absolute here; a password that the
    # environment gives is not sent.
    address = url.render_as_string(hide_password=False) if given or is_file(url) else None
    try:
        actor: ActorHandle = ray.remote(Steward).options(**options).remote(address, name)
        return actor
    except (RayError, ValueError) as error:
        raise ClusterError(f"the steward of the ledger cannot start: {error}") from error


def steward_name(given: str | None = None) -> str:
    """Return the name of a ledger's steward; each ledger has one of its own."""
    shown = ledger_url(given).render_as_string(hide_password=True)
    return f"steward-{hashlib.sha256(shown.encode()).hexdigest()[:12]}"
