"""The REST API: routes of the OpenAI API over a backend, with health and metrics beside them.

Takes a backend, keys and bounds; gives an ASGI application. It does not know Ray or engines.
"""

import logging
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from serving.gateway import errors
from serving.gateway.answering import REFUSED_INTERNALLY, Answering, Question
from serving.gateway.auth import KeyRing
from serving.gateway.backend import Backend
from serving.gateway.errors import RefusedError
from serving.gateway.limits import Admission
from serving.gateway.metrics import GatewayMetrics
from serving.gateway.middleware import Authentication, Bounds, Counting
from serving.gateway.rendering import ChatRendering, CompletionRendering, Rendering
from serving.gateway.schemas import ChatCompletionRequest, CompletionRequest
from serving.messages import Refused, ServedModel

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GatewayLimits:
    """Bounds of one gateway."""

    max_accepted_choices: int = 128
    max_body_bytes: int = 4 * 2**20


def create_app(backend: Backend, keys: KeyRing, limits: GatewayLimits) -> ASGIApp:
    """Return the application; the outermost layer counts, the next ones refuse early."""
    admission = Admission(limits.max_accepted_choices)
    metrics = GatewayMetrics(admission)
    # No pages of interactive documentation: they load scripts from elsewhere.
    app = FastAPI(title="Raysmith", docs_url=None, redoc_url=None)
    app.include_router(_inference_routes(backend, Answering(backend, admission, metrics)))
    app.include_router(_operation_routes(backend, metrics))
    _render_errors(app)
    app.add_middleware(Bounds, max_body_bytes=limits.max_body_bytes)
    app.add_middleware(Authentication, keys=keys)
    app.add_middleware(Counting, metrics=metrics)
    return app


def _inference_routes(backend: Backend, answering: Answering) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    async def list_models() -> dict[str, Any]:
        models = [_model_document(model) for model in backend.models()]
        return {"object": "list", "data": models}

    @router.get("/models/{name}")
    async def get_model(name: str) -> dict[str, Any]:
        return _model_document(_find_model(backend, name))

    @router.post("/completions", response_model=None)
    async def complete(body: CompletionRequest) -> Response:
        return answering.response(_question(backend, body, CompletionRendering()))

    @router.post("/chat/completions", response_model=None)
    async def chat(body: ChatCompletionRequest) -> Response:
        return answering.response(_question(backend, body, ChatRendering()))

    return router


def _operation_routes(backend: Backend, metrics: GatewayMetrics) -> APIRouter:
    router = APIRouter()

    @router.get("/healthz")
    async def is_alive() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/readyz", response_model=None)
    async def is_ready() -> Response:
        problem = await backend.problem()
        if problem is not None:
            return errors.response(problem)
        references = [model.reference for model in backend.models()]
        return JSONResponse({"status": "ready", "models": references})

    @router.get("/metrics", response_model=None)
    async def show_metrics() -> Response:
        return Response(metrics.page(), media_type="text/plain; version=0.0.4")

    return router


def _question(
    backend: Backend, body: CompletionRequest | ChatCompletionRequest, rendering: Rendering
) -> Question:
    return Question(
        model=_find_model(backend, body.model),
        inference=body.inference(),
        rendering=rendering,
        is_stream=bool(body.stream),
        includes_usage=body.includes_usage,
        has_token_ids=bool(body.return_token_ids),
    )


def _find_model(backend: Backend, asked: str) -> ServedModel:
    """Return the model of this name or name@version, or raise RefusedError that lists them."""
    for model in backend.models():
        if asked in (model.name, model.reference):
            return model
    known = ", ".join(f"`{model.name}`" for model in backend.models())
    message = f"no model `{asked}` is served here; there is: {known}."
    raise RefusedError(
        Refused(HTTPStatus.NOT_FOUND, message, code="model_not_found", param="model")
    )


def _model_document(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.published_s,
        "owned_by": "raysmith",
        "root": model.reference,
    }


def _render_errors(app: FastAPI) -> None:
    @app.exception_handler(RefusedError)
    async def on_refused(request: Request, error: RefusedError) -> Response:
        del request
        return errors.response(error.refused)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        del request
        return errors.response(errors.from_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        status = HTTPStatus(error.status_code)
        message = f"{request.method} {request.url.path}: {error.detail}."
        answer = errors.response(Refused(status, message))
        answer.headers.update(error.headers or {})  # 405 has to say which methods there are.
        return answer

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        _logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return errors.response(REFUSED_INTERNALLY)
