"""Two versions asked the same prompts, over a server that answers for both."""

from collections.abc import Iterator

import pytest
from prompt_server import PromptServer, running_server

from jobs.evaluation.parity import Endpoint
from serving.comparison import Comparison

OLD, NEW, PROMPTS = "tiny@1", "tiny@2", ("once", "twice")


@pytest.fixture
def server() -> Iterator[PromptServer]:
    with running_server() as state:
        state.answers = {(OLD, "once"): "a", (OLD, "twice"): "b"}
        yield state


def compared(server: PromptServer) -> tuple[int, int]:
    endpoint = Endpoint(f"http://127.0.0.1:{server.port}/v1", "key", NEW)
    comparison = Comparison(endpoint, OLD, NEW, PROMPTS, max_tokens=4)
    comparison.ask_some()
    return comparison.num_compared, comparison.num_disagreeing


def test_ask_some_when_one_answer_differs_counts_both_prompts(server: PromptServer):
    server.answers |= {(NEW, "once"): "a", (NEW, "twice"): "c"}
    assert compared(server) == (2, 1)


@pytest.mark.parametrize(("status", "expected"), [(400, (2, 2)), (503, (2, 2)), (429, (0, 0))])
def test_ask_some_when_the_new_version_gives_none_counts_its_failures_only(
    server: PromptServer, status: int, expected: tuple[int, int]
):
    server.missing_status = status
    assert compared(server) == expected


def test_ask_some_when_the_old_version_gives_none_counts_nothing(server: PromptServer):
    server.answers = {(NEW, "once"): "a"}
    assert compared(server) == (0, 0)
