"""What answers of every kind are made of: counts, choices, likelihoods, and a stream's frames.

Takes deltas and counts; gives JSON. It does not know HTTP or where deltas come from. A stream has a
frame for almost every token, so what frames share is encoded once, not once a token.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from serving.engines._protocol import Alternative, FinishReason, TokenLogprob
from serving.messages import Delta, Event, Started

Document = dict[str, Any]
encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class Header:
    """What every document of one answer begins with, and what it carries besides text."""

    id: str
    created_s: int
    model: str
    has_token_ids: bool = False
    has_logprobs: bool = False
    has_usage: bool = False

    def base(self, prefix: str, kind: str) -> Document:
        """Return the first fields of a document."""
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created_s,
            "model": self.model,
        }

    def has_news(self, delta: Delta) -> bool:
        """Return whether a delta is worth a frame; text may lag behind tokens."""
        return bool(delta.text or delta.finish_reason or delta.logprobs or self.has_token_ids)


@dataclass
class Choice:
    """One choice as it grows."""

    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Everything so far."""
        return "".join(self.pieces)


@dataclass(frozen=True)
class Usage:
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    def document(self) -> Document:
        """Return the counts and their sum."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Frames(Protocol):
    """One stream's frames, in order."""

    def opening(self) -> bytes:
        """Return what comes before the first token."""
        ...

    def piece(self, delta: Delta) -> bytes:
        """Return the frames for what was added to a choice; nothing if nothing is to be said."""
        ...

    def usage(self, usage: Usage) -> bytes:
        """Return the frame of token counts."""
        ...


class Rendering(Protocol):
    """How one kind of answer looks."""

    def whole(self, header: Header, choices: Sequence[Choice], usage: Usage) -> Document:
        """Return the answer to a request without a stream."""
        ...

    def frames(self, header: Header, num_choices: int) -> Frames:
        """Return what renders a stream."""
        ...


class Tally:
    """Adds up the events of one answer; a stream keeps counts only."""

    def __init__(self, num_choices: int, num_per_prompt: int = 1, *, is_kept: bool = True) -> None:
        self.choices = [Choice() for _ in range(num_choices)]
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.has_started = False
        self._num_per_prompt = num_per_prompt
        self._is_kept = is_kept
        self._num_open = num_choices

    def start(self, event: Started) -> None:
        """Count the prompts."""
        self.has_started = True
        self.prompt_tokens += event.prompt_tokens

    def add(self, delta: Delta) -> None:
        """Append what was generated."""
        choice = self.choices[delta.choice]
        if self._is_kept:
            choice.pieces.append(delta.text)
            choice.token_ids.extend(delta.token_ids)
            choice.logprobs.extend(delta.logprobs)
        self.generated_tokens += len(delta.token_ids)
        if delta.choice % self._num_per_prompt == 0:  # A prompt is counted once, not once a choice.
            self.cached_tokens += delta.cached_tokens
        if delta.finish_reason is not None and choice.finish_reason is None:
            choice.finish_reason = delta.finish_reason
            self._num_open -= 1

    @property
    def is_complete(self) -> bool:
        """Whether every choice has ended."""
        return self._num_open == 0

    def usage(self) -> Usage:
        """Return the counts so far."""
        return Usage(self.prompt_tokens, self.generated_tokens, self.cached_tokens)


def merged(batch: Iterable[Event]) -> list[Delta]:
    """Return one delta a choice, in the order of their first ones: a late reader gets one frame."""
    found: dict[int, Delta] = {}
    for event in batch:
        if not isinstance(event, Delta):
            continue
        before = found.get(event.choice)
        found[event.choice] = event if before is None else _joined(before, event)
    return list(found.values())


def frame(document: Document) -> bytes:
    """Return a server-sent event with a document."""
    return b"data: " + encode(document) + b"\n\n"


def completion_logprobs(logprobs: Sequence[TokenLogprob], text_offset: int) -> Document:
    """Return likelihoods as `/v1/completions` has them."""
    offsets = []
    for token in logprobs:
        offsets.append(text_offset)
        text_offset += len(token.text)
    return {
        "tokens": [token.text for token in logprobs],
        "token_logprobs": [token.logprob for token in logprobs],
        # As OpenAI does: the chosen token is listed even where it is not among the likeliest.
        "top_logprobs": [
            {**{t.text: t.logprob for t in reversed(token.top)}, token.text: token.logprob}
            for token in logprobs
        ],
        "text_offset": offsets,
    }


def chat_extras(
    header: Header, logprobs: Sequence[TokenLogprob], token_ids: Sequence[int]
) -> Document:
    """Return likelihoods and token ids as `/v1/chat/completions` has them."""
    extras: Document = {"logprobs": None}
    if header.has_logprobs:
        content = [
            {**_chat_token(token), "top_logprobs": [_chat_token(other) for other in token.top]}
            for token in logprobs
        ]
        extras["logprobs"] = {"content": content, "refusal": None}
    if header.has_token_ids:
        extras["token_ids"] = list(token_ids)
    return extras


def _chat_token(token: Alternative) -> Document:
    return {
        "token": token.text,
        "logprob": token.logprob,
        "bytes": list(token.text.encode("utf-8", "replace")),
    }


def _joined(first: Delta, second: Delta) -> Delta:
    return Delta(
        first.choice,
        first.text + second.text,
        first.token_ids + second.token_ids,
        second.finish_reason,
        first.logprobs + second.logprobs,
        first.cached_tokens + second.cached_tokens,
    )
