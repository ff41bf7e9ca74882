"""Routes that ask models: completions, chats, embeddings, and streams for browsers.

Takes a backend and accounts; adds routes to an application. It does not know keys or how answers
are made.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Annotated

import msgspec
from fastapi import Body as BodyParameter
from fastapi import FastAPI, Header, Request
from starlette.responses import Response

from serving.gateway.access import authenticate
from serving.gateway.accounts import Accounts, Principal
from serving.gateway.answering import Answering, Question
from serving.gateway.backend import Backend
from serving.gateway.call import Call, call_of
from serving.gateway.deadlines import allowed_s
from serving.gateway.embedding import Embedding, EmbeddingQuestion
from serving.gateway.errors import RefusedError
from serving.gateway.examples import CHATS, COMPLETIONS, EMBEDDINGS, EVENT_STREAMS, request_examples
from serving.gateway.limits import MAX_TIMEOUT_S, Admission, GatewayLimits
from serving.gateway.rendering import Rendering
from serving.gateway.rendering_chat import ChatRendering
from serving.gateway.rendering_completion import CompletionRendering
from serving.gateway.responses import JsonResponse
from serving.gateway.rules import RULES, forbidden
from serving.gateway.schemas_answers import (
    ChatCompletion,
    Completion,
    Embeddings,
    EventStream,
    answers,
)
from serving.gateway.schemas_chat import ChatCompletionRequest
from serving.gateway.schemas_completion import CompletionRequest
from serving.gateway.schemas_embeddings import EmbeddingsRequest
from serving.gateway.schemas_streams import EventStreamRequest
from serving.gateway.tickets import Held, Tickets
from serving.gateway.tool_calls import CallReading
from serving.messages import Refused, ServedModel, Task

_MOST_MS = 1000 * MAX_TIMEOUT_S
_MOST_LOGGED_CHARACTERS = 10_000
DeadlineMs = Annotated[
    int | None,
    Header(
        alias="x-deadline-ms", ge=1, le=_MOST_MS, description="Give up after so many milliseconds."
    ),
]
# A ticket is a secret that only its holder has, and it works once: any page may read its stream.
_CROSS_ORIGIN = ((b"access-control-allow-origin", b"*"),)
BAD_TICKET = Refused(
    HTTPStatus.UNAUTHORIZED,
    "this address was not given out, was read before or is too old. Ask for another one: POST "
    "/v1/event-streams.",
    code="invalid_ticket",
)


@dataclass(frozen=True)
class InferenceService:
    """What the routes need."""

    backend: Backend
    accounts: Accounts
    limits: GatewayLimits
    admission: Admission
    answering: Answering
    embedding: Embedding
    tickets: Tickets


def add_inference_routes(app: FastAPI, service: InferenceService) -> None:
    """Add `/v1/completions`, `/v1/chat/completions` and `/v1/embeddings`."""

    @app.post(
        "/v1/completions",
        response_model=None,
        responses=answers(Completion, is_stream=True),
        openapi_extra=request_examples(COMPLETIONS),
    )
    async def complete(
        body: CompletionRequest, request: Request, deadline_ms: DeadlineMs = None
    ) -> Response:
        """Continue one or several prompts."""
        call = call_of(request.scope)
        return _answer(service, call, _question(service, body, call.caller(), deadline_ms))

    @app.post(
        "/v1/chat/completions",
        response_model=None,
        responses=answers(ChatCompletion, is_stream=True),
        openapi_extra=request_examples(CHATS),
    )
    async def chat(
        body: ChatCompletionRequest, request: Request, deadline_ms: DeadlineMs = None
    ) -> Response:
        """Answer a conversation, perhaps by calling tools."""
        call = call_of(request.scope)
        return _answer(service, call, _question(service, body, call.caller(), deadline_ms))

    @app.post(
        "/v1/embeddings",
        response_model=None,
        responses=answers(Embeddings),
        openapi_extra=request_examples(EMBEDDINGS),
    )
    async def embed(
        body: EmbeddingsRequest, request: Request, deadline_ms: DeadlineMs = None
    ) -> Response:
        """Embed texts or token ids."""
        call = call_of(request.scope)
        question = EmbeddingQuestion(
            model=find_model(service.backend, call.caller(), body.model, "embed"),
            embedding=body.embedding(),
            is_base64=body.encoding_format == "base64",
            timeout_s=allowed_s(body.timeout_s, deadline_ms),
        )
        return service.embedding.response(question, call)


def add_event_stream_routes(app: FastAPI, service: InferenceService) -> None:
    """Add `/v1/event-streams`: answers for readers that can only GET an address."""

    @app.post(
        "/v1/event-streams",
        status_code=HTTPStatus.CREATED,
        response_model=None,
        responses=answers(EventStream, status=HTTPStatus.CREATED),
        openapi_extra=request_examples(EVENT_STREAMS),
    )
    async def make_event_stream(
        body: Annotated[EventStreamRequest, BodyParameter()],
        request: Request,
        deadline_ms: DeadlineMs = None,
    ) -> Response:
        """Get a one-time address at which a browser's EventSource reads the answer.

        A deadline counts from when it is read.
        """
        call = call_of(request.scope)
        question = _question(service, body.body, call.caller(), deadline_ms)
        question = replace(question, is_stream=True, headers=_CROSS_ORIGIN)
        ticket = service.tickets.issue(question, call)
        document = {
            "object": "event_stream",
            "url": f"/v1/event-streams/{ticket}",
            "expires_in_s": service.limits.ticket_lifetime_s,
        }
        return JsonResponse(document, HTTPStatus.CREATED)

    @app.get(
        "/v1/event-streams/{ticket}",
        response_model=None,
        responses=answers(None, is_stream=True),
    )
    async def read_event_stream(
        ticket: str,
        request: Request,
        last_event_id: Annotated[
            str | None, Header(alias="last-event-id", description="Not supported.")
        ] = None,
    ) -> Response:
        """Read an answer once, or again where `Retry-After` says so; a stream is not resumed."""
        if last_event_id is not None:
            message = "streams are not replayed: ask again for a new one, without `Last-Event-ID`."
            raise RefusedError(Refused(HTTPStatus.BAD_REQUEST, message, code="no_replay"))
        held = service.tickets.redeem(ticket)
        if held is None:
            raise RefusedError(BAD_TICKET)

        def keep(refused: Refused) -> None:
            if refused.retry_after_s is not None:
                service.tickets.put_back(ticket, held)

        call = call_of(request.scope)
        try:
            await _admit(service, call, held)
        except RefusedError as error:
            keep(error.refused)
            raise
        return _answer(service, call, held.question, keep)


async def _admit(service: InferenceService, call: Call, held: Held) -> None:
    """Check the key behind a ticket again: it may have been revoked since."""
    call.principal = await authenticate(service.accounts, held.secret)
    refused = forbidden(RULES["POST", "/v1/event-streams"], call.principal, b"")
    if refused is not None:
        raise RefusedError(refused)
    find_model(service.backend, call.principal, held.question.model.reference, "generate")
    call.place = service.admission.enter(call.team)


def find_model(backend: Backend, caller: Principal, asked: str, task: Task) -> ServedModel:
    """Return the model that answers.

    Raises RefusedError: 404 that lists what the caller may ask, 400 for a model of another task.
    """
    model = backend.choose(asked)
    if model is None or not may_ask(caller, model):
        known = sorted({m.name for m in backend.models() if may_ask(caller, m)})
        listed = ", ".join(f"`{name}`" for name in known) or "none"
        message = f"no model `{asked}` is served to you; there is: {listed}."
        raise RefusedError(
            Refused(HTTPStatus.NOT_FOUND, message, code="model_not_found", param="model")
        )
    if model.task != task:
        route = "/v1/embeddings" if model.task == "embed" else "/v1/chat/completions"
        message = f"model `{model.name}` does not {task}. Use it with {route}."
        raise RefusedError(Refused(HTTPStatus.BAD_REQUEST, message, param="model"))
    return model


def may_ask(caller: Principal, model: ServedModel) -> bool:
    """Return whether a caller may ask this model."""
    return caller.models is None or model.name in caller.models


def _question(
    service: InferenceService,
    body: CompletionRequest | ChatCompletionRequest,
    caller: Principal,
    deadline_ms: int | None,
) -> Question:
    return Question(
        model=find_model(service.backend, caller, body.model, "generate"),
        inference=body.inference(),
        rendering=_rendering(body),
        is_stream=bool(body.stream),
        includes_usage=body.includes_usage,
        has_token_ids=bool(body.return_token_ids),
        timeout_s=allowed_s(body.timeout_s, deadline_ms),
    )


def _rendering(body: CompletionRequest | ChatCompletionRequest) -> Rendering:
    if isinstance(body, CompletionRequest):
        return CompletionRendering()
    if not body.may_call:
        return ChatRendering()
    is_single = body.parallel_tool_calls is False
    return ChatRendering(CallReading(body.is_call_forced, is_single))


def _answer(
    service: InferenceService,
    call: Call,
    question: Question,
    on_refused: Callable[[Refused], None] = lambda refused: None,
) -> Response:
    if service.limits.is_logging_prompts:
        text = msgspec.json.encode(question.inference.prompts).decode()
        call.prompt = text[:_MOST_LOGGED_CHARACTERS]
    return service.answering.response(question, call, on_refused)
