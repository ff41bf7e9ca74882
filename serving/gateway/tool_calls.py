"""Tool calls in a model's text, found as the text comes.

Takes pieces of text; gives text and calls. It knows the form that Hermes and Qwen models write,
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, and answers that were forced to be a
call, which are the bare object. What looks like a call and is none stays text.
"""

import json
import secrets
from dataclasses import dataclass

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """A function that the model asks to be called; `arguments` is a JSON text."""

    id: str
    name: str
    arguments: str

    def document(self) -> dict[str, object]:
        """Return the call as the API has it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class CallReading:
    """How calls are looked for. `is_forced`: the whole answer is one. `is_single`: one at most."""

    is_forced: bool = False
    is_single: bool = False


class ToolCallReader:
    """Reads one choice."""

    def __init__(self, reading: CallReading) -> None:
        self._reading = reading
        self._held = ""
        self._is_inside = reading.is_forced
        self._scanned = 0  # Characters of `_held` without a closing mark.
        self.num_calls = 0

    def feed(self, text: str) -> list[str | ToolCall]:
        """Return what is known for sure now; the rest is held back."""
        self._held += text
        if self._reading.is_forced:
            return []
        found: list[str | ToolCall] = []
        while self._take_inside(found) if self._is_inside else self._take_outside(found):
            pass
        return self._allowed(found)

    def finish(self) -> list[str | ToolCall]:
        """Return what was held back; a call without its closing mark counts if it is whole."""
        held, self._held = self._held, ""
        if not held:
            return []
        if not self._is_inside:
            return self._allowed([held])
        call = read_call(held)
        if call is not None:
            return self._allowed([call])
        return self._allowed([held if self._reading.is_forced else _OPEN + held])

    def _take_outside(self, found: list[str | ToolCall]) -> bool:
        """Take text up to a call; return whether there is more to look at."""
        if self.num_calls or any(isinstance(item, ToolCall) for item in found):
            self._held = self._held.lstrip()  # Space between calls is no content.
        text, mark, rest = self._held.partition(_OPEN)
        if mark:
            self._is_inside, self._held, self._scanned = True, rest, 0
            text = text.rstrip()
        else:
            kept = _length_before_mark(text)
            text, self._held = text[:kept], text[kept:]
        if text:
            found.append(text)
        return bool(mark)

    def _take_inside(self, found: list[str | ToolCall]) -> bool:
        """Take a call that has ended; return whether there is more to look at."""
        end = self._held.find(_CLOSE, max(0, self._scanned - len(_CLOSE)))
        if end < 0:
            self._scanned = len(self._held)
            return False
        body, self._held = self._held[:end], self._held[end + len(_CLOSE) :]
        self._is_inside = False
        found.append(read_call(body) or f"{_OPEN}{body}{_CLOSE}")
        return True

    def _allowed(self, found: list[str | ToolCall]) -> list[str | ToolCall]:
        allowed: list[str | ToolCall] = []
        for item in found:
            if self._reading.is_single and self.num_calls:
                break
            self.num_calls += isinstance(item, ToolCall)
            allowed.append(item)
        return allowed


def read_call(text: str) -> ToolCall | None:
    """Return the call that a JSON text is, or None if it is none."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(f"call_{secrets.token_hex(12)}", call["name"], arguments)


def _length_before_mark(text: str) -> int:
    """Return how much of a text cannot be the beginning of a call, or space before one."""
    end = len(text)
    for size in range(min(len(_OPEN) - 1, end), 0, -1):
        if text.endswith(_OPEN[:size]):
            end -= size
            break
    return len(text[:end].rstrip())
