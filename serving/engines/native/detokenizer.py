"""Token ids to text, one token at a time, cut at stop strings.

Takes tokens; gives text that will not change any more. It does not know about models or requests.

A token may end in the middle of a character, and a decoder may treat the first token of a text
differently, so a window of earlier tokens is decoded with the new ones and only the difference is
given out (the method of text-generation-inference and vLLM, both Apache-2.0).
"""

from collections.abc import Sequence
from typing import Protocol

_CONTEXT_TOKENS = 5
# A character has at most 4 bytes, hence 4 tokens. Past this the bytes are no text: give them out.
_MAX_HELD_TOKENS = 32
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextDecoder(Protocol):
    """Turns token ids into text; special tokens become nothing."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of these tokens."""
        ...


class Detokenizer:
    """Text of one sequence, as it grows."""

    def __init__(
        self,
        decoder: TextDecoder | None,
        prompt_tokens: Sequence[int] = (),
        stop: Sequence[str] = (),
        resumed_tokens: Sequence[int] = (),
    ) -> None:
        """Start after a prompt; text of `resumed_tokens` was given out already.

        They are pushed like all others and what comes of it is dropped, so that the text goes on as
        if it had never stopped: what was held back is still held back. Where they hold a stop
        string, `is_stopped` is set from the beginning.
        """
        assert decoder is not None or not stop, "stop strings need a decoder"
        self._decoder = decoder
        self._stop = tuple(stop)
        self._tokens = list(prompt_tokens[-_CONTEXT_TOKENS:])
        self._context_start = 0
        self._read_until = len(self._tokens)
        self._held = ""
        self.is_stopped = False
        for token_id in resumed_tokens:
            if not self.is_stopped:
                self.push(token_id)

    def push(self, token_id: int) -> str:
        """Add a token and return the text that is now certain; may set `is_stopped`."""
        assert not self.is_stopped, "no token may follow a stop string"
        if self._decoder is None:
            return ""
        self._tokens.append(token_id)
        return self._release(self._decode_new(is_last=False), is_last=False)

    def finish(self) -> str:
        """Return what was held back; no token may follow."""
        if self._decoder is None or self.is_stopped:
            return ""
        return self._release(self._decode_new(is_last=True), is_last=True)

    def _decode_new(self, *, is_last: bool) -> str:
        assert self._decoder is not None, "checked by the caller"
        if self._read_until == len(self._tokens):
            return ""
        before = self._decoder.decode(self._tokens[self._context_start : self._read_until])
        after = self._decoder.decode(self._tokens[self._context_start :])
        is_held_long = len(self._tokens) - self._read_until >= _MAX_HELD_TOKENS
        if after.endswith(_REPLACEMENT) and not is_last and not is_held_long:
            return ""
        self._context_start, self._read_until = self._read_until, len(self._tokens)
        return after[len(before) :]

    def _release(self, new_text: str, *, is_last: bool) -> str:
        if not self._stop:
            return new_text
        text = self._held + new_text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.is_stopped = True
            self._held = ""
            return text[: min(found)]
        keep = 0 if is_last else _possible_stop(text, self._stop)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]


def _possible_stop(text: str, stop: Sequence[str]) -> int:
    """Return how many characters at the end of `text` may be the beginning of a stop string."""
    longest = 0
    for string in stop:
        for length in range(min(len(string) - 1, len(text)), longest, -1):
            if text.endswith(string[:length]):
                longest = length
                break
    return longest
