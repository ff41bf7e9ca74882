"""How much work is accepted at a time: a hard bound, past it a refusal at once.

Counts choices (sequences to generate), since each of them holds a place in an engine. It does not
know what they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

from serving.gateway.errors import RefusedError
from serving.messages import Refused

_RETRY_AFTER_S = 1


class Admission:
    """Places for accepted work; used on one event loop."""

    def __init__(self, limit: int) -> None:
        assert limit > 0, f"limit={limit} must be positive"
        self.limit = limit
        self.num_accepted = 0

    @contextmanager
    def hold(self, num_choices: int) -> Iterator[None]:
        """Hold places for as long as the block runs.

        Raises RefusedError: 400 if there will never be so many, 429 if there are not now.
        """
        if num_choices > self.limit:
            raise RefusedError(
                Refused(
                    HTTPStatus.BAD_REQUEST,
                    f"the request asks for {num_choices} choices; this server takes at most "
                    f"{self.limit}. Lower `n` or send fewer prompts.",
                    param="n",
                )
            )
        if self.num_accepted + num_choices > self.limit:
            raise RefusedError(
                Refused(
                    HTTPStatus.TOO_MANY_REQUESTS,
                    f"{self.num_accepted} of {self.limit} choices are being generated, and this "
                    f"request asks for {num_choices}. Try again in a moment.",
                    code="too_many_requests",
                    retry_after_s=_RETRY_AFTER_S,
                )
            )
        self.num_accepted += num_choices
        try:
            yield
        finally:
            self.num_accepted -= num_choices
