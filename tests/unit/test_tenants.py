from engine_fakes import sequence

from serving.engines.native.tenants import Tenants, limits


def active(tenants: Tenants, name: str, served: int = 0):
    tenant = tenants.enter(name)
    tenant.waiting.append(sequence(1))
    tenant.served += served
    return tenant


def test_active_when_asked_lists_the_least_served_first():
    tenants = Tenants()
    for name, served in (("a", 5), ("b", 0)):
        active(tenants, name, served)
    assert [tenant.name for tenant in tenants.active()] == ["a", "b"], "b starts where a stood"
    tenants.get("a").served += 1
    assert [tenant.name for tenant in tenants.active()] == ["b", "a"]


def test_enter_when_a_tenant_was_idle_saves_nothing_up():
    tenants = Tenants()
    idle, busy = active(tenants, "idle"), active(tenants, "busy", 100)
    idle.waiting.clear()
    tenants.leave(idle)
    busy.served += 900
    assert active(tenants, "idle").served == 1000


def test_enter_when_a_tenant_is_ahead_keeps_what_it_had():
    tenants = Tenants()
    active(tenants, "slow", 10)
    fast = active(tenants, "fast", 500)
    fast.waiting.clear()
    tenants.leave(fast)
    assert active(tenants, "fast").served == 510


def test_enter_when_all_were_idle_starts_all_alike():
    tenants = Tenants()
    last = active(tenants, "last", 70)
    last.waiting.clear()
    tenants.leave(last)
    assert [active(tenants, name).served for name in ("last", "new")] == [70, 70]


def test_limits_when_nobody_is_heavy_are_the_budget():
    assert limits({"a": 1}, 100, 8) == {"a": 100}
    assert limits({"a": 4, "b": 8}, 100, 8) == {"a": 100, "b": 100}
    assert limits({}, 100, 8) == {}


def test_limits_when_a_tenant_is_heavy_leave_it_little():
    assert limits({"light": 1, "heavy": 50}, 100, 8) == {"light": 100, "heavy": 9}


def test_limits_when_several_are_heavy_share_what_is_left():
    allowed = limits({"light": 2, "big": 9, "bigger": 50}, 100, 7)
    assert allowed == {"light": 100, "big": 2 + 4, "bigger": 2 + 3}


def test_limits_when_sharing_is_unbounded_are_the_budget():
    assert limits({"light": 1, "heavy": 50}, 100, None) == {"light": 100, "heavy": 100}
