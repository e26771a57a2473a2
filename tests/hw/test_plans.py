"""Clock plans in powerd-hw: beats that are followed, beats that are not, and everything that ends a plan."""

from __future__ import annotations

import os
import signal
import socket
import statistics
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from powerd.clock import NS
from powerd.hw import frames
from powerd.hw.frames import Command, Kind, Table
from powerd.hw.plan import SAFE_INDEX, Order
from powerd.model import ClockPlan, Control, Interval, Verdict
from tests.hw.rig import PATIENCE_S, Powerd, Rig

CLOCKS = (1980, 1200, 900, 600)
SAFE = 1500
CEILING = Interval(210, 1980)


def plan_for(rig: Rig, *, gpu: int = 0, **other: object) -> ClockPlan:
    plan = ClockPlan("p1", rig.uuids[gpu], CLOCKS, SAFE, iteration_s=600.0)
    return replace(plan, **other)  # type: ignore[arg-type]


def held(rig: Rig, ceiling: Interval = CEILING, **more: object) -> Powerd:
    """A powerd whose first GPU's SM clock is wanted below a ceiling."""
    powerd = rig.connect()
    seq = powerd.desire((rig.uuids[0], Control.SM_CLOCK, ceiling), **more)  # type: ignore[arg-type]
    powerd.outcome(seq, rig.uuids[0], Control.SM_CLOCK)
    return powerd


def served(rig: Rig, ceiling: Interval = CEILING, **more: object) -> Powerd:
    rig.serve()
    return held(rig, ceiling, **more)


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
    deadline_calls = 0
    while rig.truth(0)["locked_clocks_mhz"] != [1005, 1980]:
        deadline_calls += 1
        assert deadline_calls < PATIENCE_S * 100
        threading.Event().wait(0.01)


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


# what cuts a plan


def test_a_lower_setpoint_cuts_the_plan_and_its_holder_is_told(rig: Rig) -> None:
    powerd = served(rig)
    beats = powerd.arm(plan_for(rig))
    beats.send(1, 0)
    rig.locked(1980)
    seq = powerd.desire((rig.uuids[0], Control.SM_CLOCK, Interval(210, 1005)))
    rig.locked(1005)
    assert powerd.event("plan_clamped")["data"]["ceiling_mhz"] == 1005
    assert powerd.plan(ceiling_mhz=1005)["state"] == "running"
    assert powerd.outcome(seq, rig.uuids[0], Control.SM_CLOCK).accepted == Interval(1005, 1005)
    beats.send(1, 1)
    beats.send(1, 2)
    rig.locked(900)
    powerd.desire((rig.uuids[0], Control.SM_CLOCK, CEILING))
    powerd.plan(ceiling_mhz=None)
    beats.send(1, 3)
    beats.send(2, 0)
    rig.locked(1980)


def test_the_sites_limits_cut_every_clock_and_follow_a_reload(rig: Rig) -> None:
    rig.configure(extra="[limits]\nsm_clock_min_mhz = 800\nsm_clock_max_mhz = 1600")
    serve = rig.serve()
    powerd = held(rig)
    beats = powerd.arm(plan_for(rig))
    for index, mhz in enumerate((1600, 1200, 900)):
        beats.send(1, index)
        rig.locked(min(mhz, 1590))
    beats.send(1, 3)
    rig.locked(810)
    rig.configure(extra="[limits]\nsm_clock_min_mhz = 1000")
    serve.send_signal(signal.SIGHUP)
    rig.locked(1005)
    beats.send(2, 0)
    rig.locked(1980)


# what ends a plan


def test_a_closed_beat_socket_means_the_safe_clock_until_the_lease_ends(rig: Rig) -> None:
    powerd = served(rig)
    beats = powerd.arm(plan_for(rig))
    beats.send(1, 0)
    rig.locked(1980)
    beats.link.close()
    rig.locked(SAFE)
    powerd.event("plan_safe", verdict="closed")
    assert powerd.plan(state="safe")["why"] == "closed"
    powerd.desire()
    rig.locked(None)
    assert rig.at_baseline()


def test_a_plan_that_is_given_up_leaves_the_setpoint_and_its_holder_hears_it(rig: Rig) -> None:
    powerd = served(rig, Interval(1500, 1500))
    beats = powerd.arm(plan_for(rig))
    beats.send(1, 0)
    beats.send(1, 1)
    rig.locked(1200)
    powerd.disarm()
    rig.locked(1500)
    assert beats.closed()
    assert powerd.plan(state="ended")["why"] == "given up by its holder"
    assert powerd.armed == set()


def test_a_new_plan_takes_over_at_its_first_beat(rig: Rig) -> None:
    powerd = served(rig)
    old = powerd.arm(plan_for(rig))
    old.send(1, 0)
    new = powerd.arm(plan_for(rig, clocks_mhz=(1005, 1110), id="p2"), number=8)
    old.send(1, 1)
    rig.locked(1200)
    new.send(0, 0)
    rig.locked(1005)
    assert old.closed()
    assert powerd.plan(7, state="ended")["why"] == "replaced"
    new.send(0, 1)
    rig.locked(1110)


def test_a_plan_ends_with_its_setpoint_whatever_ends_that(rig: Rig) -> None:
    powerd = served(rig, ttl_s=1.5)
    beats = powerd.arm(plan_for(rig))
    beats.send(1, 0)
    rig.locked(1980)
    powerd.event("restored", cause="setpoint_expired")
    assert rig.at_baseline()
    assert beats.closed()
    assert "setpoint_expired" in powerd.plan(state="ended")["why"]


def test_panic_ends_a_plan(rig: Rig) -> None:
    powerd = served(rig)
    beats = powerd.arm(plan_for(rig))
    beats.send(1, 0)
    rig.locked(1980)
    powerd.command(Command.PANIC)
    powerd.plan(state="ended")
    assert beats.closed()
    rig.locked(None)
    assert rig.at_baseline()


def test_somebody_elses_lock_ends_the_plan_and_is_left_alone(rig: Rig) -> None:
    powerd = served(rig)
    with rig.load(0):
        beats = powerd.arm(plan_for(rig, clocks_mhz=(600,)))
        beats.send(1, 0)
        rig.locked(600)
        rig.node.fault("foreign-lock", 0, value=1800)
        powerd.event("drift")
        powerd.plan(state="ended")
    assert rig.truth(0)["locked_clocks_mhz"] == [1800, 1800]
    assert beats.closed()


def test_a_plan_survives_powerd_within_the_grace_and_is_told_to_the_next_one(rig: Rig) -> None:
    rig.configure(grace_s=30.0)
    powerd = served(rig)
    beats = powerd.arm(plan_for(rig))
    beats.send(1, 0)
    rig.locked(1980)
    powerd.close()
    beats.send(1, 1)
    rig.locked(1200)
    again = rig.connect()
    row = again.plan()
    assert (row["id"], row["lease"], row["uuid"]) == ("p1", "l1", rig.uuids[0])
    seq = again.desire((rig.uuids[0], Control.SM_CLOCK, CEILING))
    again.outcome(seq, rig.uuids[0], Control.SM_CLOCK)
    beats.send(1, 2)
    rig.locked(900)
    assert again.plan(index=2)["state"] == "running"


def test_the_end_of_the_grace_ends_a_plan(rig: Rig) -> None:
    powerd = served(rig)
    beats = powerd.arm(plan_for(rig))
    beats.send(1, 0)
    rig.locked(1980)
    powerd.close()
    assert beats.closed()
    rig.locked(None)
    assert rig.at_baseline()


def test_a_worker_that_died_is_followed_by_one_at_the_safe_clock_until_a_step_begins(rig: Rig) -> None:
    powerd = served(rig)
    beats = powerd.arm(plan_for(rig))
    beats.send(1, 0)
    beats.send(1, 1)
    rig.locked(1200)
    powerd.until(lambda: (powerd.tables.get(Table.STATUS) or {}).get("worker_pid"))
    signal.pidfd_send_signal(os.pidfd_open(powerd.tables[Table.STATUS]["worker_pid"]), signal.SIGKILL)
    powerd.event("worker_died")
    rig.locked(SAFE)
    beats.send(1, 2)  # of the step that the dead worker followed
    assert "restarted" in powerd.plan(state="safe")["why"]
    beats.send(2, 0)
    rig.locked(1980)
    powerd.desire()
    rig.locked(None)
    assert rig.at_baseline()


@pytest.mark.parametrize("point", ["hw.plan.armed", "hw.plan.followed"])
def test_a_worker_killed_while_a_plan_is_armed_or_followed_leaves_no_lock_behind(rig: Rig, point: str) -> None:
    serve = rig.serve("--exit-with-peer", kill_at=point)
    powerd = held(rig)
    beats = powerd.ask_for_plan(plan_for(rig))
    powerd.event("worker_died")
    rig.locked(SAFE)
    beats.send(2, 0)
    rig.locked(1980)
    powerd.close()
    assert serve.wait(PATIENCE_S) == 0
    assert rig.at_baseline()
    assert beats.closed()


def test_a_supervisor_killed_with_a_plan_leaves_no_lock_once_restore_has_run(rig: Rig) -> None:
    serve = rig.serve(kill_at="hw.plan.received:2")
    powerd = held(rig)
    beats = powerd.arm(plan_for(rig))
    beats.send(1, 0)
    rig.locked(1980)
    powerd.disarm()
    assert serve.wait(PATIENCE_S) == -9
    assert beats.closed()
    assert rig.restore()[0] == 0
    assert rig.at_baseline()


# what is not armed


def test_a_plan_without_a_setpoint_is_not_armed(rig: Rig) -> None:
    rig.serve()
    powerd = rig.connect()
    beats = powerd.ask_for_plan(plan_for(rig))
    assert "nothing holds" in powerd.plan(state="ended")["why"]
    assert beats.closed()
    assert rig.at_baseline()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"clocks_mhz": (1980, 5000)}, "clocks_mhz[1]"),
        ({"clocks_mhz": (1980, -1)}, "clocks_mhz[1]"),
        ({"safe_mhz": 100}, "safe_mhz"),
        ({"clocks_mhz": ()}, "instructions"),
        ({"iteration_s": 0.0}, "iteration_s"),
        ({"late_factor": 0.5}, "late_factor"),
        ({"uuid": "GPU-00000000-0000-0000-0000-000000000001"}, "nothing holds"),
    ],
)
def test_hw_checks_every_value_of_a_plan_again(rig: Rig, change: dict[str, object], named: str) -> None:
    powerd = served(rig)
    beats = powerd.ask_for_plan(plan_for(rig, **change))
    assert named in powerd.plan(state="ended")["why"]
    assert beats.closed()


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"do": "arm", "number": 0},
        {"do": "disarm", "number": "7"},
        {"do": "arm", "number": 7, "lease": "l1", "plan": {"id": "p", "clocks_mhz": 5}},
        {
            "do": "arm",
            "number": 7,
            "lease": 1,
            "plan": {"id": "p", "uuid": "g", "clocks_mhz": [1], "safe_mhz": None, "iteration_s": 1},
        },
        [1],
    ],
)
def test_a_plan_frame_that_makes_no_sense_is_refused_and_changes_nothing(rig: Rig, content: object) -> None:
    powerd = served(rig)
    for frame in frames.encode_table(Kind.PLAN, 0, 0, Table.PLAN, content):
        powerd.send(frame)
    powerd.event("frame_refused")
    assert powerd.armed == set()
    beats = powerd.arm(plan_for(rig))
    beats.send(1, 0)
    rig.locked(1980)


def test_a_plan_without_its_socket_is_refused(rig: Rig) -> None:
    powerd = served(rig)
    for frame in frames.encode_table(Kind.PLAN, 0, 0, Table.PLAN, Order(7, "l1", plan_for(rig)).row()):
        powerd.send(frame)
    assert "beat socket" in powerd.event("frame_refused")["detail"]


def test_the_longest_plan_is_armed(rig: Rig) -> None:
    powerd = served(rig)
    clocks = tuple(1980 - 15 * (n % 90) for n in range(65536))
    beats = powerd.arm(plan_for(rig, clocks_mhz=clocks))
    beats.send(1, 0)
    beats.send(1, 1)
    rig.locked(1965)


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
                threading.Event().wait(0.02)
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
