"""Which version answers a request, and which of its replicas: decisions over values.

Takes the routing table, loads and random numbers; gives choices. It does not know connections or
how the table arrives.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from pydantic import Field, model_validator

from cluster.config import StrictModel
from serving.messages import ServedModel, Task

# Loads that differ by less count as equal, so that a cached prefix is worth a short queue.
_SLACK_TOKENS = 512
_AFFINITY_CHARACTERS = 256


class Route(StrictModel):
    """One version of a model and its share of the requests for the name."""

    name: str = Field(min_length=1, description="Name of the model.")
    version: str = Field(min_length=1, description="Version.")
    weight: float = Field(default=1.0, ge=0, description="Share, relative to its siblings'.")
    lease: str | None = Field(
        default=None,
        description="The weight holds only while this lease of the directory is renewed.",
    )
    task: Task = Field(default="generate", description="generate or embed.")
    context_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens that fit in it; unset: known once a replica says so.",
    )
    published_s: int = Field(default=0, ge=0, description="When it was published, since the epoch.")
    application: str = Field(
        default="", description="Serve application that runs it; woken up when it has no replica."
    )
    scales_to_zero: bool = Field(
        default=False, description="Requests wait for a replica where there is none."
    )

    @property
    def reference(self) -> str:
        """The spelling that names exactly this version."""
        return f"{self.name}@{self.version}"

    @property
    def model(self) -> ServedModel:
        """What the gateway lists."""
        return ServedModel(
            self.name, self.version, self.published_s, self.task, self.context_tokens
        )


class RoutingTable(StrictModel):
    """Every version that is offered."""

    routes: tuple[Route, ...] = Field(default=(), description="Versions, in the order listed.")

    @model_validator(mode="after")
    def _check(self) -> "RoutingTable":
        references = [route.reference for route in self.routes]
        twice = sorted({each for each in references if references.count(each) > 1})
        if twice:
            raise ValueError(f"`routes` has `{twice[0]}` twice")
        return self

    def find(self, reference: str) -> Route | None:
        """Return the route of a name@version."""
        return next((route for route in self.routes if route.reference == reference), None)

    def choose(
        self,
        asked: str,
        draw: float,
        *,
        leases: Collection[str] = (),
        ready: Collection[str] | None = None,
    ) -> Route | None:
        """Return the route for `name@version`, or one of `name`'s by weight; None without any.

        `draw` is uniform in [0, 1). Of several versions those with a replica (`ready`, references;
        None: all) are preferred.
        """
        if (exact := self.find(asked)) is not None:
            return exact
        weighted = [
            (route, weight)
            for route in self.routes
            if route.name == asked and (weight := effective_weight(route, leases)) > 0
        ]
        if ready is not None:
            weighted = [pair for pair in weighted if pair[0].reference in ready] or weighted
        left = draw * sum(weight for _, weight in weighted)
        for route, weight in weighted:
            left -= weight
            if left < 0:
                return route
        return weighted[-1][0] if weighted else None


def effective_weight(route: Route, leases: Collection[str]) -> float:
    """Return a route's weight now: 0 once its lease has ended."""
    return 0.0 if route.lease is not None and route.lease not in leases else route.weight


@dataclass(frozen=True)
class Load:
    """How much one replica has to do, in tokens."""

    replica: str
    tokens_in_flight: int


def pick(loads: Sequence[Load], affinity: bytes) -> Load:
    """Return the replica with the fewest tokens in flight; among about equal ones a fixed one.

    The fixed one has the highest hash with `affinity` (Thaler and Ravishankar 1998, rendezvous
    hashing): requests of one affinity meet the same cache, and few move when replicas come or go.
    """
    least = min(load.tokens_in_flight for load in loads)
    close = [load for load in loads if load.tokens_in_flight <= least + _SLACK_TOKENS]
    return max(close, key=lambda load: _rank(affinity, load.replica))


def affinity_of(team: str, prompt_start: str) -> bytes:
    """Return what requests share whose prompts may share cached blocks."""
    return blake2b(f"{team}\0{prompt_start[:_AFFINITY_CHARACTERS]}".encode()).digest()


def _rank(affinity: bytes, replica: str) -> bytes:
    return blake2b(affinity + replica.encode(), digest_size=8).digest()
