"""Whether a version may take over a name: it answers over REST what its model says.

Takes a version that has come up and the arguments of the gateway before it; raises where too many
greedy answers differ. It asks with a key of its own, which ends with the check. It does not know
what is done about the answer.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cluster.accounting import ROLLOUT_TEAM, Key, Scope, Team
from cluster.errors import AccountError, GateRefusedError, ModelFormatError
from cluster.ledger import Ledger
from jobs.evaluation.parity import Endpoint, check_parity
from jobs.models._hf import from_hf_config, read_config
from jobs.registry import Entry

_logger = logging.getLogger(__name__)
# Short, and of several kinds of text, so that few prompts reach much of a model.
PROMPTS = (
    "def read_lines(path):",
    "The capital of France is",
    "import json\n\n",
    "Once upon a time",
    "class Stack:\n    def __init__(self):",
    "1, 2, 3, 4,",
    "Dear customer,",
    "for i in range(10):",
    "In this paper we show",
    "SELECT name FROM",
    "To be, or not to be:",
    "Q: What is 2 + 2?\nA:",
    "raise ValueError(",
    "The quick brown fox",
    "# Installation\n\n",
    "if __name__ == ",
)
MAX_TOKENS = 16  # of each answer
_KEY_LIFETIME_S = 3600.0


def check_takeover(entry: Entry, gateway: Mapping[str, Any], min_parity: float) -> None:
    """Raise GateRefusedError if fewer prompts than this share are answered as they are offline.

    `gateway` are the arguments of its application, whose routes must know the version. A model
    that only another engine than ours reads is not compared, and a warning says so. Raises
    EngineError if a prompt is refused.
    """
    try:
        from_hf_config(read_config(entry.path))
    except ModelFormatError as error:
        _logger.warning(
            "%s takes over without a comparison, as there is no offline reference for it: %s",
            entry.reference,
            error.message,
        )
        return
    with endpoint(entry, gateway, _KEY_LIFETIME_S) as served:
        report = check_parity(entry.path, served, PROMPTS, max_tokens=MAX_TOKENS)
    if report.num_equal < min_parity * report.num_prompts:
        first = report.disagreements[0]
        raise GateRefusedError(
            f"{entry.reference} answers {report.num_equal} of {report.num_prompts} prompts as its "
            f"model does offline, and {min_parity:.0%} must be. The first that differs is "
            f"{first.prompt!r}: {first.served!r} instead of {first.offline!r}. Look at its engine "
            "options (a cache in fewer bits rounds), or allow it with a lower `min_parity`."
        )


@contextmanager
def endpoint(entry: Entry, gateway: Mapping[str, Any], lifetime_s: float) -> Iterator[Endpoint]:
    """Yield a version's address, with a key that is revoked in the end and expires anyhow.

    The key's team is ROLLOUT_TEAM, whose requests no statistics of a version count.
    """
    host = gateway.get("host", "127.0.0.1")
    reachable = "127.0.0.1" if host in {"0.0.0.0", "::"} else host
    url = f"http://{reachable}:{gateway['port']}/v1"
    with Ledger.open(gateway.get("ledger")) as ledger:
        try:
            ledger.team(ROLLOUT_TEAM)
        except AccountError:
            ledger.add_team(Team(name=ROLLOUT_TEAM))
        key, secret = ledger.new_key(
            Key(
                id="",
                team=ROLLOUT_TEAM,
                label="rollout",
                scopes=frozenset({Scope.INFERENCE}),
                expires_s=int(time.time() + lifetime_s),
            )
        )
        try:
            yield Endpoint(url, secret, entry.reference)
        finally:
            ledger.revoke_key(key.id)
