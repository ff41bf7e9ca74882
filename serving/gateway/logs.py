"""One line of JSON for each request: who asked, for how much, how it went; not what was said.

Takes a finished call; gives its line. It does not know where lines are kept.
"""

import json
import logging
import sys
from http import HTTPStatus

from serving.gateway.call import Call

_logger = logging.getLogger("raysmith.access")
_QUIET = frozenset({"/healthz", "/readyz", "/metrics"})  # Asked every few seconds.


def start_access_log() -> None:
    """Write requests to the standard error, a line each; for a process that is a gateway."""
    if _logger.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    _logger.addHandler(handler)
    _logger.setLevel(logging.INFO)
    _logger.propagate = False


def log_call(method: str, call: Call, status: int, duration_s: float) -> None:
    """Log one request; a good answer to what monitors ask is not worth a line."""
    if _logger.isEnabledFor(logging.INFO):
        if call.route in _QUIET and status < HTTPStatus.BAD_REQUEST:
            return
        _logger.info("%s", json.dumps(log_document(method, call, status, duration_s)))


def log_document(method: str, call: Call, status: int, duration_s: float) -> dict[str, object]:
    """Return what is said of one request: neither its key nor, unless set so, its prompt."""
    document: dict[str, object] = {
        "request_id": call.request_id,
        "began_at": call.began_at,
        "method": method,
        "route": call.route,
        "status": status,
        "duration_ms": round(duration_s * 1000, 2),
    }
    if call.principal is not None:
        document |= {"team": call.team, "key": call.principal.key_id}
    if call.model is not None:
        document |= {
            "model": call.model.reference,
            "prompt_tokens": call.prompt_tokens,
            "cached_tokens": call.cached_tokens,
            "generated_tokens": call.generated_tokens,
        }
    if call.first_token_s is not None:
        document["first_token_ms"] = round(call.first_token_s * 1000, 2)
    if call.refused is not None:
        # The message may quote the request, so it is named by its code alone.
        document["refused"] = call.refused.code or call.refused.status.phrase
    if call.has_left:
        document["client_left"] = True
    if call.prompt is not None:
        document["prompt"] = call.prompt
    return document
