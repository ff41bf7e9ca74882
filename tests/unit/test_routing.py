import pytest
from pydantic import ValidationError

from serving.routing import Load, Route, RoutingTable, affinity_of, pick


def table(**weights: float) -> RoutingTable:
    routes = [Route(name="tiny", version=v[1:], weight=w) for v, w in weights.items()]
    return RoutingTable(routes=(*routes, Route(name="other", version="1")))


def shares(of: RoutingTable, asked: str = "tiny", **options) -> dict[str, float]:
    """Return how often each version is chosen over evenly spread draws."""
    chosen = [of.choose(asked, i / 100, **options).version for i in range(100)]
    return {version: chosen.count(version) / 100 for version in sorted(set(chosen))}


def test_choose_when_versions_have_weights_follows_them():
    assert shares(table(v1=0.9, v2=0.1)) == {"1": 0.9, "2": 0.1}


def test_choose_when_a_version_is_named_ignores_weights():
    assert shares(table(v1=1, v2=0), "tiny@2") == {"2": 1.0}


def test_choose_when_weight_is_zero_never_chooses_it():
    assert shares(table(v1=0.5, v2=0)) == {"1": 1.0}


def test_choose_when_nothing_fits_is_none():
    assert table(v1=1).choose("large", 0.5) is None
    assert table(v1=0).choose("tiny", 0.5) is None


def test_choose_when_a_lease_has_ended_leaves_all_to_the_others():
    canary = Route(name="tiny", version="2", weight=0.5, lease="canary")
    routes = RoutingTable(routes=(Route(name="tiny", version="1", weight=0.5), canary))
    assert shares(routes, leases={"canary"}) == {"1": 0.5, "2": 0.5}
    assert shares(routes, leases=()) == {"1": 1.0}


def test_choose_when_a_version_is_not_ready_uses_the_others_unless_there_are_none():
    both = table(v1=0.5, v2=0.5)
    assert shares(both, ready={"tiny@2"}) == {"2": 1.0}
    assert shares(both, ready=()) == {"1": 0.5, "2": 0.5}


def test_table_when_a_version_is_there_twice_is_refused():
    with pytest.raises(ValidationError, match="`tiny@1` twice"):
        RoutingTable(routes=(Route(name="tiny", version="1"), Route(name="tiny", version="1")))


def test_pick_when_loads_differ_takes_the_least():
    loads = [Load("a", 5000), Load("b", 900), Load("c", 3000)]
    assert {pick(loads, affinity_of("t", str(i))).replica for i in range(20)} == {"b"}


def test_pick_when_loads_are_close_keeps_an_affinity_and_spreads_several():
    loads = [Load("a", 100), Load("b", 0), Load("c", 300)]
    assert len({pick(loads, affinity_of("t", "same")).replica for _ in range(20)}) == 1
    assert {pick(loads, affinity_of("t", str(i))).replica for i in range(40)} == {"a", "b", "c"}


def test_pick_when_a_replica_goes_moves_only_its_own():
    loads = [Load(name, 0) for name in "abcd"]
    affinities = [affinity_of("t", str(i)) for i in range(200)]
    before = {a: pick(loads, a).replica for a in affinities}
    after = {a: pick(loads[:-1], a).replica for a in affinities}
    assert all(after[a] == before[a] for a in affinities if before[a] != "d")


def test_affinity_when_only_the_end_of_a_long_prompt_differs_is_equal():
    prefix = "You are helpful. " * 40
    assert affinity_of("t", prefix + "a") == affinity_of("t", prefix + "b")
    assert affinity_of("t", prefix) != affinity_of("u", prefix)
