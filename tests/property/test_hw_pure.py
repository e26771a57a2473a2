"""The pure parts of powerd-hw: wire, desired table, bounds, verification, energy."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerd.clock import NS
from powerd.errors import DeviceError
from powerd.hw import bounds, frames, verify
from powerd.hw.desired import DesiredTable
from powerd.hw.energy import EnergyTracker
from powerd.hw.frames import Desired, FrameError
from powerd.hw.port import Fast
from powerd.hw.worker import CAUSES
from powerd.model import Control, EnergyMethod, Health, Interval, Outcome, Reading, Restart, Verdict
from tests.property.hw_memory import CLOCKS, HandClock, Hands, MemoryGpu, config, place, reading

UUID = MemoryGpu(0).gpu.uuid
u32, u64, u16 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**16 - 1)
some = st.none()
readings = st.builds(
    Reading, uuid=st.uuids().map(lambda u: f"GPU-{u}"), time_ns=u64, health=st.sampled_from(Health), epoch=u32,
    energy_mj=some | u64, energy_time_ns=some | u64, power_mw=some | u32, power_average_mw=some | u32,
    sm_clock_mhz=some | u16, memory_clock_mhz=some | u16,
    temperature_c=some | st.integers(-50, 150), utilization_percent=some | st.integers(0, 100), memory_used_bytes=some | u64,
    memory_total_bytes=some | u64, power_limit_requested_mw=some | u32, power_limit_enforced_mw=some | u32,
    clock_event_reasons=some | u32, energy_method=st.sampled_from(EnergyMethod),
)  # fmt: skip
intervals = st.tuples(u32, u32).map(lambda p: Interval(min(p), max(p)))
desired = st.builds(
    Desired, uuid=st.uuids().map(lambda u: f"GPU-{u}"), control=st.sampled_from(Control), value=some | intervals, expiry_ns=u64,
    dwell_ms=u16, tag=u64,
)  # fmt: skip
outcomes = st.builds(
    Outcome, uuid=st.uuids().map(lambda u: f"GPU-{u}"), control=st.sampled_from(Control), seq=u32, requested=some | intervals,
    verdict=st.sampled_from(Verdict), accepted=some | intervals, enforced=some | u32, observed=some | u32,
    nvml_code=st.integers(0, 999), detail=st.text("abc é", max_size=40).map(str.strip), received_ns=u64, called_ns=u64,
    returned_ns=u64, verified_ns=u64,
)  # fmt: skip


@given(st.lists(readings, max_size=16), u32, u64)
def test_snapshots_survive_the_wire(rows: list[Reading], seq: int, time_ns: int) -> None:
    frame = frames.encode_snapshot(seq, time_ns, rows)
    assert frames.decode_snapshot(frame) == tuple(rows)
    assert frames.header(frame) == frames.Header(frames.Kind.SNAPSHOT, seq, time_ns)


@given(st.lists(desired, max_size=32), st.lists(outcomes, max_size=32))
def test_tables_and_outcomes_survive_the_wire(rows: list[Desired], results: list[Outcome]) -> None:
    assert frames.decode_desired(frames.encode_desired(1, 2, rows)) == tuple(rows)
    assert frames.decode_outcomes(frames.encode_outcomes(1, 2, results)) == tuple(results)


@given(
    st.binary(max_size=300) | st.binary(max_size=200).map(lambda b: frames.encode_command(1, 2, frames.Command.PANIC)[:16] + b)
)
def test_no_bytes_do_worse_than_a_frame_error(data: bytes) -> None:
    for decode in (frames.header, frames.decode_snapshot, frames.decode_desired, frames.decode_outcomes, frames.decode_command):
        with suppress(FrameError):
            decode(data)
    with suppress(FrameError):
        frames.TableReader().feed(data)


rows = st.lists(
    st.tuples(st.sampled_from(Control), st.integers(1, 100)).map(lambda p: Desired(UUID, p[0], Interval(1, 2), p[1] * NS)),
    max_size=3, unique_by=lambda r: r.control,
)  # fmt: skip


@given(rows, rows, st.integers(0, 120))
def test_what_expired_is_never_asked_for_and_says_why_it_ended(first: list[Desired], second: list[Desired], now_s: int) -> None:
    table = DesiredTable(grace_ns=5 * NS)
    table.submit(1, first, 0)
    table.rows()
    table.submit(2, second, now_s * NS)
    got = {r.control: r for r in table.rows()}
    for row in second:
        if row.expiry_ns <= now_s * NS:
            assert got[row.control].value is None
            assert CAUSES[got[row.control].tag] is Restart.SETPOINT_EXPIRED
        else:
            assert got[row.control].value == row.value
    for row in first:
        if row.control not in {r.control for r in second}:
            assert got[row.control].value is None
            assert CAUSES[got[row.control].tag] is Restart.LEASE_END


@given(rows.filter(bool), st.integers(0, 10))
def test_grace_ends_everything_unless_a_table_came(given_rows: list[Desired], back_s: int) -> None:
    table = DesiredTable(grace_ns=5 * NS)
    far = [Desired(r.uuid, r.control, r.value, 1_000 * NS) for r in given_rows]
    table.submit(1, far, 0)
    table.peer_gone(0)
    table.expire(back_s * NS)
    alive = {r.control for r in table.rows() if r.value is not None}
    assert alive == (set() if back_s >= 5 else {r.control for r in far})
    table.submit(2, far, back_s * NS)
    table.expire(50 * NS)
    assert {r.control for r in table.rows() if r.value is not None} == {r.control for r in far}


def test_panic_holds_until_release() -> None:
    table = DesiredTable(grace_ns=5 * NS)
    row = Desired(UUID, Control.POWER_LIMIT, Interval(1, 1), 1_000 * NS)
    table.submit(1, [row], 0)
    table.drop("panic", Restart.PANIC)
    assert [(r.value, CAUSES[r.tag]) for r in table.rows()] == [(None, Restart.PANIC)]
    table.submit(2, [row], 1)
    assert [r for r in table.rows() if r.value is not None] == []


def test_three_crashes_within_a_minute_are_a_loop_and_three_in_an_hour_are_not() -> None:
    table = DesiredTable(grace_ns=5 * NS)
    assert [table.worker_died(n * NS) for n in (0, 20, 40)] == [False, False, True]
    slow = DesiredTable(grace_ns=5 * NS)
    assert [slow.worker_died(n * 1200 * NS) for n in range(3)] == [False, False, False]


@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 2500), st.integers(0, 2500))
def test_admitted_clocks_are_supported_and_within_the_site(a: int, b: int, low: int, high: int) -> None:
    low, high = min(low, high), max(low, high)
    limits = config(f"[limits]\nsm_clock_min_mhz = {low}\nsm_clock_max_mhz = {high}").limits
    wish, device = Interval(min(a, b), max(a, b)), MemoryGpu(0).capabilities()
    if not [c for c in CLOCKS if low <= c <= (high or 10**6)]:
        with pytest.raises(DeviceError):
            bounds.admit(wish, Control.SM_CLOCK, device, limits)
        return
    got = bounds.admit(wish, Control.SM_CLOCK, device, limits)
    assert got.low in CLOCKS
    assert got.high in CLOCKS
    assert low <= got.low <= got.high <= (high or 10**6)


@given(st.lists(st.tuples(st.integers(0, 10**7), st.integers(1, 10**10)), min_size=2, max_size=30))
def test_energy_never_falls_within_an_epoch(samples: list[tuple[int, int]]) -> None:
    for counter in (True, False):
        tracker, now_ns, seen = EnergyTracker(1, counter=counter, limit_mw=700_000), 0, []
        for energy_mj, step_ns in samples:
            now_ns += step_ns
            tracker.feed(now_ns, Fast(energy_mj=energy_mj, power_mw=energy_mj % 700_000))
            seen.append((tracker.epoch, tracker.energy_mj))
        for (epoch, energy), (later_epoch, later) in pairwise(seen):
            assert later_epoch >= epoch
            assert energy is not None
            assert later is not None
            assert later_epoch > epoch or later >= energy


def test_a_fall_is_an_epoch_also_across_processes_and_an_impossible_jump_too() -> None:
    tracker = EnergyTracker(4, counter=True, limit_mw=700_000, last_mj=1_000_000)
    tracker.feed(NS, Fast(energy_mj=500))
    assert tracker.epoch == 5
    tracker.feed(2 * NS, Fast(energy_mj=500 + 700_000))
    assert tracker.epoch == 5
    tracker.feed(3 * NS, Fast(energy_mj=10**9))
    assert tracker.epoch == 6


def test_integration_is_exact_for_a_steady_draw_and_skips_holes() -> None:
    tracker = EnergyTracker(1, counter=False, limit_mw=None)
    for n in range(101):
        tracker.feed(n * NS // 10, Fast(power_mw=300_000))
    assert tracker.energy_mj == 3_000_000
    tracker.feed(60 * NS, Fast(power_mw=300_000))
    assert (tracker.epoch, tracker.energy_mj) == (2, 3_000_000)


def test_a_clock_is_only_judged_under_load_and_says_who_overrides_it() -> None:
    lock = Interval(1500, 1500)
    idle = reading(UUID, 10 * NS, sm_clock_mhz=345, clock_event_reasons=1)
    assert verify.clock(lock, 345, idle, 0).verdict is Verdict.PENDING_LOAD
    capped = reading(UUID, 10 * NS, sm_clock_mhz=1300, clock_event_reasons=4, utilization_percent=99)
    assert verify.clock(lock, 1300, capped, 0) == verify.Finding(Verdict.OVERRIDDEN, "by sw_power_cap", observed=1300)
    gone = reading(UUID, 10 * NS, sm_clock_mhz=1980, clock_event_reasons=0, utilization_percent=99)
    assert verify.clock(lock, 1980, gone, 0).drift
    early = verify.clock(lock, 1980, gone, 10 * NS - NS // 2)
    assert (early.verdict, early.drift) == (Verdict.PENDING_LOAD, False)


def test_drift_yields_once_and_a_new_wish_is_tried_again() -> None:
    with place() as directory:
        gpu = MemoryGpu(0)
        hands = Hands([gpu], directory, config(), HandClock())
        hands.want(0, {Control.POWER_LIMIT: Interval(300_000, 300_000)})
        hands.settle()
        gpu.limit_mw = 650_000
        hands.observe(0)
        hands.observe(0)
        hands.settle()
        assert [kind for kind, _ in hands.events] == ["drift"]
        assert gpu.limit_mw == 650_000
        hands.want(0, {Control.POWER_LIMIT: Interval(350_000, 350_000)}, seq=2)
        hands.settle()
        assert gpu.limit_mw == 350_000
        hands.want(0, {}, seq=3)
        hands.settle()
        assert gpu.limit_mw == 650_000  # theirs is what was found before the new first write


def test_enforcing_pauses_longer_each_time_so_that_no_war_of_writers_begins() -> None:
    with place() as directory:
        gpu = MemoryGpu(0)
        hands = Hands([gpu], directory, config('[hw]\ndrift = "enforce"'), HandClock())
        hands.want(0, {Control.POWER_LIMIT: Interval(300_000, 300_000)})
        hands.actuators[0].step()
        for _ in range(60):  # somebody sets it back every second
            gpu.limit_mw = 650_000
            hands.observe(0)
            hands.actuators[0].step()
        assert 3 <= len(gpu.calls) <= 9
