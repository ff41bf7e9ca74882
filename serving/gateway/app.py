"""The REST API: routes of the OpenAI API over a backend, with health and metrics beside them.

Takes a backend, accounts and bounds; gives an ASGI application. It does not know Ray or engines.
"""

import logging
from http import HTTPStatus
from importlib.metadata import version

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from cluster.errors import RaysmithError
from serving.gateway import errors
from serving.gateway.access import AccessControl
from serving.gateway.accounts import Accounts
from serving.gateway.answering import Answering
from serving.gateway.backend import Backend
from serving.gateway.call import call_of
from serving.gateway.embedding import Embedding
from serving.gateway.errors import RefusedError
from serving.gateway.hardening import CleanHeaders, WholeBodies
from serving.gateway.limits import Admission, GatewayLimits
from serving.gateway.metrics import GatewayMetrics
from serving.gateway.observing import Observing
from serving.gateway.openapi import GatewayApi
from serving.gateway.responses import RefusalResponse
from serving.gateway.routes_inference import (
    InferenceService,
    add_event_stream_routes,
    add_inference_routes,
)
from serving.gateway.routes_operation import (
    add_model_routes,
    add_operation_routes,
    add_usage_route,
)
from serving.gateway.rules import check_rules
from serving.gateway.telemetry import Tracer, make_tracer
from serving.gateway.tickets import Tickets
from serving.messages import Refused

_logger = logging.getLogger(__name__)
_DESCRIPTION = (
    "The OpenAI API over compressed models. Send `Authorization: Bearer KEY` with every request."
)


def create_app(
    backend: Backend, accounts: Accounts, limits: GatewayLimits, *, tracer: Tracer | None = None
) -> FastAPI:
    """Return the ASGI application; raises AssertionError if a route has no rule.

    From outside in, its layers see everything, clean headers, check keys and the bound on work,
    and read bodies; each refuses before the next one spends anything. `tracer` None: as the
    environment says. Raises ConfigError for a trace exporter that is not installed.
    """
    admission = Admission(limits.max_accepted_choices)
    metrics = GatewayMetrics(admission, backend.stats)
    service = InferenceService(
        backend=backend,
        accounts=accounts,
        limits=limits,
        admission=admission,
        answering=Answering(backend, accounts, limits, metrics),
        embedding=Embedding(backend, accounts, limits),
        tickets=Tickets(limits),
    )
    # FastAPI's own pages are off: they load scripts from elsewhere and would need no key.
    app = GatewayApi(
        title="Raysmith",
        version=version("raysmith"),
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    add_inference_routes(app, service)
    add_event_stream_routes(app, service)
    add_model_routes(app, backend)
    add_usage_route(app, accounts)
    add_operation_routes(app, backend, metrics)
    check_rules(app.routes)
    _render_errors(app)
    # The last one added is the outermost.
    app.add_middleware(WholeBodies, limits=limits)
    app.add_middleware(AccessControl, routes=app.routes, accounts=accounts, admission=admission)
    app.add_middleware(CleanHeaders, limits=limits)
    app.add_middleware(Observing, metrics=metrics, tracer=tracer or make_tracer())
    return app


def _render_errors(app: FastAPI) -> None:
    @app.exception_handler(RefusedError)
    async def on_refused(request: Request, error: RefusedError) -> Response:
        del request
        return RefusalResponse(error.refused)

    @app.exception_handler(RaysmithError)
    async def on_failure(request: Request, error: RaysmithError) -> Response:
        _logger.error("%s failed: %s", call_of(request.scope).route, error.message)
        return RefusalResponse(errors.REFUSED_FOR_NOW)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        del request
        return RefusalResponse(errors.from_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        status = HTTPStatus(error.status_code)
        path = errors.shorten(request.url.path)
        answer = RefusalResponse(Refused(status, f"{request.method} {path}: {error.detail}."))
        answer.headers.update(error.headers or {})  # 405 has to say which methods there are.
        return answer
