"""Two versions of a model asked the same prompts, a few at a time, for as long as a canary lasts.

Takes an endpoint and the versions; counts how often their greedy answers differ. It does not know
what follows from that.
"""

from collections.abc import Sequence
from enum import Enum, auto
from itertools import cycle, islice

import httpx

from jobs.evaluation.parity import Endpoint

_ASK_TIMEOUT_S = 5.0
_AT_A_TIME = 2


class _Missing(Enum):
    """Why there is no answer: the gateway took no request, or the version failed."""

    BUSY = auto()
    FAILED = auto()


class Comparison:
    """Compares the answers of `old` and `new`, as `name@version`."""

    def __init__(
        self, endpoint: Endpoint, old: str, new: str, prompts: Sequence[str], max_tokens: int
    ) -> None:
        self._endpoint, self._old, self._new = endpoint, old, new
        self._max_tokens = max_tokens
        self._prompts = cycle(prompts)
        self.num_compared = self.num_disagreeing = 0

    def ask_some(self) -> None:
        """Ask both versions the next prompts.

        Where the old one answers and the new one fails or takes too long, they disagree; where the
        gateway has no room, nothing is known.
        """
        with httpx.Client(timeout=_ASK_TIMEOUT_S, trust_env=False) as client:
            for prompt in islice(self._prompts, _AT_A_TIME):
                old, new = (self._ask(client, model, prompt) for model in (self._old, self._new))
                if isinstance(old, str) and new is not _Missing.BUSY:
                    self.num_compared += 1
                    self.num_disagreeing += old != new

    def _ask(self, client: httpx.Client, model: str, prompt: str) -> str | _Missing:
        body = {"model": model, "prompt": prompt, "max_tokens": self._max_tokens, "temperature": 0}
        headers = {"Authorization": f"Bearer {self._endpoint.api_key}"}
        url = f"{self._endpoint.base_url}/completions"
        try:
            response = client.post(url, headers=headers, json=body)
        except httpx.TimeoutException:
            return _Missing.FAILED
        except httpx.HTTPError:
            return _Missing.BUSY
        if response.status_code == httpx.codes.TOO_MANY_REQUESTS:
            return _Missing.BUSY
        if response.status_code != httpx.codes.OK:
            return _Missing.FAILED
        return str(response.json()["choices"][0]["text"])
