"""Results reach the event loops that asked for them, each woken once."""

import asyncio
import logging

import pytest

from cluster.errors import EngineError
from serving.engines._protocol import Chunk
from serving.engines.native.mailbox import Mailbox, deliver

FIRST, SECOND = Chunk("a", (1,)), Chunk("b", (2,))


class CountingLoop:
    """An event loop as `deliver` sees it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.num_calls = 0

    def call_soon_threadsafe(self, callback, *arguments) -> None:
        self.num_calls += 1
        self._loop.call_soon_threadsafe(callback, *arguments)


def test_deliver_when_a_loop_has_many_results_wakes_it_once():
    async def run():
        loop = CountingLoop(asyncio.get_running_loop())
        mailboxes = [Mailbox(loop) for _ in range(3)]
        await asyncio.to_thread(deliver, [(mailbox, FIRST) for mailbox in mailboxes])
        return [await mailbox.take() for mailbox in mailboxes], loop.num_calls

    assert asyncio.run(run()) == ([FIRST] * 3, 1)


def test_take_when_several_results_came_keeps_their_order_and_raises_the_error_last():
    async def run():
        mailbox = Mailbox(asyncio.get_running_loop())
        deliver([(mailbox, FIRST), (mailbox, SECOND), (mailbox, EngineError("it stopped"))])
        assert [await mailbox.take(), await mailbox.take()] == [FIRST, SECOND]
        with pytest.raises(EngineError, match="it stopped"):
            await mailbox.take()

    asyncio.run(run())


def test_deliver_when_making_a_result_fails_hands_over_those_before_it():
    async def run():
        mailbox = Mailbox(asyncio.get_running_loop())

        def letters():
            yield mailbox, FIRST
            raise ValueError("no such token")

        with pytest.raises(ValueError, match="no such token"):
            deliver(letters())
        return await mailbox.take()

    assert asyncio.run(run()) == FIRST


def test_deliver_when_a_loop_is_closed_says_what_is_lost_and_serves_the_others(caplog):
    closed = asyncio.new_event_loop()
    closed.close()

    async def run():
        mailbox = Mailbox(asyncio.get_running_loop())
        with caplog.at_level(logging.WARNING):
            deliver([(Mailbox(closed), FIRST), (Mailbox(closed), FIRST), (mailbox, SECOND)])
        return await mailbox.take()

    assert asyncio.run(run()) == SECOND
    assert "2 results were dropped" in caplog.text
