"""What the serving benchmark makes of answers: how requests ended, and when work did."""

import asyncio
import itertools
import time
from collections.abc import Callable

import pytest

from benchmarks.serving import cancel, peers, rollout
from benchmarks.serving.http_client import Api, Content, Reply, ask, read
from benchmarks.serving.workload import Answers, Limit, Request, poisson

REQUEST = Request(0.0, (5, 6), 2)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
TOKEN = b'data: {"choices": [{"token_ids": [7]}]}\n\n'
DONE = b"data: [DONE]\n\n"


def answered_with(*parts: bytes, leave_after_s: float | None = None, holds: bool = False) -> Reply:
    """Return what a client makes of these bytes; `holds`: the server then says nothing more."""

    async def scenario() -> Reply:
        is_over = asyncio.Event()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"".join(parts))
            if holds:
                await is_over.wait()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            api = Api("127.0.0.1", port, "key", "model")
            reply = await ask(api, REQUEST, leave_after_s=leave_after_s)
            is_over.set()
        return reply

    return asyncio.run(scenario())


def test_ending_when_a_stream_is_complete_is_whole() -> None:
    reply = answered_with(HEAD, TOKEN, TOKEN, DONE)
    assert reply.content.tokens == (7, 7)
    assert rollout._ending(reply, 2) == "whole"


@pytest.mark.parametrize(
    "parts",
    [
        (),  # Hung up without a word.
        (HEAD[:20],),
        (HEAD, TOKEN),
        (HEAD, TOKEN, DONE),  # Says that it is whole, and lacks a token.
    ],
)
def test_ending_when_an_answer_stops_early_is_cut_short(parts: tuple[bytes, ...]) -> None:
    assert rollout._ending(answered_with(*parts), 2) == "cut short"


def test_ending_when_an_error_event_comes_is_a_clear_error() -> None:
    error = b'event: error\ndata: {"error": {"message": "gone"}}\n\n'
    assert rollout._ending(answered_with(HEAD, TOKEN, error, DONE), 2) == "clear error 200"


def test_ending_when_refused_is_a_clear_error() -> None:
    refused = b'HTTP/1.1 503 Service Unavailable\r\n\r\n{"error": {"message": "later"}}'
    assert rollout._ending(answered_with(refused), 2) == "clear error 503"


def test_ask_when_it_leaves_keeps_what_it_received() -> None:
    reply = answered_with(HEAD, TOKEN, leave_after_s=0.3, holds=True)
    content = reply.content
    assert (content.tokens, content.is_whole, reply.failure) == ((7,), False, None)


def test_read_when_an_event_comes_in_two_parts_is_timed_by_the_second() -> None:
    received = [(1.0, HEAD + TOKEN + TOKEN[:9]), (2.0, TOKEN[9:]), (3.0, TOKEN + DONE)]
    content = read(received)
    assert content.times_s == (1.0, 2.0, 3.0)
    assert content.is_whole


def test_read_when_headers_are_not_complete_says_nothing() -> None:
    assert read([(1.0, HEAD[:-1])]) == Content()


def counted(busy_s: float) -> Callable[[], float]:
    """Return the processor time of a process that works for a while, then idles."""
    start_s = time.perf_counter()
    return lambda: min(time.perf_counter() - start_s, busy_s)


@pytest.mark.parametrize("busy_s", [0.0, 0.3])
def test_work_after_when_a_process_goes_on_says_how_long(busy_s: float) -> None:
    found_s = cancel._work_after(counted(busy_s), time.perf_counter())
    assert busy_s <= found_s <= busy_s + 4 * cancel._SAMPLE_S


def test_share_within_when_answers_are_late_short_or_uneven_counts_the_good_ones() -> None:
    times = [(0.5, 0.55), (1.5, 1.55), (0.5,), (0.5, 1.5), ()]
    answers = Answers((REQUEST,) * len(times), tuple(times))
    assert answers.share_within(Limit(first_token_s=1.0, between_tokens_s=0.1)) == 1 / 5


@pytest.mark.parametrize("rate_per_s", [0.5, 3.0])
def test_poisson_when_drawn_has_the_rate_and_at_every_rate_the_same_lengths(
    rate_per_s: float,
) -> None:
    requests = poisson(rate_per_s, 20.0, 1000)
    assert len(requests) == 20 * rate_per_s
    assert all(0 <= a.at_s <= b.at_s < 20 for a, b in itertools.pairwise(requests))
    others = poisson(5.0, 20.0, 1000)[: len(requests)]
    assert [lengths(r) for r in requests] == [lengths(r) for r in others]
    assert not {r.prompt for r in requests} & {r.prompt for r in others}
    assert lengths(requests[0]) != lengths(poisson(rate_per_s, 20.0, 1000, turn=1)[0])


def lengths(request: Request) -> tuple[int, int]:
    return len(request.prompt), request.max_tokens


def test_claims_when_a_peer_is_faster_alone_divide_by_the_fastest_of_each_kind() -> None:
    case = peers.Case(32, 128, 64)
    (claim,) = peers.claims([case, peers.Case(1, 2, 3)])
    assert claim.key == "batch32_vs_best_peer"

    def rates(**by_name: float) -> dict[str, dict[str, dict[str, float]]]:
        return {name: {case.name: {"tokens_per_s": rate}} for name, rate in by_name.items()}

    slow = rates(**{peer.name: 10.0 for peer in peers.PEERS})
    engines = {
        **slow,
        **rates(**{"raysmith-w8a8": 300.0, "vllm-w8a8": 200.0, "openvino-int8": 170.0}),
    }
    assert sorted(claim.near_best(engines)) == ["openvino-int8", "vllm-w8a8"]
    assert claim.ratio(engines, engines) == 1.5
    alone = rates(**{"vllm-w8a8": 210.0, "openvino-int8": 240.0})
    assert claim.ratio(engines, alone) == 1.25
