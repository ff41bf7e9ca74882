"""Where the gateway's answers come from: the seam between HTTP and replicas."""

from collections.abc import Sequence
from typing import Protocol

from serving.messages import (
    Embedded,
    EmbeddingRequest,
    Events,
    InferenceRequest,
    Refused,
    ReplicaStats,
    ServedModel,
)


class Backend(Protocol):
    """Models that can be asked."""

    def models(self) -> Sequence[ServedModel]:
        """Return every version that is offered."""
        ...

    def choose(self, asked: str) -> ServedModel | None:
        """Return the version that answers one request for `name` or `name@version`, or None.

        Between versions of a name their weights decide, anew for every request.
        """
        ...

    def generate(self, model: ServedModel, request: InferenceRequest) -> Events:
        """Start a request; closing the events cancels it."""
        ...

    async def embed(self, model: ServedModel, request: EmbeddingRequest) -> Embedded | Refused:
        """Return vectors; cancelling the call cancels the work."""
        ...

    def stats(self) -> Sequence[ReplicaStats]:
        """Return what each replica last said of itself."""
        ...

    async def problem(self) -> Refused | None:
        """Return why requests cannot be answered now, or None if they can."""
        ...
