"""powerd-hw sets: what is set and verified, baselines and the site's limits, what a GPU can do."""

from __future__ import annotations

import os

import pytest

from powerd.hw.frames import Table
from powerd.hw.tables import capabilities_of, processes_of
from powerd.model import Control, Interval, Verdict
from tests.hw.rig import LIMIT, LOCK, MakeRig, Rig, served, watts

# set and verify


def test_limit_is_set_read_back_and_reported_with_every_moment(rig: Rig) -> None:
    powerd = served(rig)
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT))
    outcome = powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    assert (outcome.verdict, outcome.accepted, outcome.enforced) == (Verdict.APPLIED, LIMIT, 400_000)
    assert 0 < outcome.received_ns <= outcome.called_ns <= outcome.returned_ns <= outcome.verified_ns
    assert rig.truth(0)["limit_mw"] == 400_000
    assert rig.truth(1)["limit_mw"] == 700_000


def test_clock_lock_waits_for_load_and_is_then_confirmed(rig: Rig) -> None:
    powerd = served(rig)
    seq = powerd.desire((rig.uuids[0], Control.SM_CLOCK, LOCK))
    powerd.outcome(seq, rig.uuids[0], Control.SM_CLOCK, Verdict.PENDING_LOAD)
    with rig.load(0):
        outcome = powerd.outcome(seq, rig.uuids[0], Control.SM_CLOCK, Verdict.APPLIED)
    assert outcome.observed is not None
    assert abs(outcome.observed - 1200) <= 20


def test_a_clock_held_down_by_something_else_says_by_what(rig: Rig) -> None:
    powerd = served(rig)
    with rig.load(0):
        rig.node.fault("hw-thermal", 0)
        seq = powerd.desire((rig.uuids[0], Control.SM_CLOCK, Interval(1800, 1800)))
        outcome = powerd.outcome(seq, rig.uuids[0], Control.SM_CLOCK, Verdict.OVERRIDDEN)
        assert "hw_thermal_slowdown" in outcome.detail
        rig.node.clear_faults(0)
        powerd.outcome(seq, rig.uuids[0], Control.SM_CLOCK, Verdict.APPLIED)


def test_an_out_of_band_cap_is_overridden_not_applied(rig: Rig) -> None:
    rig.node.fault("oob-cap", 0, value=350_000)
    powerd = served(rig)
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT))
    outcome = powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    assert (outcome.verdict, outcome.enforced) == (Verdict.OVERRIDDEN, 350_000)
    assert "out of band" in outcome.detail


def test_the_same_table_twice_is_no_second_driver_call(rig: Rig) -> None:
    powerd = served(rig)
    rows = ((rig.uuids[0], Control.POWER_LIMIT, LIMIT), (rig.uuids[0], Control.SM_CLOCK, LOCK))
    first = powerd.desire(*rows)
    powerd.outcome(first, rig.uuids[0], Control.POWER_LIMIT)
    powerd.outcome(first, rig.uuids[0], Control.SM_CLOCK)
    calls = rig.truth(0)["setter_calls"]
    second = powerd.desire(*rows)
    assert powerd.outcome(second, rig.uuids[0], Control.POWER_LIMIT).verdict is Verdict.APPLIED
    powerd.outcome(second, rig.uuids[0], Control.SM_CLOCK)
    assert rig.truth(0)["setter_calls"] == calls == 2


def test_a_row_that_asks_for_baseline_where_nothing_was_set_is_answered_without_a_driver_call(rig: Rig) -> None:
    powerd = served(rig)
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, None))
    outcome = powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    assert (outcome.verdict, outcome.requested) == (Verdict.APPLIED, None)
    assert rig.truth(0)["setter_calls"] == 0


def test_the_limit_found_before_the_first_write_is_the_baseline(rig: Rig) -> None:
    rig.node.fault("foreign-limit", 0, value=550_000)
    powerd = served(rig)
    powerd.outcome(powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT)), rig.uuids[0], Control.POWER_LIMIT)
    powerd.outcome(powerd.desire(), rig.uuids[0], Control.POWER_LIMIT)
    assert rig.truth(0)["limit_mw"] == 550_000


def test_a_declared_baseline_stands_over_what_was_found(rig: Rig) -> None:
    rig.configure(extra="[baseline]\npower_limit_w = 600\nsm_clock_min_mhz = 210\nsm_clock_max_mhz = 1500")
    powerd = served(rig)
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT), (rig.uuids[0], Control.SM_CLOCK, LOCK))
    powerd.outcome(seq, rig.uuids[0], Control.SM_CLOCK)
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    seq = powerd.desire()
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    powerd.outcome(seq, rig.uuids[0], Control.SM_CLOCK)
    assert (rig.truth(0)["limit_mw"], rig.truth(0)["locked_clocks_mhz"]) == (600_000, [210, 1500])


@pytest.mark.parametrize(
    ("wish", "accepted"),
    [(watts(900), watts(500)), (watts(100), watts(300)), (watts(450), watts(450))],
)
def test_the_sites_limits_hold_whatever_powerd_asks(rig: Rig, wish: Interval, accepted: Interval) -> None:
    rig.configure(extra="[limits]\npower_limit_min_w = 300\npower_limit_max_w = 500")
    powerd = served(rig)
    outcome = powerd.outcome(powerd.desire((rig.uuids[0], Control.POWER_LIMIT, wish)), rig.uuids[0], Control.POWER_LIMIT)
    assert (outcome.verdict, outcome.requested, outcome.accepted) == (Verdict.APPLIED, wish, accepted)
    assert rig.truth(0)["limit_mw"] == accepted.high


def test_baseline_is_clipped_to_the_sites_limits(rig: Rig) -> None:
    rig.configure(extra="[limits]\npower_limit_max_w = 500")
    powerd = served(rig)
    powerd.outcome(powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT)), rig.uuids[0], Control.POWER_LIMIT)
    powerd.outcome(powerd.desire(), rig.uuids[0], Control.POWER_LIMIT)
    assert rig.truth(0)["limit_mw"] == 500_000


def test_a_step_down_waits_for_the_dwell_and_a_step_up_does_not(rig: Rig) -> None:
    powerd = served(rig)
    uuid = rig.uuids[0]
    powerd.outcome(powerd.desire((uuid, Control.POWER_LIMIT, watts(600))), uuid, Control.POWER_LIMIT)
    held = powerd.desire((uuid, Control.POWER_LIMIT, watts(300)), dwell_ms=60_000)
    up = powerd.desire((uuid, Control.POWER_LIMIT, watts(650)), dwell_ms=60_000)
    assert powerd.outcome(up, uuid, Control.POWER_LIMIT).enforced == 650_000
    assert not [o for o in powerd.outcomes if o.seq == held and o.verdict is Verdict.APPLIED]
    down = powerd.desire((uuid, Control.POWER_LIMIT, watts(300)), dwell_ms=200)
    outcome = powerd.outcome(down, uuid, Control.POWER_LIMIT)
    assert outcome.enforced == 300_000


# what a GPU can do


def test_capabilities_say_per_control_what_can_be_used_and_why_not(make_rig: MakeRig) -> None:
    rig = make_rig(model="a100-sxm-400w", gpus=1)
    powerd = served(rig)
    capabilities = capabilities_of(powerd.until(lambda: powerd.tables.get(Table.CAPABILITIES))[0])
    assert capabilities.simulated
    assert capabilities.interval(Control.POWER_LIMIT) is not None
    assert capabilities.controls[Control.SM_CLOCK].available
    assert not capabilities.controls[Control.MEMORY_CLOCK].available
    assert "one memory clock" in capabilities.controls[Control.MEMORY_CLOCK].reason
    seq = powerd.desire((rig.uuids[0], Control.MEMORY_CLOCK, Interval(1000, 1000)))
    outcome = powerd.outcome(seq, rig.uuids[0], Control.MEMORY_CLOCK)
    assert (outcome.verdict, rig.truth(0)["setter_calls"]) == (Verdict.FAILED, 0)


def test_no_permission_is_learned_from_the_first_refusal_and_said(rig: Rig) -> None:
    rig.node.fault("permission", permission="none")
    powerd = served(rig)
    outcome = powerd.outcome(powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT)), rig.uuids[0], Control.POWER_LIMIT)
    assert (outcome.verdict, outcome.nvml_code) == (Verdict.FAILED, 4)
    assert "CAP_SYS_ADMIN" in outcome.detail

    def learned() -> bool:
        return not capabilities_of(powerd.tables[Table.CAPABILITIES][0]).controls[Control.POWER_LIMIT].available

    powerd.until(learned)


def test_processes_on_a_gpu_are_reported(rig: Rig) -> None:
    powerd = served(rig)
    with rig.load(1):
        found = powerd.until(lambda: processes_of(powerd.tables.get(Table.PROCESSES, {})).get(rig.uuids[1]))
    assert [p.pid for p in found] == [os.getpid()]
