"""How much work is accepted at a time: a hard bound, past it a refusal at once.

Counts choices (sequences to generate), since each of them holds a place in an engine. It does not
know what they are.
"""

from dataclasses import dataclass
from http import HTTPStatus

from serving.gateway.errors import RefusedError
from serving.messages import Refused

MAX_TIMEOUT_S = 600
_RETRY_AFTER_S = 1
# The last quarter of all places is for teams that hold less than an equal share of them, so that
# one team's burst does not shut out the others.
_SHARED_PART = 4


@dataclass(frozen=True)
class GatewayLimits:
    """Bounds of one gateway, and what it logs."""

    max_accepted_choices: int = 128
    max_body_bytes: int = 4 * 2**20
    body_timeout_s: float = 10.0  # To receive a whole body.
    max_headers: int = 64
    max_header_bytes: int = 16 * 2**10
    max_json_depth: int = 64
    max_timeout_s: float = MAX_TIMEOUT_S  # To answer; clients may ask for less.
    max_stall_s: float = 60.0  # For a client that stops reading its stream.
    keep_alive_s: float = 5.0  # Between comments in a stream that waits.
    answer_tokens: int = 4096  # Reserved where neither the request nor the model bounds an answer.
    ticket_lifetime_s: float = 30.0
    max_tickets: int = 1024
    max_ticket_bytes: int = 64 * 2**20  # Of all bodies that wait behind tickets.
    is_logging_prompts: bool = False


class Place:
    """Room for one request; it starts with one choice."""

    def __init__(self, admission: "Admission", team: str) -> None:
        self._admission, self._team, self._num_choices = admission, team, 0
        self.grow(1)

    def grow(self, num_choices: int) -> None:
        """Hold so many choices in all.

        Raises RefusedError: 400 if there will never be so many, 429 if there are not now.
        """
        self._admission.take(self._team, num_choices, num_choices - self._num_choices)
        self._num_choices = num_choices

    def leave(self) -> None:
        """Give everything back; calling it again does nothing."""
        self._admission.give(self._team, self._num_choices)
        self._num_choices = 0


class Admission:
    """Places for accepted work; used on one event loop."""

    def __init__(self, limit: int) -> None:
        assert limit > 0, f"limit={limit} must be positive"
        self.limit = limit
        self.largest = limit - limit // _SHARED_PART
        self.num_accepted = 0
        self._held: dict[str, int] = {}

    def enter(self, team: str) -> Place:
        """Return a place with one choice, or raise RefusedError (429)."""
        return Place(self, team)

    def take(self, team: str, num_choices: int, num_more: int) -> None:
        """Count `num_more` choices of a request that then has `num_choices`; none need no room."""
        if num_choices > self.largest:
            raise RefusedError(
                Refused(
                    HTTPStatus.BAD_REQUEST,
                    f"the request asks for {num_choices} choices; this server takes at most "
                    f"{self.largest}. Lower `n` or send fewer prompts.",
                    param="n",
                )
            )
        if num_more > 0 and not self._has_room(team, num_more):
            raise RefusedError(
                Refused(
                    HTTPStatus.TOO_MANY_REQUESTS,
                    f"{self.num_accepted} of {self.limit} choices are being generated, and this "
                    f"request asks for {num_more} more. Try again in a moment.",
                    code="too_many_requests",
                    retry_after_s=_RETRY_AFTER_S,
                )
            )
        self.num_accepted += num_more
        self._held[team] = self._held.get(team, 0) + num_more

    def give(self, team: str, num_choices: int) -> None:
        """Count choices that ended."""
        self.num_accepted -= num_choices
        left = self._held.get(team, 0) - num_choices
        if left > 0:
            self._held[team] = left
        else:
            self._held.pop(team, None)

    def _has_room(self, team: str, num_more: int) -> bool:
        total = self.num_accepted + num_more
        if total <= self.largest:
            return True
        num_teams = len(self._held.keys() | {team})
        share = self.limit // (num_teams + 1)  # One more, so that a newcomer finds room.
        return total <= self.limit and self._held.get(team, 0) + num_more <= share
