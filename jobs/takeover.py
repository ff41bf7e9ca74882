"""Whether a version may take over a name: it answers over REST what its model says.

Takes a version that has come up and the arguments of the gateway before it; raises where too many
greedy answers differ. It asks with a key of its own, which ends with the check. It does not know
what is done about the answer.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from cluster.accounting import ROLLOUT_TEAM, Key, Scope, Team
from cluster.errors import (
    AccountError,
    ConfigError,
    EngineError,
    GateRefusedError,
    LedgerError,
    ModelFormatError,
    TokenizerError,
)
from cluster.ledger import Ledger
from cluster.ledger_address import public_url
from jobs.data.tokenizer import load_tokenizer
from jobs.evaluation.parity import Endpoint, compare, offline_answers
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


def check_takeover(
    entry: Entry, gateway: Mapping[str, Any], route: Mapping[str, Any], min_parity: float
) -> None:
    """Raise GateRefusedError if fewer prompts than this share are answered as they are offline.

    `gateway` are the arguments of its application, which knows the version by `route`. A model that
    the offline reference cannot read (it embeds, or only another engine reads it) is not compared,
    and a warning says so. The model is read once more, into this process.
    """
    prompts, offline = offline_reference(entry, route.get("context_tokens"))
    if not prompts:
        return
    try:
        with endpoint(entry.reference, gateway, _KEY_LIFETIME_S) as served:
            report = compare(prompts, offline, served, max_tokens=MAX_TOKENS)
    except (EngineError, LedgerError, ConfigError) as error:
        raise GateRefusedError(
            f"{entry.reference} could not be compared with its model, and what answered before "
            f"still does: {error.message} The key to ask with was made in the ledger "
            f"{public_url(gateway.get('ledger')) or 'that RAYSMITH_LEDGER names, or yours'}: it "
            "must be the gateway's. Without a comparison: `raysmith serve --min-parity 0`."
        ) from error
    if report.num_equal < min_parity * report.num_prompts:
        first = report.disagreements[0]
        raise GateRefusedError(
            f"{entry.reference} answers {report.num_equal} of {report.num_prompts} prompts as its "
            f"model does offline, and {min_parity:.0%} must be. The first that differs is "
            f"{first.prompt!r}: {first.served!r} instead of {first.offline!r}. What answered "
            "before still does. Look at the version's engine options (a cache in fewer bits "
            "rounds), or allow it with a lower `min_parity`."
        )


def offline_reference(
    entry: Entry,
    context_tokens: int | None,
    asked: Sequence[str] = PROMPTS,
    max_tokens: int = MAX_TOKENS,
) -> tuple[list[str], list[str]]:
    """Return the prompts that fit a version, and their answers; none where there is no reference.

    What is left out is logged. Raises IntegrityError for a damaged model.
    """
    try:
        tokenizer = load_tokenizer(entry.path)
        prompts = [
            prompt
            for prompt in asked
            if context_tokens is None
            or len(tokenizer.encode(prompt)) + max_tokens <= context_tokens
        ]
        if num_long := len(asked) - len(prompts):
            left_out = "%d of %d prompts and their answers do not fit into the %d tokens of %s"
            _logger.warning(left_out, num_long, len(asked), context_tokens, entry.reference)
        if prompts:
            return prompts, offline_answers(entry.path, prompts, max_tokens=max_tokens)
        reason = f"no prompt fits into its {context_tokens} tokens."
    except (ModelFormatError, TokenizerError) as error:
        reason = f"there is no offline reference for it: {error.message}"
    _logger.warning("%s is not compared with its model: %s", entry.reference, reason)
    return [], []


@contextmanager
def endpoint(reference: str, gateway: Mapping[str, Any], lifetime_s: float) -> Iterator[Endpoint]:
    """Yield a version's address, with a key that is revoked in the end and expires anyhow.

    The key's team is ROLLOUT_TEAM, whose requests no statistics of a version count.
    """
    host = gateway.get("host", "127.0.0.1")
    reachable = "127.0.0.1" if host in {"0.0.0.0", "::"} else host
    url = f"http://{reachable}:{gateway['port']}/v1"
    with Ledger.open(gateway.get("ledger")) as ledger:
        with suppress(AccountError):  # There is one, or somebody else has just added it.
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
            yield Endpoint(url, secret, reference)
        finally:
            ledger.revoke_key(key.id)
