"""The reconcile rule: never beyond a higher class's limit, never silently empty, independent of order, idempotent."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from powerd.config import LimitsConfig
from powerd.model import Capabilities, Control, Gpu, Interval, Setpoint, Support, Want, WantClass
from powerd.reconcile import Held, Key, Reconciled, reconcile, site_interval, snap

S = 10**9
SM = tuple(range(210, 1981, 15))
MEMORY = (1593, 2619)


def capabilities(uuid: str = "GPU-a", **changes: Any) -> Capabilities:
    fields: dict[str, Any] = {
        "gpu": Gpu(uuid, 0, "test", "0"), "driver_version": "580", "power_limit_min_mw": 200_000, "power_limit_max_mw": 700_000,
        "power_limit_default_mw": 700_000, "sm_clocks_mhz": SM, "memory_clocks_mhz": MEMORY, "energy_counter": True,
        "persistence": True, "mig": None, "simulated": True, "controls": {c: Support(True) for c in Control},
    }  # fmt: skip
    return Capabilities(**(fields | changes))


GPUS = {"GPU-a": capabilities("GPU-a"), "GPU-b": capabilities("GPU-b", power_limit_default_mw=500_000)}
BOUNDS = {Control.POWER_LIMIT: (100_000, 900_000), Control.SM_CLOCK: (1, 2500), Control.MEMORY_CLOCK: (1000, 3000)}


@st.composite
def wants(draw: st.DrawFn) -> Want:
    control = draw(st.sampled_from(list(Control)))
    low, high = sorted(draw(st.tuples(*[st.integers(*BOUNDS[control])] * 2)))
    kind = draw(st.sampled_from([WantClass.SAFETY, WantClass.BUDGET, WantClass.LEASE, WantClass.POLICY, WantClass.DEFAULT]))
    source = draw(st.sampled_from(["l1", "l2", "l3", "cap", "policy"]))
    uuid = draw(st.sampled_from([*GPUS, "GPU-gone"]))
    dwell = draw(st.sampled_from([None, 0, S]))
    return Want(source, uuid, control, Interval(low, high), kind, "because", draw(st.integers(0, 3)), dwell)


limits = st.builds(
    lambda sm, watts: LimitsConfig(
        sm_clock_min_mhz=sm[0], sm_clock_max_mhz=sm[1], power_limit_min_w=watts[0], power_limit_max_w=watts[1]
    ),
    st.sampled_from([(0, 0), (0, 1500), (900, 0), (600, 1203), (1201, 1209)]),
    st.sampled_from([(0.0, 0.0), (0.0, 450.0), (300.0, 0.0), (250.0, 400.0)]),
)
previous = st.dictionaries(
    st.tuples(st.sampled_from(list(GPUS)), st.just(Control.SM_CLOCK)),
    st.builds(
        Held,
        st.sampled_from([None, Interval(210, 1980), Interval(1200, 1200)]),
        st.sampled_from([frozenset(), frozenset({"l1"}), frozenset({"l1", "cap"})]),
        st.sampled_from([None, 99 * S, 90 * S]),
    ),
)  # fmt: skip
NOW = 100 * S


def run(many: list[Want], site: LimitsConfig, before: dict[Key, Held], now: int = NOW) -> Reconciled:
    return reconcile(many, GPUS, site, before, now, 2 * S)


def admitted(setpoint: Setpoint) -> list[Want]:
    lost = {id(r.want) for r in setpoint.refused}
    return [w for w in setpoint.considered if id(w) not in lost]


def within(value: Interval, want: Want) -> bool:
    """A clock wish between two supported clocks is served by the lower one: only the ceiling binds then."""
    fitted = want.interval
    if want.control is not Control.POWER_LIMIT:
        table = SM if want.control is Control.SM_CLOCK else MEMORY
        snapped = snap(want.interval, table, bound=want.want_class is WantClass.SITE_LIMIT)
        assert snapped is not None
        fitted = snapped
    return fitted.low <= value.low and value.high <= fitted.high


@settings(max_examples=150)
@given(st.lists(wants(), max_size=8), limits, previous)
def test_no_result_leaves_a_limit(many: list[Want], site: LimitsConfig, before: dict[Key, Held]) -> None:
    for (uuid, control), setpoint in run(many, site, before).setpoints.items():
        if setpoint.value is None:
            continue
        device = GPUS[uuid].interval(control)
        assert device is not None
        assert device.low <= setpoint.value.low <= setpoint.value.high <= device.high
        bound = site_interval(site, control)
        unsafe = any(r.want.want_class is WantClass.SITE_LIMIT for r in setpoint.refused)  # only safety goes before the site
        assert unsafe or bound is None or bound.low <= setpoint.value.low <= setpoint.value.high <= bound.high
        if control is not Control.POWER_LIMIT:
            table = SM if control is Control.SM_CLOCK else MEMORY
            assert {setpoint.value.low, setpoint.value.high} <= set(table)
        for want in admitted(setpoint):
            if want.want_class < WantClass.LEASE or setpoint.deferred_until_ns is None:
                assert within(setpoint.value, want)


@settings(max_examples=150)
@given(st.lists(wants(), max_size=8), limits, previous)
def test_every_want_is_served_or_told(many: list[Want], site: LimitsConfig, before: dict[Key, Held]) -> None:
    result = run(many, site, before)
    for want in many:
        setpoint = result.setpoints[want.uuid, want.control]
        refused = [r for r in setpoint.refused if r.want is want]
        if refused:
            assert refused[0].why
        else:
            assert setpoint.winner is not None
            assert setpoint.value is not None or setpoint.deferred_until_ns is not None
    for setpoint in result.setpoints.values():
        assert len(setpoint.considered) >= len(setpoint.refused)
        if setpoint.deferred_until_ns is not None:
            assert setpoint.deferred_until_ns > NOW


@settings(max_examples=150)
@given(st.lists(wants(), max_size=8), limits, previous, st.randoms())
def test_the_order_of_wants_does_not_matter(many: list[Want], site: LimitsConfig, before: dict[Key, Held], random: Any) -> None:
    shuffled = list(many)
    random.shuffle(shuffled)
    assert run(many, site, before) == run(shuffled, site, before)


@settings(max_examples=150)
@given(st.lists(wants(), max_size=8), limits, previous)
def test_applied_twice_is_applied_once(many: list[Want], site: LimitsConfig, before: dict[Key, Held]) -> None:
    once = run(many, site, before)
    again = run(many, site, dict(once.held))
    assert {k: s.value for k, s in again.setpoints.items()} == {k: s.value for k, s in once.setpoints.items()}
    assert again.held == once.held


@settings(max_examples=150)
@given(st.lists(wants(), min_size=1, max_size=6), limits, st.data())
def test_a_step_up_is_never_delayed(many: list[Want], site: LimitsConfig, data: st.DataObject) -> None:
    first = run(many, site, {})
    kept = data.draw(st.lists(st.sampled_from(many), unique=True))
    now = run(kept, site, dict(first.held), NOW + 1)
    undelayed = run(kept, site, {}, NOW + 1)
    for key, setpoint in now.setpoints.items():
        before, target = first.setpoints[key].value, undelayed.setpoints[key].value
        if before is not None and (target is None or target.high >= before.high):
            assert setpoint.value == target


def lease(source: str, low: int, high: int, since: int = 0, dwell: int | None = None, kind: WantClass = WantClass.LEASE) -> Want:
    return Want(source, "GPU-a", Control.SM_CLOCK, Interval(low, high), kind, "test", since, dwell)


def sm(result: Reconciled) -> Setpoint:
    return result.setpoints["GPU-a", Control.SM_CLOCK]


def test_within_a_class_the_lower_ceiling_wins_and_the_loser_is_told_by_whom() -> None:
    setpoint = sm(run([lease("fast", 1500, 1500), lease("slow", 1200, 1200)], LimitsConfig(), {}))
    assert setpoint.value == Interval(1200, 1200)
    assert setpoint.winner == "slow"
    assert [r.want.source for r in setpoint.refused] == ["fast"]
    assert "slow" in setpoint.refused[0].why


def test_a_higher_class_wins_over_a_lower_ceiling() -> None:
    budget = lease("cap", 1500, 1980, kind=WantClass.BUDGET)
    setpoint = sm(run([lease("l1", 1200, 1200), budget], LimitsConfig(), {}))
    assert setpoint.value == Interval(1500, 1980)
    assert [r.want.source for r in setpoint.refused] == ["l1"]


def test_a_second_step_down_waits_for_the_dwell_and_a_declared_dwell_replaces_it() -> None:
    first = run([lease("l1", 1500, 1500)], LimitsConfig(), {})
    down = run([lease("l1", 1200, 1200)], LimitsConfig(), dict(first.held), NOW + S)
    assert sm(down).value == Interval(1500, 1500)
    assert sm(down).deferred_until_ns == NOW + 2 * S == down.next_due_ns()
    assert sm(run([lease("l1", 1200, 1200)], LimitsConfig(), dict(down.held), NOW + 2 * S)).value == Interval(1200, 1200)
    own = run([lease("l1", 1200, 1200, dwell=S // 2)], LimitsConfig(), dict(first.held), NOW + S)
    assert sm(own).value == Interval(1200, 1200)


def test_a_hard_limit_does_not_wait_for_the_dwell() -> None:
    first = run([lease("l1", 1500, 1500)], LimitsConfig(), {})
    capped = run(
        [lease("l1", 300, 1500), lease("cap", 210, 900, kind=WantClass.BUDGET)], LimitsConfig(), dict(first.held), NOW + 1
    )
    value = sm(capped).value
    assert value is not None
    assert value.high == 900


def test_a_value_that_nobody_backs_any_more_does_not_outlive_its_lease() -> None:
    first = run([lease("l1", 1500, 1500)], LimitsConfig(), {})
    other = run([lease("l2", 1200, 1200)], LimitsConfig(), dict(first.held), NOW + S)
    assert sm(other).value is None
    assert sm(other).deferred_until_ns is not None


def test_a_ceiling_alone_never_raises_a_power_limit() -> None:
    want = Want("l1", "GPU-b", Control.POWER_LIMIT, Interval(0, 650_000), WantClass.LEASE, "at most")
    setpoint = run([want], LimitsConfig(), {}).setpoints["GPU-b", Control.POWER_LIMIT]
    assert setpoint.value == Interval(500_000, 500_000)


def test_a_control_that_the_gpu_does_not_offer_is_refused_with_its_reason() -> None:
    gpus = {"GPU-a": capabilities(controls={Control.SM_CLOCK: Support(False, "not before Volta")})}
    result = reconcile([lease("l1", 1200, 1200)], gpus, LimitsConfig(), {}, NOW, 0)
    assert sm(result).value is None
    assert sm(result).refused[0].why == "not before Volta"
