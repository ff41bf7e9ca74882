"""How long a request may take, and how whatever ends it early becomes a refusal.

Takes work; gives None or why it failed. It does not know what the work is.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from cluster.errors import RaysmithError
from serving.gateway.call import Call
from serving.gateway.errors import REFUSED_FOR_NOW, REFUSED_INTERNALLY, RefusedError
from serving.gateway.limits import GatewayLimits
from serving.messages import Refused

_logger = logging.getLogger(__name__)


def allowed_s(field_s: float | None, header_ms: int | None) -> float | None:
    """Return the time that a client allows, by a field or by a header: the shorter one."""
    given = [field_s, None if header_ms is None else header_ms / 1000]
    return min((seconds for seconds in given if seconds is not None), default=None)


async def attempt(
    work: Callable[[], Awaitable[None]],
    call: Call,
    timeout_s: float | None,
    limits: GatewayLimits,
) -> Refused | None:
    """Run work within its deadline, counted from the request's first byte; return what failed."""
    allowed = min(timeout_s or math.inf, limits.max_timeout_s)
    try:
        async with asyncio.timeout(call.started_s + allowed - time.monotonic()) as deadline:
            await work()
    except RefusedError as error:
        return error.refused
    except TimeoutError:
        if deadline.expired():
            return Refused(
                HTTPStatus.GATEWAY_TIMEOUT,
                f"the answer was not complete after {allowed:g} s. Ask for fewer tokens or allow "
                "more time.",
                code="deadline_exceeded",
            )
        _logger.exception("request %s failed", call.request_id)
    except RaysmithError:
        _logger.exception("request %s could not be accounted for", call.request_id)
        return REFUSED_FOR_NOW
    except Exception:
        _logger.exception("request %s failed", call.request_id)
    else:
        return None
    return REFUSED_INTERNALLY
