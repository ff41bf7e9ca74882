"""Requests between a gateway's fleet and replicas, over real sockets in one process."""

import asyncio

import pytest
import uvloop
from fleet_fakes import MODEL, CountingReplica, collect, request, setting, tokens

from cluster.accounting import ROLLOUT_TEAM
from serving.engines._protocol import FinishReason
from serving.fleet import Waits
from serving.messages import (
    ENGINE_FAILED,
    Delta,
    Embedded,
    EmbeddingRequest,
    Refused,
    ServedModel,
    Started,
    TokenPrompt,
)
from serving.outcomes import Outcomes, count_above
from serving.routing import Route, RoutingTable


def run(work):
    """Run on the event loop that gateways and replicas use."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(asyncio.wait_for(work, 20))


def break_connections(host) -> None:
    """Break a replica's connections, without a farewell."""
    for session in list(host._server._sessions):
        session._transport.abort()


def kill(host) -> None:
    """Do to a replica's connections what the end of its process would."""
    break_connections(host)
    for server in host._server._servers:
        server.close()
    host._beating.cancel()


def test_generate_when_a_replica_answers_gives_its_events_in_order():
    async def work():
        async with setting(CountingReplica()) as made:
            return await collect(made.fleet.generate(MODEL, request()))

    events = run(work())
    assert events[0] == Started(3)
    assert tokens(events) == list(range(8))
    assert events[-1].finish_reason is FinishReason.LENGTH


def test_generate_when_the_reader_closes_after_the_last_token_counts_an_answered_request():
    async def work():
        replica = CountingReplica()
        async with setting(replica) as made:
            events = made.fleet.generate(MODEL, request())
            async for batch in events:
                if any(isinstance(e, Delta) and e.finish_reason is not None for e in batch):
                    break
            await events.aclose()
            outcomes = made.fleet._outcomes[MODEL.reference]
            return outcomes, replica.num_cancelled, made.fleet._membership.members

    outcomes, num_cancelled, members = run(work())
    assert (outcomes.num_requests, outcomes.num_failed, num_cancelled) == (1, 0, 0)
    assert sum(outcomes.first_token.values()) == 1
    assert [member.tokens_in_flight for member in members] in ([], [0])


@pytest.mark.parametrize(("team", "num_counted"), [("test", 1), (ROLLOUT_TEAM, 0)])
def test_generate_when_a_rollout_asks_does_not_count_as_a_request_of_clients(team, num_counted):
    async def work():
        async with setting(CountingReplica()) as made:
            answer = await collect(made.fleet.generate(MODEL, request(team=team)))
            return answer, made.fleet._outcomes.get(MODEL.reference, Outcomes())

    events, outcomes = run(work())
    assert tokens(events) == list(range(8))
    assert outcomes.num_requests == sum(outcomes.first_token.values()) == num_counted


def test_embed_when_the_encoder_sleeps_is_known_as_one_and_wakes_it():
    async def work():
        sleeping = {"task": "embed", "context_tokens": 128, "scales_to_zero": True}
        async with setting(**sleeping) as made:
            made.on_wake = lambda: made.add(CountingReplica(), MODEL)
            model = made.fleet.choose("tiny")
            answer = await made.fleet.embed(model, EmbeddingRequest((TokenPrompt((1,)),)))
            return model, answer, len(made.woken)

    model, answer, num_woken = run(work())
    assert (model.task, model.context_tokens, num_woken) == ("embed", 128, 1)
    assert answer == Embedded(((1.0,),), 3)


def test_choose_when_a_lease_is_not_renewed_leaves_all_to_the_other_version():
    async def work():
        async with setting(CountingReplica()) as made:
            await made.add(CountingReplica(), ServedModel("tiny", "2", 0))
            await made.ready(2)
            canary = Route(name="tiny", version="2", weight=1.0, lease="canary")
            made.fleet.set_table(RoutingTable(routes=(Route(name="tiny", version="1"), canary)))
            await made.directory.renew_lease("canary", 0.3)
            await asyncio.sleep(0.05)
            before = {made.fleet.choose("tiny").version for _ in range(50)}
            await asyncio.sleep(1.5)  # The directory is asked once a second.
            return before, {made.fleet.choose("tiny").version for _ in range(50)}

    assert run(work()) == ({"1", "2"}, {"1"})


def test_generate_when_many_ask_at_once_keeps_their_answers_apart():
    async def work():
        async with setting(CountingReplica()) as made:
            asked = [made.fleet.generate(MODEL, request(n)) for n in range(1, 40)]
            return await asyncio.gather(*map(collect, asked))

    assert [tokens(events) for events in run(work())] == [list(range(n)) for n in range(1, 40)]


async def lose_first(first, asked, second=None):
    """Return what a reader got whose replica is lost at a pause, and what another was asked."""
    second = second or CountingReplica()
    async with setting(first) as made:
        reading = asyncio.create_task(collect(made.fleet.generate(MODEL, asked)))
        await first.is_paused.wait()
        await made.add(second)
        await made.ready(2)
        kill(made.hosts[0])
        return await reading, second.asked


@pytest.mark.parametrize("at", [0, 1, 4, 7])
def test_generate_when_the_replica_is_lost_continues_on_another(at):
    events, asked = run(lose_first(CountingReplica(pause_at={at}), request()))
    assert tokens(events) == list(range(8))
    assert sum(isinstance(event, Started) for event in events) == 1
    (resumed,) = asked
    assert resumed.resumed == (tuple(range(at)),)


def test_generate_when_lost_with_some_choices_ended_does_not_generate_those_again():
    events, asked = run(lose_first(CountingReplica(pause_at={6}), request(8, 3)))
    assert asked[0].finished == (2,)
    assert [tokens(events, c) for c in range(3)] == [
        [100 * c + i for i in range(8 - c)] for c in range(3)
    ]
    assert sum(isinstance(e, Delta) and e.finish_reason is not None for e in events) == 3


def test_generate_when_the_only_replica_is_lost_waits_for_its_replacement():
    async def work():
        first = CountingReplica(pause_at={3})
        async with setting(first) as made:
            asked = asyncio.create_task(collect(made.fleet.generate(MODEL, request())))
            await first.is_paused.wait()
            kill(made.hosts[0])
            await asyncio.sleep(0.1)
            await made.add(CountingReplica())
            return await asked

    assert tokens(run(work())) == list(range(8))


def test_generate_when_no_replica_comes_back_ends_with_a_clear_refusal():
    async def work():
        first = CountingReplica(pause_at={3})
        async with setting(first, waits=Waits(0.1, 0.1, 0.1)) as made:
            asked = asyncio.create_task(collect(made.fleet.generate(MODEL, request())))
            await first.is_paused.wait()
            kill(made.hosts[0])
            return await asked

    events = run(work())
    assert tokens(events) == [0, 1, 2]
    assert (events[-1].status, events[-1].retry_after_s) == (503, 1)


def test_generate_when_every_engine_fails_gives_up_after_three():
    failing = Refused(503, "the engine stopped", code=ENGINE_FAILED)

    async def work():
        replicas = [CountingReplica(refusal=failing) for _ in range(4)]
        async with setting(*replicas) as made:
            events = await collect(made.fleet.generate(MODEL, request()))
            return events, sum(len(replica.asked) for replica in replicas)

    (refused,), num_asked = run(work())
    assert (refused.status, num_asked) == (503, 3)


def test_generate_when_the_request_is_wrong_asks_no_other_replica():
    async def work():
        wrong = [CountingReplica(refusal=Refused(400, "too long")) for _ in range(2)]
        async with setting(*wrong) as made:
            events = await collect(made.fleet.generate(MODEL, request()))
            return events, sum(len(replica.asked) for replica in wrong)

    assert run(work()) == ([Refused(400, "too long")], 1)


def test_generate_when_a_version_refuses_counts_a_failed_request():
    async def work():
        async with setting(CountingReplica(refusal=Refused(400, "no chat template"))) as made:
            await collect(made.fleet.generate(MODEL, request()))
            return made.fleet._outcomes[MODEL.reference]

    outcomes = run(work())
    assert (outcomes.num_requests, outcomes.num_failed) == (1, 1)


@pytest.mark.parametrize("at", [0, 2])
def test_generate_when_given_up_counts_the_time_that_was_waited(at):
    async def work():
        replica = CountingReplica(pause_at={at})
        async with setting(replica) as made:
            events = made.fleet.generate(MODEL, request())
            reading = asyncio.create_task(collect(events))
            await replica.is_paused.wait()
            await asyncio.sleep(0.25)
            reading.cancel()
            await asyncio.wait([reading])
            await events.aclose()
            return made.fleet._outcomes[MODEL.reference]

    outcomes = run(work())
    times = outcomes.between_tokens if at else outcomes.first_token
    assert count_above(times, 0.08) == 1  # Of 0.25 s, two tokens had come.
    assert outcomes.num_requests == 0


def test_generate_when_a_connection_breaks_goes_on_at_the_same_replica():
    async def work():
        replica = CountingReplica(pause_at={3})
        async with setting(replica) as made:
            asked = asyncio.create_task(collect(made.fleet.generate(MODEL, request())))
            await replica.is_paused.wait()
            replica.pause_at = set()
            break_connections(made.hosts[0])
            return await asked, len(replica.asked)

    events, num_asked = run(work())
    assert tokens(events) == list(range(8))
    assert num_asked == 2


def test_generate_when_the_next_replica_cannot_resume_says_to_try_again():
    refusal = Refused(400, "structured output is not gone on with")
    second = CountingReplica(refusal=refusal)
    events, _ = run(lose_first(CountingReplica(pause_at={3}), request(), second))
    assert tokens(events) == [0, 1, 2]
    assert events[-1] == Refused(503, refusal.message, retry_after_s=1)


class RaisingReplica(CountingReplica):
    """Fails at every request in a way that nobody foresaw."""

    async def generate(self, asked):
        self.asked.append(asked)
        raise RecursionError("too deep")
        yield


def test_generate_when_a_replica_fails_unforeseen_asks_no_other():
    async def work():
        replicas = [RaisingReplica() for _ in range(3)]
        async with setting(*replicas) as made:
            events = await collect(made.fleet.generate(MODEL, request()))
            return events, sum(len(replica.asked) for replica in replicas)

    (refused,), num_asked = run(work())
    assert (refused.status, refused.code, num_asked) == (500, "generation_failed", 1)


def test_generate_when_no_replica_lives_is_503_at_once():
    async def work():
        async with setting(waits=Waits(5, 5, 5)) as made, asyncio.timeout(1):
            return await collect(made.fleet.generate(MODEL, request()))

    (refused,) = run(work())
    assert (refused.status, refused.retry_after_s) == (503, 1)


def test_generate_when_scaled_to_zero_wakes_the_model_and_waits():
    async def work():
        async with setting(scales_to_zero=True, application="engine--tiny--1") as made:
            made.on_wake = lambda: made.add(CountingReplica())
            answers = await asyncio.gather(
                *(collect(made.fleet.generate(MODEL, request())) for _ in range(3))
            )
            return answers, made.woken

    answers, woken = run(work())
    assert [tokens(events) for events in answers] == [list(range(8))] * 3
    assert [route.application for route in woken] == ["engine--tiny--1"]  # Once for all three.


def test_generate_when_the_last_replica_leaves_wakes_the_model_for_what_it_answered():
    async def work():
        first = CountingReplica(pause_at={3})
        async with setting(first, scales_to_zero=True, waits=Waits(0.1, 0.1, 5.0)) as made:
            made.on_wake = lambda: made.add(CountingReplica())
            asked = asyncio.create_task(collect(made.fleet.generate(MODEL, request())))
            await first.is_paused.wait()
            await made.hosts[0].stop(0.05)
            return await asked, len(made.woken)

    events, num_woken = run(work())
    assert tokens(events) == list(range(8))
    assert num_woken == 1


def test_generate_when_closed_early_cancels_at_the_replica():
    async def work():
        replica = CountingReplica(pause_at={2})
        async with setting(replica) as made:
            events = made.fleet.generate(MODEL, request())
            await anext(events)
            await replica.is_paused.wait()
            await events.aclose()
            while not replica.num_cancelled:  # noqa: ASYNC110 - no event to wait for
                await asyncio.sleep(0.005)
            return [m.tokens_in_flight for m in made.fleet._membership.members]

    assert run(work()) == [0]


def test_stop_when_a_stream_runs_lets_it_end_and_takes_nothing_new():
    async def work():
        first, second = CountingReplica(pause_at={4}), CountingReplica()
        async with setting(first) as made:
            running = asyncio.create_task(collect(made.fleet.generate(MODEL, request())))
            await first.is_paused.wait()
            await made.add(second)
            await made.ready(2)
            stopping = asyncio.create_task(made.hosts[0].stop(5))
            await asyncio.sleep(0.05)
            others = [await collect(made.fleet.generate(MODEL, request())) for _ in range(4)]
            assert not stopping.done()
            first.go_on.set()
            events = await running
            await stopping
            return events, others, len(first.asked), first.is_closed

    events, others, num_asked, is_closed = run(work())
    assert [tokens(each) for each in (events, *others)] == [list(range(8))] * 5
    assert (num_asked, is_closed) == (1, True)


def test_stop_when_a_stream_takes_too_long_hands_it_over():
    async def work():
        first, second = CountingReplica(pause_at={4}), CountingReplica()
        async with setting(first) as made:
            running = asyncio.create_task(collect(made.fleet.generate(MODEL, request())))
            await first.is_paused.wait()
            await made.add(second)
            await made.ready(2)
            await made.hosts[0].stop(0.05)
            return await running, second.asked[0].resumed

    events, resumed = run(work())
    assert tokens(events) == list(range(8))
    assert resumed == ((0, 1, 2, 3),)


def test_embed_when_the_replica_is_lost_asks_another():
    asked = EmbeddingRequest((TokenPrompt((1,)), TokenPrompt((2,))))

    async def work():
        first = CountingReplica(pause_at={0})
        async with setting(first) as made:
            answer = asyncio.create_task(made.fleet.embed(MODEL, asked))
            await first.is_paused.wait()
            await made.add(CountingReplica())
            await made.ready(2)
            kill(made.hosts[0])
            return await answer

    assert run(work()) == Embedded(((1.0,), (1.0,)), 3)


def test_fleet_when_the_directory_forgets_a_connected_replica_goes_on_using_it():
    async def work():
        async with setting(CountingReplica()) as made:
            made.hosts[0]._beating.cancel()
            await made.directory.leave(made.hosts[0]._name)
            await asyncio.sleep(0.05)
            return await collect(made.fleet.generate(MODEL, request()))

    assert tokens(run(work())) == list(range(8))


def test_fleet_when_a_stranger_connects_with_a_wrong_secret_is_refused():
    from serving.transport import ReplicaConnection, ReplicaLostError

    async def work():
        async with setting(CountingReplica()) as made:
            address = made.hosts[0]._entry.address
            for node in ("node", "another"):  # By socket and by port.
                with pytest.raises(ReplicaLostError):
                    await ReplicaConnection(b"wrong").open(address, node)
            good = ReplicaConnection(made.hosts[0]._secret)
            await good.open(address, "another")
            good.close()

    run(work())


def test_problem_when_a_version_has_no_replica_names_it():
    async def work():
        async with setting(CountingReplica()) as made:
            before = await made.fleet.problem()
            routes = (Route(name="tiny", version="1"), Route(name="tiny", version="2"))
            made.fleet.set_table(RoutingTable(routes=routes))
            return before, await made.fleet.problem()

    before, after = run(work())
    assert before is None
    assert "tiny@2" in after.message


def test_choose_when_a_version_has_no_replica_prefers_those_that_have():
    async def work():
        async with setting(CountingReplica()) as made:
            routes = (
                Route(name="tiny", version="1", weight=0.01),
                Route(name="tiny", version="2", weight=100),
            )
            made.fleet.set_table(RoutingTable(routes=routes))
            chosen = {made.fleet.choose("tiny").version for _ in range(50)}
            return chosen, made.fleet.choose("tiny@2").version, made.fleet.choose("large")

    assert run(work()) == ({"1"}, "2", None)
