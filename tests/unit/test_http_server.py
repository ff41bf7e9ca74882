"""The gateway's port with an application that says what it was asked."""

import asyncio
from contextlib import suppress

import pytest
import uvloop

from cluster.errors import PortTakenError
from serving.http_server import MAX_HEAD_BYTES, HttpServer

REQUEST = b"GET /hello HTTP/1.1\r\nhost: x\r\n\r\n"


async def application(scope, receive, send) -> None:
    if scope["type"] == "lifespan":
        for kind in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{kind}.complete"})
        return
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if scope["path"] == "/slow":
        await send({"type": "http.response.body", "body": b"begun,", "more_body": True})
        await asyncio.sleep(0.3)
    await send({"type": "http.response.body", "body": scope["path"].encode()})


async def talk(port: int, *pieces: bytes, pause_s: float = 0.0) -> bytes:
    """Send pieces with pauses and return everything that is answered until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = bytearray()

    async def read() -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                answer.extend(data)

    reading = asyncio.create_task(read())
    with suppress(ConnectionError):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)
    async with asyncio.timeout(5):
        await reading
    writer.close()
    return bytes(answer)


def run(work, **options):
    async def with_server():
        server = HttpServer(application, "127.0.0.1", 0, **options)
        await server.start()
        try:
            return await work(server)
        finally:
            await server.stop(1)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(with_server())


def test_server_when_asked_answers_without_naming_itself():
    request = REQUEST.replace(b"host: x", b"host: x\r\nconnection: close")
    answer = run(lambda server: talk(server.port, request))
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"/hello" in answer
    assert b"server:" not in answer.lower()


def test_server_when_a_head_never_comes_closes_the_connection():
    assert run(lambda server: talk(server.port), head_timeout_s=0.05) == b""


def test_server_when_a_head_trickles_closes_the_connection():
    pieces = [bytes([byte]) for byte in REQUEST]
    trickled = run(lambda server: talk(server.port, *pieces, pause_s=0.01), head_timeout_s=0.05)
    assert trickled == b""


def test_server_when_a_second_head_trickles_closes_the_connection():
    pieces = [REQUEST, *(bytes([byte]) for byte in REQUEST)]
    answer = run(lambda server: talk(server.port, *pieces, pause_s=0.01), head_timeout_s=0.1)
    assert answer.count(b"HTTP/1.1 200") == 1


def test_server_when_a_head_is_endless_refuses_it():
    async def work(server):
        line = b"x-a: " + b"y" * 1000 + b"\r\n"
        lines = [line] * (MAX_HEAD_BYTES // 1000 + 2)
        return await talk(server.port, b"GET / HTTP/1.1\r\n", *lines)

    answer = run(work)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400")


UNREAD = b"GET /hello HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n"


@pytest.mark.parametrize("piece", [b"x", b"x" * MAX_HEAD_BYTES])
def test_server_when_a_body_that_nobody_reads_does_not_end_closes_the_connection(piece: bytes):
    endless = UNREAD.replace(b"100", b"1000000000")
    pieces = [endless, *[piece] * 30]
    answer = run(lambda server: talk(server.port, *pieces, pause_s=0.01), head_timeout_s=0.1)
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b"HTTP/1.1") == 1


def test_server_when_a_body_that_nobody_reads_ends_answers_what_comes_next():
    last = REQUEST.replace(b"host: x", b"host: x\r\nconnection: close")
    pieces = [UNREAD, b"x" * 40, b"x" * 60 + REQUEST, last]
    answer = run(lambda server: talk(server.port, *pieces, pause_s=0.02))
    assert answer.count(b"HTTP/1.1 200") == 3


def test_server_when_nothing_follows_a_body_that_nobody_reads_closes_the_connection():
    pieces = [UNREAD, b"x" * 100]
    answer = run(lambda server: talk(server.port, *pieces, pause_s=0.02), head_timeout_s=0.1)
    assert answer.count(b"HTTP/1.1 200") == 1


def test_server_when_only_empty_lines_follow_a_request_closes_the_connection():
    pieces = [REQUEST, *[b"\r\n"] * 30]
    answer = run(lambda server: talk(server.port, *pieces, pause_s=0.01), head_timeout_s=0.1)
    assert answer.count(b"HTTP/1.1 200") == 1


def test_server_when_an_answer_takes_longer_than_a_head_may_lets_it_end():
    request = b"GET /slow HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    answer = run(lambda server: talk(server.port, request), head_timeout_s=0.05)
    assert b"begun," in answer
    assert b"/slow" in answer


def test_stop_when_an_answer_is_under_way_lets_it_end():
    async def work(server):
        request = b"GET /slow HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        asked = asyncio.create_task(talk(server.port, request))
        await asyncio.sleep(0.1)
        await server.stop(5)
        return await asked, server.is_serving

    answer, is_serving = run(work)
    assert b"/slow" in answer
    assert not is_serving


def test_stop_when_an_answer_takes_too_long_lets_it_say_so_and_waits_for_that():
    async def says_goodbye(scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return await application(scope, receive, send)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun,", "more_body": True})
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0.1)
            await send({"type": "http.response.body", "body": b"goodbye"})
            raise

    async def work():
        server = HttpServer(says_goodbye, "127.0.0.1", 0)
        await server.start()
        asked = asyncio.create_task(talk(server.port, REQUEST))
        await asyncio.sleep(0.1)
        await server.stop(0)
        num_left = len(server._server.server_state.tasks)
        return num_left, await asked

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        num_left, answer = runner.run(work())
    assert num_left == 0
    assert b"begun," in answer
    assert answer.rstrip().endswith(b"goodbye\r\n0")


def test_server_when_a_successor_binds_the_same_port_both_answer():
    async def work(server):
        successor = HttpServer(application, "127.0.0.1", server.port)
        await successor.start()
        await server.stop(1)
        request = REQUEST.replace(b"host: x", b"host: x\r\nconnection: close")
        answer = await talk(server.port, request)
        await successor.stop(1)
        return answer

    assert b"/hello" in run(work)


def test_server_when_a_stranger_has_the_port_is_refused():
    async def work(server):
        stranger = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        port = stranger.sockets[0].getsockname()[1]
        with pytest.raises(PortTakenError, match=str(port)):
            HttpServer(application, "127.0.0.1", port)
        stranger.close()

    run(work)
