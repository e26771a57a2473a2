"""GPUs and drivers in trouble, and settings that somebody else changes: each GPU on its own."""

from __future__ import annotations

from powerd.model import Control, Health, Verdict
from tests.hw.rig import LIMIT, LOCK, Rig, served, truth_until

# GPUs and drivers in trouble


def test_a_hung_gpu_is_wedged_alone_and_comes_back(rig: Rig) -> None:
    rig.configure(hw="read_deadline_s = 0.3")
    powerd = served(rig)
    rig.node.fault("hang", 0)
    powerd.event("gpu_wedged", uuid=rig.uuids[0])
    powerd.until(lambda: powerd.readings[0].health is Health.WEDGED)
    outcome = powerd.outcome(powerd.desire((rig.uuids[1], Control.POWER_LIMIT, LIMIT)), rig.uuids[1], Control.POWER_LIMIT)
    assert outcome.verdict is Verdict.APPLIED
    first = powerd.readings[1].time_ns
    powerd.until(lambda: powerd.readings[1].time_ns > first and powerd.readings[1].health is Health.UP)
    assert powerd.readings[0].energy_mj is None
    rig.node.clear_faults(0)
    powerd.until(lambda: powerd.readings[0].health is Health.UP)


def test_a_hang_in_the_drivers_lock_stops_sets_but_not_reads(rig: Rig) -> None:
    rig.configure(hw="write_deadline_s = 0.3")
    powerd = served(rig)
    rig.node.fault("hang-node")
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT))
    outcome = powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT, Verdict.FAILED)
    assert "no answer from the driver" in outcome.detail
    powerd.until(lambda: powerd.readings[0].health is Health.WEDGED and powerd.readings[0].power_mw)
    first = powerd.readings[0].time_ns
    powerd.until(lambda: powerd.readings[0].time_ns > first)
    rig.node.clear_faults()
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT, Verdict.APPLIED)
    powerd.until(lambda: powerd.readings[0].health is Health.UP)


def test_a_lost_gpu_is_lost_alone_and_gets_its_setting_back_when_it_returns(rig: Rig) -> None:
    powerd = served(rig)
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT), (rig.uuids[1], Control.POWER_LIMIT, LIMIT))
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT, Verdict.APPLIED)
    epoch = powerd.readings[0].epoch
    rig.node.fault("lost", 0)
    powerd.event("gpu_lost", uuid=rig.uuids[0])
    powerd.until(lambda: powerd.readings[0].health is Health.LOST)
    assert powerd.readings[1].health is Health.UP
    rig.node.clear_faults(0)
    rig.node.fault("foreign-reset", 0)
    powerd.until(lambda: powerd.readings[0].health is Health.UP)
    assert powerd.readings[0].epoch > epoch
    truth_until(rig, lambda: rig.truth(0)["limit_mw"] == 400_000)


def test_a_gpu_lost_while_held_does_not_keep_the_others_from_restoring(rig: Rig) -> None:
    serve = rig.serve()
    powerd = rig.connect()
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT), (rig.uuids[1], Control.POWER_LIMIT, LIMIT))
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    powerd.outcome(seq, rig.uuids[1], Control.POWER_LIMIT)
    rig.node.fault("lost", 0)
    powerd.event("gpu_lost", uuid=rig.uuids[0])
    seq = powerd.desire()
    powerd.outcome(seq, rig.uuids[1], Control.POWER_LIMIT, Verdict.APPLIED)
    assert rig.truth(1)["limit_mw"] == 700_000
    serve.kill()


def test_a_driver_reload_starts_a_new_generation_that_sets_again_in_a_new_epoch(rig: Rig) -> None:
    powerd = served(rig)
    powerd.outcome(powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT)), rig.uuids[0], Control.POWER_LIMIT)
    epoch = powerd.readings[0].epoch
    rig.node.fault("driver-reload")
    powerd.event("worker_died")
    truth_until(rig, lambda: rig.truth(0)["limit_mw"] == 400_000)
    powerd.until(lambda: powerd.readings[0].epoch > epoch)


def test_a_counter_reset_is_a_new_epoch_and_a_frozen_counter_is_suspect(rig: Rig) -> None:
    powerd = served(rig)
    epoch = powerd.readings[0].epoch
    rig.node.fault("counter-reset", 0)
    powerd.until(lambda: powerd.readings[0].epoch > epoch)
    rig.node.fault("freeze", 1)
    powerd.event("gpu_suspect", uuid=rig.uuids[1])
    powerd.until(lambda: powerd.readings[1].health is Health.SUSPECT and powerd.readings[0].health is Health.UP)


# somebody else changes a setting


def test_drift_of_a_limit_yields_by_default_and_leaves_their_value(rig: Rig) -> None:
    powerd = served(rig)
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT))
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    rig.node.fault("foreign-limit", 0, value=650_000)
    powerd.event("drift", uuid=rig.uuids[0], subject="power_limit", policy="yield")
    assert powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT, Verdict.OVERRIDDEN).detail
    powerd.outcome(powerd.desire(), rig.uuids[0], Control.POWER_LIMIT)
    assert (rig.truth(0)["limit_mw"], rig.truth(0)["setter_calls"]) == (650_000, 1)


def test_drift_under_enforce_is_set_again(rig: Rig) -> None:
    rig.configure(hw='drift = "enforce"')
    powerd = served(rig)
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT))
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    rig.node.fault("foreign-limit", 0, value=650_000)
    powerd.event("drift", uuid=rig.uuids[0], policy="enforce")
    truth_until(rig, lambda: rig.truth(0)["limit_mw"] == 400_000)


def test_a_lock_that_somebody_removes_is_seen_under_load(rig: Rig) -> None:
    rig.configure(hw='drift = "warn"')
    powerd = served(rig)
    with rig.load(0):
        seq = powerd.desire((rig.uuids[0], Control.SM_CLOCK, LOCK))
        powerd.outcome(seq, rig.uuids[0], Control.SM_CLOCK, Verdict.APPLIED)
        rig.node.fault("foreign-lock", 0, value=0)
        powerd.event("drift", uuid=rig.uuids[0], subject="sm_clock", policy="warn")
        powerd.outcome(seq, rig.uuids[0], Control.SM_CLOCK, Verdict.OVERRIDDEN)
