"""One request's events, whichever replicas they come from.

Takes a request and a way to replicas; gives events as if one replica had answered: when one is
lost, the next is asked to go on after the tokens that were delivered. It does not know how a
replica is found or chosen.
"""

import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Protocol

import msgspec

from serving.messages import (
    ENGINE_FAILED,
    Delta,
    Event,
    Events,
    InferenceRequest,
    Refused,
)
from serving.outcomes import Outcomes
from serving.transport import DeclinedError, ReplicaLostError

_logger = logging.getLogger(__name__)
# A request that ends its replicas shall not end all of them.
MAX_LOSSES = 3


class NoReplicaError(Exception):
    """No replica took the request in time; the text says so to a client."""


class EngineLostError(Exception):
    """A replica that can be reached could not end an answer."""


class Attempt(Protocol):
    """A request at one replica."""

    @property
    def replica(self) -> str:
        """Which one."""

    @property
    def events(self) -> Events:
        """What it says; raises ReplicaLostError or DeclinedError."""

    def deliver(self, num_tokens: int) -> None:
        """Take note of progress."""

    def release(self) -> None:
        """Take note that the request is no longer there."""


class Replicas(Protocol):
    """A way to replicas of one version."""

    async def attempt(
        self, request: InferenceRequest, *, failed: set[str], is_begun: bool
    ) -> Attempt:
        """Send a request to a replica that is not in `failed`; waits longer for one begun before.

        Raises NoReplicaError.
        """
        ...


@dataclass
class _Choice:
    token_ids: list[int] = field(default_factory=list)
    is_finished: bool = False


class ResumableEvents:
    """See `serving.messages.Events`; never ends short without a Refused."""

    def __init__(self, replicas: Replicas, request: InferenceRequest, outcomes: Outcomes) -> None:
        self._replicas, self._request, self._outcomes = replicas, request, outcomes
        self._choices = [_Choice() for _ in range(request.total_choices)]
        self._attempt: Attempt | None = None
        self._failed: set[str] = set()
        self._num_losses = 0
        self._has_started = self._is_done = False
        self._is_resumed = False  # The present attempt goes on after tokens of another one.
        self._began_s = time.monotonic()
        self._first_token_s: float | None = None

    def __aiter__(self) -> AsyncIterator[list[Event]]:
        return self

    async def __anext__(self) -> list[Event]:
        """Return what happened since the last call."""
        while not self._is_done:
            try:
                news = self._take(await self._next_batch())
            except (ReplicaLostError, DeclinedError, NoReplicaError) as error:
                news = self._give_up_or_go_on(error)
            except StopAsyncIteration:
                news = self._end_of_attempt()
            if news:
                return news
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel the request unless it has ended."""
        if not self._is_done:
            self._is_done = True
            # What it waits for would have taken at least as long: a version that hangs is slow.
            if self._first_token_s is None:
                self._outcomes.add_first_token(time.monotonic() - self._began_s)
            else:
                self._note_gaps(self._num_tokens)
            if self._attempt is not None:
                attempt, self._attempt = self._attempt, None
                attempt.release()
                await attempt.events.aclose()

    async def _next_batch(self) -> list[Event]:
        if self._attempt is None:
            self._is_resumed = self._has_started
            self._attempt = await self._replicas.attempt(
                self._rest(),
                failed=self._failed,
                is_begun=self._has_started or self._num_losses > 0,
            )
        return await anext(self._attempt.events)

    def _rest(self) -> InferenceRequest:
        """Return what is still to be generated."""
        if not self._has_started:
            return self._request
        return msgspec.structs.replace(
            self._request,
            resumed=tuple(tuple(choice.token_ids) for choice in self._choices),
            finished=tuple(i for i, choice in enumerate(self._choices) if choice.is_finished),
        )

    def _take(self, batch: list[Event]) -> list[Event]:
        """Return the news of a batch: what a second replica repeats is none."""
        news: list[Event] = []
        num_tokens = 0
        for event in batch:
            if isinstance(event, Delta):
                news.append(self._count(event))
                num_tokens += len(event.token_ids)
            elif isinstance(event, Refused):
                return [*news, *self._refuse(event)]
            elif not self._has_started:
                self._has_started = True
                news.append(event)
        if self._attempt is not None:
            self._attempt.deliver(num_tokens)
        if num_tokens and self._first_token_s is None:
            self._first_token_s = time.monotonic()
            self._outcomes.add_first_token(self._first_token_s - self._began_s)
        if all(choice.is_finished for choice in self._choices):
            self._finish(None)  # Now: a reader that has all may not ask again.
        return news

    def _count(self, delta: Delta) -> Delta:
        choice = self._choices[delta.choice]
        is_first = not choice.token_ids
        choice.token_ids += delta.token_ids
        choice.is_finished |= delta.finish_reason is not None
        if delta.cached_tokens and not is_first:
            return msgspec.structs.replace(delta, cached_tokens=0)
        return delta

    def _refuse(self, refused: Refused) -> list[Event]:
        if refused.code == ENGINE_FAILED:
            return self._give_up_or_go_on(EngineLostError(refused.message))
        if self._is_resumed and refused.status < HTTPStatus.INTERNAL_SERVER_ERROR:
            # Another replica took it as it was sent: this is not the client's mistake.
            return self._finish(unavailable(refused.message))
        return self._finish(refused)

    def _give_up_or_go_on(self, error: Exception) -> list[Event]:
        """Forget the replica; return the end of the answer if no other one shall be asked."""
        if isinstance(error, NoReplicaError):
            return self._finish(unavailable(str(error)))
        if self._attempt is not None:
            # A connection that broke may be open again in a moment, and is not asked until then.
            if not isinstance(error, ReplicaLostError):
                self._failed.add(self._attempt.replica)
            self._attempt.release()
            self._attempt = None
        if isinstance(error, DeclinedError):
            return []
        self._num_losses += 1
        _logger.warning("a request lost its replica (loss %d): %s", self._num_losses, error)
        if self._num_losses >= MAX_LOSSES:
            return self._finish(
                unavailable(
                    f"{self._num_losses} replicas failed while they answered this. Try again."
                )
            )
        self._outcomes.num_resumed += 1
        return []

    def _end_of_attempt(self) -> list[Event]:
        # Nothing a replica of ours does; whatever it was, the answer is not cut short silently.
        return self._give_up_or_go_on(EngineLostError("the replica ended an answer too early"))

    def _finish(self, refused: Refused | None) -> list[Event]:
        self._is_done = True
        if self._attempt is not None:
            self._attempt.release()
        self._outcomes.ended(is_failed=refused is not None)
        self._note_gaps(self._num_tokens - 1)
        return [] if refused is None else [refused]

    @property
    def _num_tokens(self) -> int:
        return max(len(choice.token_ids) for choice in self._choices)

    def _note_gaps(self, num_gaps: int) -> None:
        """Count the mean of so many gaps between tokens, of which the last ends now."""
        if self._first_token_s is not None and num_gaps > 0:
            elapsed_s = time.monotonic() - self._first_token_s
            self._outcomes.add_between_tokens(elapsed_s / num_gaps)


def unavailable(message: str) -> Refused:
    """Return the refusal of a request that no replica answers now."""
    return Refused(HTTPStatus.SERVICE_UNAVAILABLE, message, retry_after_s=1)
