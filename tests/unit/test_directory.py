import asyncio

import msgspec

from serving.directory import OUTCOMES_EXPIRY_S, DirectoryState, LocalDirectory, ReplicaEntry
from serving.engines._protocol import EngineStats
from serving.outcomes import Outcomes
from serving.replica_server import ReplicaAddress

ENTRY = ReplicaEntry(
    "r1", "tiny", "1", ReplicaAddress("n", "/s", "h", 1), b"s", EngineStats(0, 0, 1, 0, 0, 0)
)


def test_snapshot_when_a_replica_reports_names_it_until_it_is_silent():
    state = DirectoryState(expiry_s=5)
    state.report(ENTRY, 0.0)
    assert [entry.replica for entry in state.snapshot(5.0).replicas] == ["r1"]
    assert state.snapshot(5.1).replicas == ()


def test_revision_when_only_load_changes_stays_and_when_draining_begins_changes():
    state = DirectoryState()
    state.report(ENTRY, 0.0)
    before = state.snapshot(0.0).revision
    state.report(msgspec.structs.replace(ENTRY, stats=EngineStats(9, 0, 1, 0, 0, 0)), 0.5)
    assert state.snapshot(0.5).revision == before
    state.report(msgspec.structs.replace(ENTRY, is_draining=True), 0.6)
    assert state.snapshot(0.6).revision == before + 1


def test_leave_when_a_replica_stops_forgets_it_at_once():
    state = DirectoryState()
    state.report(ENTRY, 0.0)
    state.leave("r1")
    state.leave("r1")
    assert state.snapshot(0.0).replicas == ()


def test_lease_when_not_renewed_ends():
    state = DirectoryState()
    state.renew_lease("canary", 10.0, 0.0)
    state.renew_lease("canary", 10.0, 5.0)
    assert state.snapshot(14.9).leases == ("canary",)
    assert state.snapshot(15.0).leases == ()


def test_outcomes_when_gateways_report_are_kept_apart():
    state = DirectoryState()
    state.note_outcomes("a", {"tiny@1": Outcomes(3)}, 0.0)
    state.note_outcomes("b", {"tiny@1": Outcomes(4)}, 0.0)
    state.note_outcomes("a", {"tiny@1": Outcomes(5)}, 1.0)
    assert state.outcomes(1.0) == {"a": {"tiny@1": Outcomes(5)}, "b": {"tiny@1": Outcomes(4)}}


def test_outcomes_when_a_gateway_is_silent_for_long_are_forgotten_until_it_reports_again():
    state = DirectoryState()
    state.note_outcomes("a", {"tiny@1": Outcomes(3)}, 0.0)
    state.note_outcomes("b", {"tiny@1": Outcomes(4)}, 9.0)
    assert set(state.outcomes(OUTCOMES_EXPIRY_S)) == {"a", "b"}
    assert set(state.outcomes(OUTCOMES_EXPIRY_S + 1)) == {"b"}
    state.note_outcomes("a", {"tiny@1": Outcomes(5)}, OUTCOMES_EXPIRY_S + 10)
    assert state.outcomes(OUTCOMES_EXPIRY_S + 10) == {"a": {"tiny@1": Outcomes(5)}}


def test_watch_when_something_changes_answers_at_once_else_when_time_is_over():
    async def work():
        directory = LocalDirectory()
        first = await directory.watch(-1, 10)
        unchanged = await directory.watch(first.revision, 0.01)
        waiting = asyncio.create_task(directory.watch(first.revision, 10))
        await asyncio.sleep(0)
        await directory.report(ENTRY)
        async with asyncio.timeout(1):
            return first, unchanged, await waiting

    first, unchanged, changed = asyncio.run(work())
    assert unchanged.revision == first.revision
    assert [entry.replica for entry in changed.replicas] == ["r1"]
