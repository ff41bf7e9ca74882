"""The OpenAI API's requests: every field with its type, bounds and meaning.

Takes JSON; gives requests, and says what they ask of a model. Fields that could change an answer in
ways this server cannot are refused unless they have no effect; fields that never change an answer
are accepted.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serving.engines._protocol import MAX_LOGPROBS, MAX_STOP_STRINGS, StopString
from serving.gateway.errors import shorten
from serving.messages import (
    ChatPrompt,
    InferenceRequest,
    Prompt,
    Sampling,
    TextPrompt,
    TokenPrompt,
    Turn,
)

MAX_PROMPTS = 32
MAX_CHOICES = 64
MAX_N = 8
MAX_MESSAGES = 1024
MAX_TOKENS = 1_000_000
MAX_SEED = 2**63 - 1

TokenId = Annotated[int, Field(ge=0, le=2**31)]
Text = Annotated[str, Field(max_length=8_000_000)]
Tokens = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
TokenLists = Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
Stops = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]


class _Body(BaseModel):
    # Strict: "3" is no number and true no integer, as in the OpenAI API.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    # Values without effect; any other asks for what this server cannot do.
    _neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    # These never change an answer.
    _ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _drop_what_has_no_effect(cls, document: Any) -> Any:
        if not isinstance(document, dict):
            return document
        refused = [
            f"`{key}` = {shorten(document[key])}"
            for key, values in cls._neutral.items()
            if key in document and document[key] not in values
        ]
        if refused:
            raise ValueError(f"not supported by this server: {', '.join(refused)}; leave it out")
        dropped = cls._ignored | cls._neutral.keys()
        return {key: value for key, value in document.items() if key not in dropped}


class StreamOptions(_Body):
    """What a stream carries besides text."""

    include_usage: bool = Field(default=False, description="End with a chunk of token counts.")
    include_obfuscation: Literal[False] = Field(default=False, description="Not supported.")


class _Generation(_Body):
    """What both kinds of request share."""

    _neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "presence_penalty": (0, None),
        "frequency_penalty": (0, None),
        "logit_bias": ({}, None),
    }
    _ignored: ClassVar[frozenset[str]] = frozenset(
        {
            "metadata",
            "prompt_cache_key",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "store",
            "user",
        }
    )

    model: str = Field(min_length=1, max_length=300, description="Id of a served model.")
    temperature: float | None = Field(default=None, ge=0, le=2, description="0: no randomness.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Nucleus sampling.")
    top_k: int | None = Field(
        default=None, ge=1, le=2**31, description="Only the k likeliest tokens (an extension)."
    )
    n: int | None = Field(default=None, ge=1, le=MAX_N, description="Choices for each prompt.")
    seed: int | None = Field(
        default=None, ge=-MAX_SEED, le=MAX_SEED, description="Makes sampling repeatable."
    )
    stop: StopString | Stops | None = Field(default=None, description="Texts that end a choice.")
    stream: bool | None = Field(default=None, description="Send the answer as it is made.")
    stream_options: StreamOptions | None = Field(default=None, description="Only with `stream`.")
    max_tokens: int | None = Field(
        default=None, ge=1, le=MAX_TOKENS, description="Most tokens to generate."
    )
    return_token_ids: bool | None = Field(
        default=None, description="Add `token_ids` to every choice (an extension)."
    )

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` is only allowed with `stream` = true")
        return self

    def _sampling(self, max_tokens: int | None, num_logprobs: int | None) -> Sampling:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=stop,
            num_logprobs=num_logprobs,
        )


class CompletionRequest(_Generation):
    """Continue one or several prompts."""

    _neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **_Generation._neutral,
        "best_of": (1, None),
        "echo": (False, None),
        "suffix": ("", None),
    }

    prompt: Text | Texts | Tokens | TokenLists = Field(description="What is continued.")
    logprobs: int | None = Field(
        default=None, ge=0, le=5, description="Alternatives reported for each token."
    )

    @model_validator(mode="after")
    def _check_choices(self) -> Self:
        choices = len(self._prompts()) * (self.n or 1)
        if choices > MAX_CHOICES:
            raise ValueError(f"`n` x prompts = {choices} choices; at most {MAX_CHOICES} a request")
        return self

    def inference(self) -> InferenceRequest:
        """Return what is asked of the model; 16 tokens unless said otherwise, as OpenAI does."""
        sampling = self._sampling(self.max_tokens or 16, self.logprobs)
        return InferenceRequest(self._prompts(), sampling, self.n or 1)

    def _prompts(self) -> tuple[Prompt, ...]:
        if isinstance(self.prompt, str):
            return (TextPrompt(self.prompt),)
        items: Sequence[str | int | list[int]] = self.prompt
        single = tuple(item for item in items if isinstance(item, int))
        if single:
            return (TokenPrompt(single),)
        return tuple(
            TextPrompt(item) if isinstance(item, str) else TokenPrompt(tuple(item))
            for item in items
            if not isinstance(item, int)
        )


class TextPart(_Body):
    """A piece of a message; text is the only kind."""

    type: Literal["text"] = Field(description="Kind of the piece.")
    text: Text = Field(description="The text.")


class Message(_Body):
    """One message of a conversation."""

    # Empty fields of an answer, which clients send back as it came.
    _neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "annotations": ([], None),
        "audio": (None,),
        "function_call": (None,),
        "refusal": (None,),
        "tool_calls": ([], None),
    }

    role: Literal["system", "developer", "user", "assistant"] = Field(description="Who speaks.")
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="What is said."
    )
    name: str | None = Field(default=None, max_length=64, description="Accepted, not used.")

    def turn(self) -> Turn:
        """Return the message with its parts joined."""
        if isinstance(self.content, str):
            return Turn(self.role, self.content)
        return Turn(self.role, "".join(part.text for part in self.content))


class ChatCompletionRequest(_Generation):
    """Answer a conversation."""

    _neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **_Generation._neutral,
        "tools": ([], None),
        "tool_choice": ("none", "auto", None),
        "parallel_tool_calls": (True, False, None),
        "response_format": ({"type": "text"}, None),
        "modalities": (["text"], None),
        "reasoning_effort": ("none", None),
        "verbosity": ("medium", None),
    }

    messages: list[Message] = Field(
        min_length=1, max_length=MAX_MESSAGES, description="The conversation so far."
    )
    max_completion_tokens: int | None = Field(
        default=None, ge=1, le=MAX_TOKENS, description="The newer name of `max_tokens`."
    )
    logprobs: bool | None = Field(default=None, description="Report log probabilities.")
    top_logprobs: int | None = Field(
        default=None, ge=0, le=MAX_LOGPROBS, description="Alternatives; only with `logprobs`."
    )

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` is only allowed with `logprobs` = true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give `max_tokens` or `max_completion_tokens`, not both")
        return self

    def inference(self) -> InferenceRequest:
        """Return what is asked of the model; up to the context's end unless said otherwise."""
        num_logprobs = (self.top_logprobs or 0) if self.logprobs else None
        sampling = self._sampling(self.max_completion_tokens or self.max_tokens, num_logprobs)
        prompt = ChatPrompt(tuple(message.turn() for message in self.messages))
        return InferenceRequest((prompt,), sampling, self.n or 1)
