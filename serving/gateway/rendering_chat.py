"""`chat.completion` and `chat.completion.chunk` documents, with tool calls.

Takes deltas and counts; gives JSON. It does not know HTTP.
"""

from collections.abc import Sequence
from itertools import count

from serving.engines._protocol import FinishReason
from serving.gateway.rendering import (
    Choice,
    Document,
    Frames,
    Header,
    Usage,
    chat_extras,
    encode,
    frame,
)
from serving.gateway.tool_calls import CallReading, ToolCall, ToolCallReader
from serving.messages import Delta

_PREFIX, _KIND, _CHUNK_KIND = "chatcmpl", "chat.completion", "chat.completion.chunk"
_CALLED = "tool_calls"


class ChatRendering:
    """How `/v1/chat/completions` answers; `calls` None: answers are text and nothing else."""

    def __init__(self, calls: CallReading | None = None) -> None:
        self._calls = calls

    def whole(self, header: Header, choices: Sequence[Choice], usage: Usage) -> Document:
        """Return the answer to a request without a stream."""
        rendered = [
            {"index": index, **self._answer(c), **chat_extras(header, c.logprobs, c.token_ids)}
            for index, c in enumerate(choices)
        ]
        return {**header.base(_PREFIX, _KIND), "choices": rendered, "usage": usage.document()}

    def frames(self, header: Header, num_choices: int) -> Frames:
        """Return what renders a stream."""
        if self._calls is not None:
            return _CallFrames(header, num_choices, self._calls)
        return _ChatFrames(header, num_choices)

    def _answer(self, choice: Choice) -> Document:
        message: Document = {"role": "assistant", "content": choice.text, "refusal": None}
        if self._calls is None:
            return {"message": message, "finish_reason": choice.finish_reason}
        reader = ToolCallReader(self._calls)
        found = [*reader.feed(choice.text), *reader.finish()]
        calls = [item.document() for item in found if isinstance(item, ToolCall)]
        content = "".join(item for item in found if isinstance(item, str))
        message["content"] = content or (None if calls else "")
        if calls:
            message["tool_calls"] = calls
        reason = _call_reason(choice.finish_reason, has_calls=bool(calls))
        return {"message": message, "finish_reason": reason}


class _ChatFrames:
    """Frames of text."""

    def __init__(self, header: Header, num_choices: int) -> None:
        self._header, self._num_choices = header, num_choices
        self._is_plain = not header.has_logprobs and not header.has_token_ids
        base = encode(header.base(_PREFIX, _CHUNK_KIND))[:-1]
        self._starts = [
            b"data: " + base + b',"choices":[{"index":%d,"delta":' % index
            for index in range(num_choices)
        ]
        self._end = b'}],"usage":null}\n\n' if header.has_usage else b"}]}\n\n"
        self._going_on = b'},"finish_reason":null,"logprobs":null' + self._end

    def opening(self) -> bytes:
        """Return a frame a choice that says who speaks."""
        delta = {"role": "assistant", "content": ""}
        return b"".join(self._chunk(index, delta) for index in range(self._num_choices))

    def piece(self, delta: Delta) -> bytes:
        """Return the frame for one delta."""
        if self._is_plain and delta.finish_reason is None:
            if not delta.text:
                return b""
            start = self._starts[delta.choice]
            return start + b'{"content":' + encode(delta.text) + self._going_on
        if not self._header.has_news(delta):
            return b""
        content = {"content": delta.text} if delta.text or not delta.finish_reason else {}
        return self._chunk(delta.choice, content, delta.finish_reason, delta)

    def usage(self, usage: Usage) -> bytes:
        """Return the frame of token counts."""
        base = self._header.base(_PREFIX, _CHUNK_KIND)
        return frame({**base, "choices": [], "usage": usage.document()})

    def _chunk(
        self, index: int, content: Document, reason: str | None = None, said: Delta | None = None
    ) -> bytes:
        extras: Document = {"logprobs": None}
        if said is not None:
            extras = chat_extras(self._header, said.logprobs, said.token_ids)
        rest = encode({"finish_reason": reason, **extras})[1:-1]
        return self._starts[index] + encode(content) + b"," + rest + self._end


class _CallFrames(_ChatFrames):
    """Frames of text and tool calls; a call is sent in one frame, once it is whole."""

    def __init__(self, header: Header, num_choices: int, calls: CallReading) -> None:
        super().__init__(header, num_choices)
        self._readers = [ToolCallReader(calls) for _ in range(num_choices)]
        self._numbers = [count() for _ in range(num_choices)]

    def piece(self, delta: Delta) -> bytes:
        """Return the frames for one delta; likelihoods and token ids are on the first of them."""
        reader = self._readers[delta.choice]
        found = reader.feed(delta.text)
        if delta.finish_reason is not None:
            found += reader.finish()
        contents = [self._content(delta.choice, item) for item in found]
        reason = _call_reason(delta.finish_reason, has_calls=reader.num_calls > 0)
        has_extras = bool(delta.logprobs) or self._header.has_token_ids
        if reason is not None or (has_extras and not contents):
            contents.append({})
        lines = []
        for at, content in enumerate(contents):
            is_last = at == len(contents) - 1
            said = delta if at == 0 else None
            lines.append(self._chunk(delta.choice, content, reason if is_last else None, said))
        return b"".join(lines)

    def _content(self, choice: int, item: str | ToolCall) -> Document:
        if isinstance(item, str):
            return {"content": item}
        return {"tool_calls": [{"index": next(self._numbers[choice]), **item.document()}]}


def _call_reason(reason: FinishReason | None, *, has_calls: bool) -> str | None:
    return _CALLED if has_calls and reason is FinishReason.STOP else reason
