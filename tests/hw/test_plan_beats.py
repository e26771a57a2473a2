"""Clock plans in powerd-hw: beats that are followed, beats that are not, at which moments, and what is told of them."""

from __future__ import annotations

import socket
import statistics
import threading
from collections.abc import Callable

import pytest

from powerd.clock import NS
from powerd.hw.plan import SAFE_INDEX
from powerd.model import Control, Interval, Verdict
from tests.hw.planrig import CEILING, CLOCKS, SAFE, plan_for, served
from tests.hw.rig import Powerd, Rig, truth_until

# beats


def test_every_beat_sets_its_clock_and_the_step_comes_round(rig: Rig) -> None:
    powerd = served(rig)
    beats = powerd.arm(plan_for(rig))
    rig.locked(SAFE)
    for step in (4, 5, 9):
        for index, mhz in enumerate(CLOCKS):
            beats.send(step, index)
            rig.locked(mhz)
    row = powerd.plan(state="running", step=9, index=3)
    assert row["switches"] == 1 + 3 * len(CLOCKS)
    assert row["beats"] == {"begin": 3, "next": 9}
    assert not [e for e in powerd.events if e["kind"] == "plan_safe"]


@pytest.mark.parametrize("wrong", [(1, 2), (1, 0), (2, 0), (0, 1), (1, 7), (1, 0xFFFFFFFE)])
def test_a_wrong_beat_means_the_safe_clock_and_one_event_until_a_later_step_begins(rig: Rig, wrong: tuple[int, int]) -> None:
    powerd = served(rig)
    beats = powerd.arm(plan_for(rig))
    beats.send(1, 0)
    rig.locked(1980)
    beats.send(*wrong)
    rig.locked(SAFE)
    event = powerd.event("plan_safe", verdict="wrong")
    assert "step 1, index 0" in event["detail"]
    beats.step(1, 4)  # the rest of the spoilt step says nothing more
    beats.send(1, 0)
    beats.send(3, 0)
    rig.locked(1980)
    row = powerd.plan(state="running", step=3)
    assert row["beats"]["wrong"] == 1
    assert row["beats"]["ignored"] == 5
    assert len([e for e in powerd.events if e["kind"] == "plan_safe"]) == 1


def test_the_holder_asks_for_the_safe_clock_and_nobody_is_alarmed(rig: Rig) -> None:
    powerd = served(rig)
    beats = powerd.arm(plan_for(rig))
    beats.send(1, 0)
    rig.locked(1980)
    beats.send(1, SAFE_INDEX)
    rig.locked(SAFE)
    assert powerd.plan(state="safe")["why"] == "asked"
    beats.send(2, 0)
    rig.locked(1980)
    assert not [e for e in powerd.events if e["kind"] == "plan_safe"]


def test_without_a_safe_clock_the_setpoints_own_bounds_hold(rig: Rig) -> None:
    powerd = served(rig, Interval(1005, 1980))
    beats = powerd.arm(plan_for(rig, safe_mhz=None))
    beats.send(0, 0)
    rig.locked(1980)
    beats.send(0, 3)
    powerd.plan(state="safe")
    truth_until(rig, lambda: rig.truth(0)["locked_clocks_mhz"] == [1005, 1980])


@pytest.mark.parametrize("message", [b"x", b"\0" * 11, b"\0" * 13, b"\xff" * 12, b"y" * 5000])
def test_a_malformed_beat_is_a_wrong_beat(rig: Rig, message: bytes) -> None:
    powerd = served(rig)
    beats = powerd.arm(plan_for(rig))
    beats.send(1, 0)
    rig.locked(1980)
    beats.raw(message)
    rig.locked(SAFE)
    assert powerd.plan(state="safe")["beats"]["wrong"] == 1
    beats.send(2, 0)
    rig.locked(1980)


def test_a_flood_of_beats_stops_neither_the_others_nor_the_readings(rig: Rig) -> None:
    powerd = served(rig)
    powerd.desire((rig.uuids[0], Control.SM_CLOCK, CEILING), (rig.uuids[1], Control.SM_CLOCK, CEILING))
    flooder, other = powerd.arm(plan_for(rig)), powerd.arm(plan_for(rig, gpu=1, id="p2"), number=8)
    over = threading.Event()

    def flood() -> None:
        number = 0
        while not over.is_set():
            number += 1
            try:
                flooder.link.send(b"\0" * (number % 20 + 1), socket.MSG_DONTWAIT)
            except BlockingIOError:
                threading.Event().wait(0.001)

    flooder.link.setblocking(True)
    thread = threading.Thread(target=flood)
    thread.start()
    try:
        powerd.plan(state="safe")
        before = powerd.snapshots
        for step in range(3):
            for index, mhz in enumerate(CLOCKS):
                other.send(step, index)
                rig.locked(mhz, gpu=1)
        powerd.until(lambda: powerd.snapshots > before + 3)
    finally:
        over.set()
        thread.join()
    flooder.send(1, 0)
    rig.locked(1980)


def test_beats_faster_than_the_driver_end_at_the_newest(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(latency=3.0)
    powerd = served(rig)
    beats = powerd.arm(plan_for(rig, clocks_mhz=tuple(range(600, 1800, 15))))
    rig.locked(SAFE)
    calls = rig.truth(0)["setter_calls"]
    beats.step(1, 80)
    rig.locked(1785)
    assert rig.truth(0)["setter_calls"] - calls < 40, "a clock that was overtaken was set all the same"
    assert powerd.plan(index=79)["beats"]["next"] == 79


# time


def test_a_late_beat_means_the_safe_clock_at_its_exact_moment(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(time="stepped", gpus=1, latency=0.0)
    powerd = served(rig)
    beats = powerd.arm(plan_for(rig, iteration_s=4.0, late_factor=2.5))
    waiter = rig.clock.waiter("test")
    begin_ns = rig.clock.now_ns() // NS * NS + 2 * NS
    threading.Thread(target=drain, args=(powerd,), daemon=True).start()
    waiter.wait_until(begin_ns)
    beats.send(1, 0)
    found = []
    for at_ns in (begin_ns + NS // 1000, begin_ns + 10 * NS - 1, begin_ns + 10 * NS + NS // 1000):
        waiter.wait_until(at_ns)
        found.append(rig.truth(0)["locked_clocks_mhz"])
    waiter.close()
    assert found == [[1980, 1980], [1980, 1980], [SAFE, SAFE]]


def drain(powerd: Powerd) -> None:
    """Somebody has to read, or stepped time stands still."""
    try:
        while powerd.take():
            pass
    except OSError:
        pass


def test_clocks_change_in_the_bubble_at_exact_times(make_rig: Callable[..., Rig]) -> None:
    """The end of instruction k announces k+1: its clock is in force one driver latency later, at no other time."""
    rig = make_rig(time="stepped", gpus=1, latency=1.0)
    powerd = served(rig)
    beats = powerd.arm(plan_for(rig))
    threading.Thread(target=drain, args=(powerd,), daemon=True).start()
    waiter = rig.clock.waiter("test")
    begin_ns = rig.clock.now_ns() // NS * NS + 2 * NS
    delays_ms: list[float] = []
    for n in range(24):
        at_ns = begin_ns + n * NS // 10
        waiter.wait_until(at_ns)
        beats.send(1 + n // 4, n % 4)
        wanted = [CLOCKS[n % 4]] * 2
        assert rig.truth(0)["locked_clocks_mhz"] != wanted, "before the driver has been told"
        for tick in range(1, 400):
            waiter.wait_until(at_ns + tick * NS // 4000)
            if rig.truth(0)["locked_clocks_mhz"] == wanted:
                delays_ms.append(tick / 4)
                break
        waiter.wait_until(at_ns + 99 * NS // 1000)
        assert rig.truth(0)["locked_clocks_mhz"] == wanted
    waiter.close()
    assert len(delays_ms) == 24
    assert 3.0 < statistics.fmean(delays_ms) < 7.5, "the driver's own 5 ms (4.5 at the median), and nothing of ours"
    assert sorted(delays_ms)[-3] < 20.0


# what is known of it


def test_a_running_plan_is_verified_and_told_once_a_second_at_most(rig: Rig) -> None:
    powerd = served(rig)
    beats = powerd.arm(plan_for(rig))
    told = len(powerd.outcomes)
    begin_ns = rig.clock.now_ns()
    with rig.load(0):
        for step in range(1, 26):
            for index in range(4):
                beats.send(step, index)
                threading.Event().wait(0.02)  # two seconds of a plan: what is told "once a second" is seen twice
        seq = powerd.seq
        powerd.outcome(seq, rig.uuids[0], Control.SM_CLOCK, Verdict.APPLIED)
    took_s = (rig.clock.now_ns() - begin_ns) / NS
    assert len(powerd.outcomes) - told <= took_s * 1.0 + 6, "one outcome per beat would be a hundred"
    assert powerd.outcomes[-1].verdict is Verdict.APPLIED
    assert not [e for e in powerd.events if e["kind"] == "drift"]


def test_a_set_that_fails_is_told_at_once(rig: Rig) -> None:
    powerd = served(rig)
    beats = powerd.arm(plan_for(rig))
    rig.locked(SAFE)
    rig.node.fault("rule", 0, function="nvmlDeviceSetGpuLockedClocks", code=999, count=1)
    beats.send(1, 0)
    outcome = powerd.outcome(powerd.seq, rig.uuids[0], Control.SM_CLOCK, Verdict.FAILED)
    assert outcome.nvml_code == 999
    rig.locked(1980)
