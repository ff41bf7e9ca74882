"""How many tokens are worth guessing for one sequence, and guesses from its own text.

Takes a sequence's tokens and how earlier guesses fared; gives guesses. Pure: it does not know about
models, batches or who checks a guess.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

_NGRAMS = (4, 2)  # Lengths looked up, the more telling first.
_MAX_PAUSE = 64


@dataclass(eq=False)
class NgramIndex:
    """What followed the last tokens when they occurred before (Saxena 2023, prompt lookup)."""

    _follows: dict[tuple[int, ...], int] = field(default_factory=dict)
    _num_indexed: int = 0

    def guess(self, tokens: Sequence[int], num: int) -> list[int]:
        """Return up to `num` tokens, none if the last ones are new; `tokens` may only grow.

        Where the earlier place reaches into the end, the text is taken to go on in circles.
        """
        length = len(tokens)
        for stop in range(self._num_indexed, length):
            for size in _NGRAMS:
                if stop >= size:
                    self._follows[tuple(tokens[stop - size : stop])] = stop
        self._num_indexed = max(self._num_indexed, length)
        for size in _NGRAMS:
            start = self._follows.get(tuple(tokens[-size:]))
            if start is not None:
                period = length - start
                return [tokens[start + at % period] for at in range(num)]
        return []


@dataclass(eq=False)
class Drafting:
    """How far to guess ahead: further while guesses hold, less, and seldom, when they do not."""

    most: int
    length: int = field(init=False)
    ngrams: NgramIndex = field(default_factory=NgramIndex)
    num_draft_cached: int = 0  # Tokens whose keys and values a draft model has.
    _pause: int = 0
    _next_pause: int = 1

    def __post_init__(self) -> None:
        self.length = self.most

    def note(self, num_guessed: int, num_accepted: int) -> None:
        """Take note of one pass; with nothing guessed, of a pass of a pause."""
        if num_guessed == 0:
            self._wait()
        elif num_accepted == num_guessed:
            self.length = min(self.most, 2 * self.length)
            self._next_pause = 1
        elif num_accepted > 0:
            self.length = min(self.length, num_accepted + 1)
            self._next_pause = 1
        else:
            self.length //= 2
            if self.length == 0:
                self._pause = self._next_pause
                self._next_pause = min(2 * self._next_pause, _MAX_PAUSE)

    def _wait(self) -> None:
        if self.length == 0:
            self._pause -= 1
            if self._pause <= 0:
                self.length = min(1, self.most)
