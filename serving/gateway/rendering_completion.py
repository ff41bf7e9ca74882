"""`text_completion` documents, whole or as the frames of a stream.

Takes deltas and counts; gives JSON. It does not know HTTP.
"""

from collections.abc import Sequence

from serving.engines._protocol import FinishReason
from serving.gateway.rendering import (
    Choice,
    Document,
    Frames,
    Header,
    Usage,
    completion_logprobs,
    encode,
    frame,
)
from serving.messages import Delta

_PREFIX, _KIND = "cmpl", "text_completion"


class CompletionRendering:
    """How `/v1/completions` answers."""

    def whole(self, header: Header, choices: Sequence[Choice], usage: Usage) -> Document:
        """Return the answer to a request without a stream."""
        rendered = []
        for index, choice in enumerate(choices):
            logprobs = completion_logprobs(choice.logprobs, 0) if header.has_logprobs else None
            document: Document = {
                "index": index,
                "text": choice.text,
                "finish_reason": choice.finish_reason,
                "logprobs": logprobs,
            }
            if header.has_token_ids:
                document["token_ids"] = choice.token_ids
            rendered.append(document)
        return {**header.base(_PREFIX, _KIND), "choices": rendered, "usage": usage.document()}

    def frames(self, header: Header, num_choices: int) -> Frames:
        """Return what renders a stream."""
        return _CompletionFrames(header, num_choices)


class _CompletionFrames:
    def __init__(self, header: Header, num_choices: int) -> None:
        self._header = header
        self._offsets = [0] * num_choices
        self._is_plain = not header.has_logprobs and not header.has_token_ids
        opening = b"data: " + encode(header.base(_PREFIX, _KIND))[:-1] + b',"choices":[{"index":'
        self._starts = [opening + b'%d,"text":' % index for index in range(num_choices)]
        end = b'}],"usage":null}\n\n' if header.has_usage else b"}]}\n\n"
        self._ends: dict[FinishReason | None, bytes] = {
            reason: b',"finish_reason":' + encode(reason) + b',"logprobs":null' + end
            for reason in (None, *FinishReason)
        }
        self._end = end

    def opening(self) -> bytes:
        """Return nothing: a completion's stream begins with its text."""
        return b""

    def piece(self, delta: Delta) -> bytes:
        """Return the frame for one delta."""
        start = self._starts[delta.choice]
        if self._is_plain:
            if not delta.text and delta.finish_reason is None:
                return b""
            return start + encode(delta.text) + self._ends[delta.finish_reason]
        if not self._header.has_news(delta):
            return b""
        return start + encode(delta.text) + b"," + self._extras(delta)[1:-1] + self._end

    def usage(self, usage: Usage) -> bytes:
        """Return the frame of token counts."""
        base = self._header.base(_PREFIX, _KIND)
        return frame({**base, "choices": [], "usage": usage.document()})

    def _extras(self, delta: Delta) -> bytes:
        offset = self._offsets[delta.choice]
        self._offsets[delta.choice] += sum(len(token.text) for token in delta.logprobs)
        has_logprobs = self._header.has_logprobs
        extras: Document = {
            "finish_reason": delta.finish_reason,
            "logprobs": completion_logprobs(delta.logprobs, offset) if has_logprobs else None,
        }
        if self._header.has_token_ids:
            extras["token_ids"] = delta.token_ids
        return encode(extras)
