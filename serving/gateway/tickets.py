"""One-time addresses for readers that cannot send headers, such as a browser's EventSource.

Takes a question and the key that asked it; gives a ticket, and both back once. It does not know
HTTP. Tickets live in this process, and only for seconds.
"""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from serving.gateway.answering import Question
from serving.gateway.call import Call
from serving.gateway.errors import RefusedError
from serving.gateway.limits import GatewayLimits
from serving.messages import Refused

# One team must not take the tickets of all, nor the bytes.
_TEAMS_PART = 4


@dataclass(frozen=True)
class Held:
    """What waits behind a ticket; the key is checked again when it is used."""

    question: Question
    secret: str
    team: str
    num_bytes: int
    until_s: float


class Tickets:
    """Tickets of one gateway; used on one event loop."""

    def __init__(self, limits: GatewayLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._held: dict[str, Held] = {}  # The oldest first, since all live equally long.

    def issue(self, question: Question, call: Call) -> str:
        """Return a new ticket. Raises RefusedError (429) if too many wait to be used."""
        self._drop_expired()
        reason = self._why_not(call.team, call.body_bytes)
        if reason is not None:
            raise RefusedError(
                Refused(
                    HTTPStatus.TOO_MANY_REQUESTS,
                    reason,
                    code="too_many_requests",
                    retry_after_s=round(self._limits.ticket_lifetime_s),
                )
            )
        ticket = secrets.token_urlsafe(32)
        until_s = self._clock() + self._limits.ticket_lifetime_s
        self._held[ticket] = Held(question, call.secret, call.team, call.body_bytes, until_s)
        return ticket

    def redeem(self, ticket: str) -> Held | None:
        """Return what a ticket stands for, once; None if it is unknown, used or expired."""
        self._drop_expired()
        return self._held.pop(ticket, None)

    def put_back(self, ticket: str, held: Held) -> None:
        """Let a redeemed ticket be used once more until its own end."""
        held_by_end = sorted({**self._held, ticket: held}.items(), key=lambda item: item[1].until_s)
        self._held = dict(held_by_end)

    def _why_not(self, team: str, num_bytes: int) -> str | None:
        """Return which bound one more ticket would pass, or None."""
        of_all = [held.num_bytes for held in self._held.values()]
        of_team = [held.num_bytes for held in self._held.values() if held.team == team]
        limits = self._limits
        bounds = (
            (
                "your team",
                of_team,
                limits.max_tickets // _TEAMS_PART,
                limits.max_ticket_bytes // _TEAMS_PART,
            ),
            ("all teams", of_all, limits.max_tickets, limits.max_ticket_bytes),
        )
        for whose, waiting, most, most_bytes in bounds:
            if len(waiting) >= most:
                return (
                    f"{len(waiting)} event streams of {whose} wait to be read, at most {most} may. "
                    "Read them or wait until they expire."
                )
            if sum(waiting) + num_bytes > most_bytes:
                return (
                    f"event streams of {whose} that wait to be read hold {sum(waiting)} bytes and "
                    f"this one has {num_bytes}, at most {most_bytes} may wait. Read them or wait "
                    "until they expire."
                )
        return None

    def _drop_expired(self) -> None:
        now_s = self._clock()
        while self._held:
            oldest = next(iter(self._held))
            if self._held[oldest].until_s > now_s:
                return
            del self._held[oldest]
