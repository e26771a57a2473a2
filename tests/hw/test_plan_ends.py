"""Clock plans in powerd-hw: everything that cuts one and everything that ends one."""

from __future__ import annotations

import os
import signal

import pytest

from powerd.hw.frames import Command, Table
from powerd.model import Control, Interval
from tests.hw.planrig import CEILING, SAFE, held, plan_for, served
from tests.hw.rig import PATIENCE_S, Rig

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
