"""An engine's thread around work that a test controls."""

import threading
import time

import pytest

from cluster.errors import EngineError
from serving.engines.native.engine_thread import EngineThread, Work


class Counting:
    """Work that takes numbers, one pass for each, and waits in a pass for a permit."""

    def __init__(self):
        self.waiting, self.done, self.ended = [], [], []
        self.error: BaseException = ValueError("out of memory")
        self.started, self.permits = threading.Semaphore(0), threading.Semaphore(0)

    def work(self):
        return Work(lambda: not self.waiting, self.waiting.append, self.tick, self.end)

    def tick(self):
        self.started.release()
        assert self.permits.acquire(timeout=30)
        if self.waiting[0] < 0:
            raise self.error
        self.done.append(self.waiting.pop(0))

    def end(self, failure, commands):
        self.ended.append((failure.message, self.waiting, commands))


@pytest.fixture
def counting():
    return Counting()


@pytest.fixture
def thread(counting):
    thread = EngineThread("counting", counting.work())
    yield thread
    for _ in range(100):
        counting.permits.release()
    thread.close()


def test_close_when_commands_wait_ends_with_all_of_them(thread, counting):
    for number in (1, 2):
        thread.submit(number)
    counting.started.acquire()
    closing = threading.Thread(target=thread.close)
    closing.start()
    while thread._commands.empty():
        time.sleep(0)  # the thread offers no event for it
    thread.submit(3)
    counting.permits.release()
    closing.join()
    ((message, waiting, commands),) = counting.ended
    assert "closed" in message
    assert counting.done == [1]
    assert sorted([*waiting, *commands]) == [2, 3]


def test_submit_when_the_work_raised_is_refused_with_its_reason(thread, counting):
    counting.permits.release()
    thread.submit(-1)
    thread._thread.join(30)
    for ask in (thread.check, lambda: thread.submit(1)):
        with pytest.raises(EngineError, match="ValueError: out of memory"):
            ask()
    assert [waiting for _, waiting, _ in counting.ended] == [[-1]]


class Panic(BaseException):
    """What a library in Rust raises for a bug of its own; it is no Exception."""


def test_submit_when_a_library_panicked_is_refused_with_its_reason(thread, counting):
    counting.error = Panic("index out of bounds")
    counting.permits.release()
    thread.submit(-1)
    thread._thread.join(30)
    with pytest.raises(EngineError, match="Panic: index out of bounds"):
        thread.check()
    assert [waiting for _, waiting, _ in counting.ended] == [[-1]]


def test_send_when_the_thread_ended_is_of_no_effect(thread, counting):
    thread.close()
    thread.send(1)
    assert counting.done == []
