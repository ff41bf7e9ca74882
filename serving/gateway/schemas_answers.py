"""What answers look like, for the OpenAPI page; answers themselves are made without these classes.

Takes nothing; gives response descriptions. A test holds real answers to them.
"""

from http import HTTPStatus
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length"]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", title=None)


class ErrorBody(_Answer):
    """Why a request was refused."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(_Answer):
    """A refusal; also the data of a stream's `error` event."""

    error: ErrorBody


class PromptDetails(_Answer):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class TokenUsage(_Answer):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class CompletionLogprobs(_Answer):
    """Likelihoods, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(_Answer):
    """One continuation."""

    index: int
    text: str
    finish_reason: FinishReason
    logprobs: CompletionLogprobs | None
    token_ids: list[int] | None = None


class Completion(_Answer):
    """The answer of `/v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: TokenUsage


class CalledFunction(_Answer):
    """What is to be called; `arguments` is a JSON text."""

    name: str
    arguments: str


class ToolCall(_Answer):
    """A call that the model asks for."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(_Answer):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatToken(_Answer):
    """A token with its log probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenChatToken(ChatToken):
    """A chosen token and the likeliest at its place."""

    top_logprobs: list[ChatToken]


class ChatLogprobs(_Answer):
    """Likelihoods, one entry a token."""

    content: list[ChosenChatToken]
    refusal: None


class ChatChoice(_Answer):
    """One answer."""

    index: int
    message: AnswerMessage
    finish_reason: FinishReason | Literal["tool_calls"]
    logprobs: ChatLogprobs | None
    token_ids: list[int] | None = None


class ChatCompletion(_Answer):
    """The answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage


class EmbeddingUsage(_Answer):
    """Tokens of a request."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingVector(_Answer):
    """One vector: numbers, or little-endian float32 in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(_Answer):
    """The answer of `/v1/embeddings`."""

    object: Literal["list"]
    data: list[EmbeddingVector]
    model: str
    usage: EmbeddingUsage


class EventStream(_Answer):
    """Where an answer can be read, once."""

    object: Literal["event_stream"]
    url: str
    expires_in_s: float


class Model(_Answer):
    """A name that can be asked, and the versions behind it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    versions: list[str]
    task: Literal["generate", "embed"]
    max_model_len: int | None


class ModelList(_Answer):
    """Every model that a key may ask."""

    object: Literal["list"]
    data: list[Model]


class Usage(BaseModel):
    """A team's limits, budget and use of the current month."""

    model_config = ConfigDict(extra="allow")


def answers(
    model: type[BaseModel] | None,
    *,
    status: HTTPStatus = HTTPStatus.OK,
    is_stream: bool = False,
    media: str = "application/json",
) -> dict[int | str, dict[str, Any]]:
    """Return the description of a route's answers: one document or a stream, and refusals."""
    content: dict[str, Any] = {}
    if is_stream:
        content["text/event-stream"] = {}
    elif model is None:
        content[media] = {"schema": {"type": "object" if "json" in media else "string"}}
    good: dict[str, Any] = {"description": "The answer."}
    if model is not None:
        good["model"] = model
    if content:
        good["content"] = content
    return {
        int(status): good,
        "4XX": {"description": "Refused: see `error`.", "model": Error},
        "5XX": {"description": "Not possible now: see `error`.", "model": Error},
    }
