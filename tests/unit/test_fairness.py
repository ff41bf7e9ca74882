"""What a small team feels of a large one, on a clock that a pass moves by what it would cost."""

import pytest
from engine_fakes import VOCABULARY, Clock, scheduler_with, sequence

from serving.engines.native.answers import append

# Of a 0.4-billion-parameter model in int8 on 2 CPU cores: reading the weights once, and each token.
PASS_S, TOKEN_S = 8.5e-3, 0.4e-3
PROMPT, ANSWER = 128, 64


class Office:
    """Teams that send a request whenever one of theirs is done; `load` is how many at a time."""

    def __init__(self, load: dict[str, int], num_prompt=None, **limits) -> None:
        self.num_prompt = num_prompt or {}
        self.scheduler = scheduler_with([], slots=32, tokens=512, **limits)
        self.clock: Clock = self.scheduler._clock
        self.sent_s = {}
        self.latencies_s = {team: [] for team in load}
        for team, num in load.items():
            for _ in range(num):
                self.send(team)

    def send(self, team: str) -> None:
        each = sequence(self.num_prompt.get(team, PROMPT), ANSWER, tenant=team)
        self.sent_s[each] = self.clock.now_s
        self.scheduler.add(each)

    def work(self, duration_s: float) -> None:
        stop_s = self.clock.now_s + duration_s
        while self.clock.now_s < stop_s:
            pieces = self.scheduler.schedule()
            self.clock.now_s += PASS_S + TOKEN_S * sum(piece.length for piece in pieces)
            for piece in pieces:
                chunk = append(piece.sequence, [0], (), VOCABULARY) if piece.is_last else None
                self.scheduler.advance(piece)
                if chunk is not None and chunk.finish_reason is not None:
                    self._done(piece.sequence)

    def _done(self, each) -> None:
        self.scheduler.finish(each)
        self.latencies_s[each.tenant].append(self.clock.now_s - self.sent_s.pop(each))
        self.send(each.tenant)

    def p95_s(self, team: str) -> float:
        latencies_s = sorted(self.latencies_s[team])
        return latencies_s[int(0.95 * len(latencies_s))]


@pytest.fixture(scope="module")
def alone_s() -> float:
    office = Office({"small": 1}, max_shared_tokens=8)
    office.work(12.0)
    return office.p95_s("small")


def test_schedule_when_a_team_has_fifty_times_the_load_slows_a_small_one_by_half_at_most(alone_s):
    office = Office({"large": 50, "small": 1}, max_shared_tokens=8)
    office.work(20.0)
    assert office.p95_s("small") < 1.5 * alone_s
    assert len(office.latencies_s["large"]) >= 2 * len(office.latencies_s["small"])


def test_schedule_when_sharing_is_unbounded_slows_the_small_team_more(alone_s):
    office = Office({"large": 50, "small": 1}, max_shared_tokens=None)
    office.work(20.0)
    assert office.p95_s("small") > 1.5 * alone_s


def test_schedule_when_teams_have_equal_loads_serves_them_equally():
    office = Office({"a": 30, "b": 30}, max_shared_tokens=8)
    office.work(40.0)
    num_a, num_b = (len(office.latencies_s[team]) for team in "ab")
    assert num_a == pytest.approx(num_b, rel=0.1)


def test_schedule_when_a_team_sends_longer_prompts_serves_it_fewer_of_them():
    office = Office({"short": 30, "long": 30}, {"long": 4 * PROMPT}, max_shared_tokens=8)
    office.work(40.0)
    num_short, num_long = (len(office.latencies_s[team]) for team in ("short", "long"))
    tokens = [num_short * (PROMPT + ANSWER), num_long * (4 * PROMPT + ANSWER)]
    assert tokens[0] == pytest.approx(tokens[1], rel=0.25)
    assert num_short > 2 * num_long
