"""Routes about the service: models, usage, health, metrics, and the description of the API itself.

Takes a backend and accounts; adds routes to an application. It does not know how models are asked.
"""

from http import HTTPStatus
from itertools import groupby
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from starlette.responses import HTMLResponse, Response

from serving.gateway.accounts import Accounts, Principal
from serving.gateway.backend import Backend
from serving.gateway.call import call_of
from serving.gateway.docs_page import docs_page
from serving.gateway.metrics import GatewayMetrics
from serving.gateway.responses import JsonResponse, RefusalResponse
from serving.gateway.routes_inference import may_ask
from serving.gateway.schemas_answers import Model, ModelList, Usage, answers
from serving.messages import Refused, ServedModel


def add_model_routes(app: FastAPI, backend: Backend) -> None:
    """Add `/v1/models`."""

    @app.get("/v1/models", response_model=None, responses=answers(ModelList))
    async def list_models(request: Request) -> Response:
        """List the models that this key may ask."""
        caller = call_of(request.scope).caller()
        return JsonResponse({"object": "list", "data": _model_documents(backend, caller)})

    @app.get("/v1/models/{name}", response_model=None, responses=answers(Model))
    async def get_model(name: str, request: Request) -> Response:
        """Describe one model, by `name` or `name@version`."""
        caller = call_of(request.scope).caller()
        documents = _model_documents(backend, caller)
        for document in documents:
            if name == document["id"] or name in document["versions"]:
                return JsonResponse(document)
        known = ", ".join(f"`{document['id']}`" for document in documents) or "none"
        message = f"no model `{name}` is served to you; there is: {known}."
        return RefusalResponse(Refused(HTTPStatus.NOT_FOUND, message, code="model_not_found"))


def add_usage_route(app: FastAPI, accounts: Accounts) -> None:
    """Add `/v1/usage`."""

    @app.get("/v1/usage", response_model=None, responses=answers(Usage))
    async def get_usage(
        request: Request,
        team: Annotated[
            str | None,
            Query(min_length=1, max_length=128, description="Another team (administrators only)."),
        ] = None,
    ) -> Response:
        """Show a team's limits, budget and use of the current month."""
        return JsonResponse(await accounts.usage(team or call_of(request.scope).team))


def add_operation_routes(app: FastAPI, backend: Backend, metrics: GatewayMetrics) -> None:
    """Add health, readiness, metrics and the description of the API."""

    @app.get("/healthz", responses=answers(None))
    async def is_alive() -> dict[str, str]:
        """Say that the gateway runs."""
        return {"status": "ok"}

    @app.get("/readyz", response_model=None, responses=answers(None))
    async def is_ready(request: Request) -> Response:
        """Say whether models can be asked now, and which of them this key's team may ask."""
        problem = await backend.problem()
        if problem is not None:
            return RefusalResponse(problem)
        caller = call_of(request.scope).caller()
        references = [model.reference for model in backend.models() if may_ask(caller, model)]
        return JsonResponse({"status": "ready", "models": references})

    @app.get("/metrics", response_model=None, responses=answers(None, media="text/plain"))
    async def show_metrics() -> Response:
        """Give all numbers in Prometheus' text format."""
        return Response(metrics.page(), media_type="text/plain; version=0.0.4")

    @app.get("/openapi.json", response_model=None, responses=answers(None))
    async def describe() -> Response:
        """Describe this API in OpenAPI."""
        return JsonResponse(app.openapi())

    @app.get("/docs", response_model=None, responses=answers(None, media="text/html"))
    async def show_docs() -> Response:
        """Describe this API in a page without scripts."""
        return HTMLResponse(docs_page(app.openapi()))


def _model_documents(backend: Backend, caller: Principal) -> list[dict[str, Any]]:
    """Return a document for each name; its versions share it by weights that change."""

    def name(model: ServedModel) -> str:
        return model.name

    allowed = sorted((m for m in backend.models() if may_ask(caller, m)), key=name)
    return [_model_document(list(versions)) for _, versions in groupby(allowed, key=name)]


def _model_document(versions: list[ServedModel]) -> dict[str, Any]:
    newest = max(versions, key=lambda model: model.published_s)
    return {
        "id": newest.name,
        "object": "model",
        "created": newest.published_s,
        "owned_by": "raysmith",
        "root": newest.reference,
        "versions": [model.reference for model in versions],
        "task": newest.task,
        "max_model_len": newest.context_tokens,
    }
