"""From an accepted embedding request to bytes.

Takes a request; gives an ASGI response. It does not know the OpenAI schemas or encoders.
"""

import base64
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.gateway.accounts import Accounts, Spent
from serving.gateway.backend import Backend
from serving.gateway.call import Call
from serving.gateway.deadlines import attempt
from serving.gateway.errors import RefusedError
from serving.gateway.limits import GatewayLimits
from serving.gateway.reserving import most_embedding_tokens
from serving.gateway.responses import JsonResponse, RefusalResponse
from serving.gateway.streams import run_while_connected
from serving.messages import Embedded, EmbeddingRequest, Refused, ServedModel


@dataclass(frozen=True)
class EmbeddingQuestion:
    """One request: what is to be embedded by which model, and how vectors are written."""

    model: ServedModel
    embedding: EmbeddingRequest
    is_base64: bool = False
    timeout_s: float | None = None


class Embedding:
    """Answers with vectors, on the callers' accounts."""

    def __init__(self, backend: Backend, accounts: Accounts, limits: GatewayLimits) -> None:
        self._backend, self._accounts, self._limits = backend, accounts, limits

    def response(self, question: EmbeddingQuestion, call: Call) -> Response:
        """Return a response that works when it is sent, and stops when the client leaves."""
        return _EmbeddingAnswer(self, question, call)

    async def send(
        self, question: EmbeddingQuestion, call: Call, connection: tuple[Scope, Receive, Send]
    ) -> None:
        """Send the answer, or why there is none."""

        response: Response | None = None

        async def answer() -> None:
            nonlocal response
            response = JsonResponse(_document(question, await self._embed(question, call)))

        refused = await attempt(answer, call, question.timeout_s, self._limits)
        if refused is not None:
            response = RefusalResponse(refused)
        assert response is not None, "work that was not refused has an answer"
        await response(*connection)

    async def _embed(self, question: EmbeddingQuestion, call: Call) -> Embedded:
        call.model = model = question.model
        most = most_embedding_tokens(model, question.embedding)
        reservation = await self._accounts.reserve(call.caller(), most, 1)
        spent = None
        try:
            asked = msgspec.structs.replace(
                question.embedding, request_id=call.request_id, team=call.team
            )
            answer = await self._backend.embed(model, asked)
            if isinstance(answer, Refused):
                raise RefusedError(answer)
            call.prompt_tokens = answer.prompt_tokens
            spent = Spent(model.name, model.version, answer.prompt_tokens, 0)
            return answer
        finally:
            reservation.settle(spent)


class _EmbeddingAnswer(Response):
    def __init__(self, embedding: Embedding, question: EmbeddingQuestion, call: Call) -> None:
        super().__init__()
        self._embedding, self._question, self._call = embedding, question, call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def work() -> None:
            await self._embedding.send(self._question, self._call, (scope, receive, send))

        self._call.has_left = not await run_while_connected(receive, work)


def _document(question: EmbeddingQuestion, embedded: Embedded) -> dict[str, object]:
    write = _base64 if question.is_base64 else tuple
    vectors = [
        {"object": "embedding", "index": index, "embedding": write(vector)}
        for index, vector in enumerate(embedded.vectors)
    ]
    tokens = embedded.prompt_tokens
    return {
        "object": "list",
        "data": vectors,
        "model": question.model.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _base64(vector: Sequence[float]) -> str:
    # OpenAI's clients read little-endian float32, which is every supported machine's own order.
    return base64.b64encode(array("f", vector).tobytes()).decode()
