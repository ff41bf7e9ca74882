"""Results on their way from the engine's thread to the event loops that asked for them.

Takes results of one pass; wakes each event loop once, however many of its sequences have one. It
does not know what a result means.
"""

import asyncio
import logging
from collections.abc import Iterable

from cluster.errors import EngineError, RequestError
from serving.engines._protocol import Chunk

_logger = logging.getLogger(__name__)


class Mailbox:
    """Results of one sequence, for the one task of an event loop that awaits them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._items: asyncio.Queue[Chunk | EngineError | RequestError] = asyncio.Queue()

    def put(self, item: Chunk | EngineError | RequestError) -> None:
        """Add a result; on the event loop's own thread."""
        self._items.put_nowait(item)

    async def take(self) -> Chunk:
        """Return the next chunk, or raise the error that ended the sequence."""
        item = await self._items.get()
        if isinstance(item, (EngineError, RequestError)):
            raise item
        return item


Letter = tuple[Mailbox, Chunk | EngineError | RequestError]


def deliver(letters: Iterable[Letter]) -> None:
    """Hand over results from any thread, with one call into each event loop.

    Where making one of them raises, those before it are handed over.
    """
    by_loop: dict[asyncio.AbstractEventLoop, list[Letter]] = {}
    try:
        for letter in letters:
            by_loop.setdefault(letter[0].loop, []).append(letter)
    finally:
        for loop, own in by_loop.items():
            _send(loop, own)


def _send(loop: asyncio.AbstractEventLoop, letters: list[Letter]) -> None:
    try:
        loop.call_soon_threadsafe(_put_all, letters)
    except RuntimeError:  # The loop is closed: nobody listens any more.
        _logger.warning(
            "%d results were dropped: the event loop that asked for them is closed", len(letters)
        )


def _put_all(letters: list[Letter]) -> None:
    for mailbox, item in letters:
        mailbox.put(item)
