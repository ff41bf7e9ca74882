"""Where the gateway's answers come from: the seam between HTTP and replicas."""

from collections.abc import Sequence
from typing import Protocol

from serving.messages import Events, InferenceRequest, Refused, ServedModel


class Backend(Protocol):
    """Models that can be asked."""

    def models(self) -> Sequence[ServedModel]:
        """Return what is offered."""
        ...

    def generate(self, model: ServedModel, request: InferenceRequest) -> Events:
        """Start a request; closing the events cancels it."""
        ...

    async def problem(self) -> Refused | None:
        """Return why requests cannot be answered now, or None if they can."""
        ...
