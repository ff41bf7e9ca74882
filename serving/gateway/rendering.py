"""Answers in the OpenAI API's shapes: whole, or as chunks of a stream.

Takes deltas and counts; gives JSON documents. It does not know HTTP or where deltas come from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from serving.engines._protocol import Alternative, FinishReason, TokenLogprob
from serving.messages import Delta

Document = dict[str, Any]


@dataclass
class Choice:
    """One choice as it grows."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        """Append what was generated."""
        self.text += delta.text
        self.token_ids.extend(delta.token_ids)
        self.finish_reason = delta.finish_reason
        self.logprobs.extend(delta.logprobs)


@dataclass(frozen=True)
class Usage:
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int

    def document(self) -> Document:
        """Return the counts and their sum."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass(frozen=True)
class Header:
    """What every document of one answer begins with."""

    id: str
    created_s: int
    model: str
    has_token_ids: bool
    has_logprobs: bool


class Rendering(Protocol):
    """How one kind of answer looks."""

    def whole(self, header: Header, choices: Sequence[Choice], usage: Usage) -> Document:
        """Return the answer to a request without a stream."""
        ...

    def opening(self, header: Header, num_choices: int) -> list[Document]:
        """Return the chunks that a stream begins with."""
        ...

    def chunk(self, header: Header, delta: Delta, text_offset: int) -> Document:
        """Return the chunk for one delta; `text_offset` characters of tokens came before it."""
        ...

    def usage(self, header: Header, usage: Usage) -> Document:
        """Return the last chunk of a stream that asked for token counts."""
        ...


class CompletionRendering:
    """`text_completion` documents."""

    def whole(self, header: Header, choices: Sequence[Choice], usage: Usage) -> Document:
        """Return the answer to a request without a stream."""
        rendered = [
            self._choice(header, index, c.text, c.token_ids, c.finish_reason, c.logprobs, 0)
            for index, c in enumerate(choices)
        ]
        return {**self._base(header), "choices": rendered, "usage": usage.document()}

    def opening(self, header: Header, num_choices: int) -> list[Document]:
        """Return nothing: a completion's stream begins with its text."""
        del header, num_choices
        return []

    def chunk(self, header: Header, delta: Delta, text_offset: int) -> Document:
        """Return the chunk for one delta."""
        choice = self._choice(
            header,
            delta.choice,
            delta.text,
            delta.token_ids,
            delta.finish_reason,
            delta.logprobs,
            text_offset,
        )
        return {**self._base(header), "choices": [choice]}

    def usage(self, header: Header, usage: Usage) -> Document:
        """Return the chunk of token counts."""
        return {**self._base(header), "choices": [], "usage": usage.document()}

    def _base(self, header: Header) -> Document:
        return {
            "id": f"cmpl-{header.id}",
            "object": "text_completion",
            "created": header.created_s,
            "model": header.model,
        }

    def _choice(
        self,
        header: Header,
        index: int,
        text: str,
        token_ids: Sequence[int],
        finish_reason: FinishReason | None,
        logprobs: Sequence[TokenLogprob],
        text_offset: int,
    ) -> Document:
        choice: Document = {
            "index": index,
            "text": text,
            "finish_reason": finish_reason,
            "logprobs": _completion_logprobs(logprobs, text_offset)
            if header.has_logprobs
            else None,
        }
        if header.has_token_ids:
            choice["token_ids"] = list(token_ids)
        return choice


class ChatRendering:
    """`chat.completion` and `chat.completion.chunk` documents."""

    def whole(self, header: Header, choices: Sequence[Choice], usage: Usage) -> Document:
        """Return the answer to a request without a stream."""
        rendered = []
        for index, choice in enumerate(choices):
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            rendered.append(
                {
                    "index": index,
                    "message": message,
                    "finish_reason": choice.finish_reason,
                    **_chat_extras(header, choice.logprobs, choice.token_ids),
                }
            )
        base = self._base(header, "chat.completion")
        return {**base, "choices": rendered, "usage": usage.document()}

    def opening(self, header: Header, num_choices: int) -> list[Document]:
        """Return a chunk a choice that says who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(header, index, delta, None) for index in range(num_choices)]

    def chunk(self, header: Header, delta: Delta, text_offset: int) -> Document:
        """Return the chunk for one delta."""
        del text_offset
        content = {"content": delta.text} if delta.text or not delta.finish_reason else {}
        document = self._chunk(header, delta.choice, content, delta.finish_reason)
        document["choices"][0].update(_chat_extras(header, delta.logprobs, delta.token_ids))
        return document

    def usage(self, header: Header, usage: Usage) -> Document:
        """Return the chunk of token counts."""
        base = self._base(header, "chat.completion.chunk")
        return {**base, "choices": [], "usage": usage.document()}

    def _base(self, header: Header, kind: str) -> Document:
        return {
            "id": f"chatcmpl-{header.id}",
            "object": kind,
            "created": header.created_s,
            "model": header.model,
        }

    def _chunk(
        self, header: Header, index: int, delta: Document, finish_reason: FinishReason | None
    ) -> Document:
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return {**self._base(header, "chat.completion.chunk"), "choices": [choice]}


def tokens_length(logprobs: Sequence[TokenLogprob]) -> int:
    """Return how many characters the texts of these tokens have."""
    return sum(len(token.text) for token in logprobs)


def _completion_logprobs(logprobs: Sequence[TokenLogprob], text_offset: int) -> Document:
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


def _chat_extras(
    header: Header, logprobs: Sequence[TokenLogprob], token_ids: Sequence[int]
) -> Document:
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
