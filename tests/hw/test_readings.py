"""How energy, power and clocks are read on GPUs and drivers that offer different ways to read them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from powerd.hw.frames import Table
from powerd.hw.tables import capabilities_of
from powerd.model import Control, EnergyMethod, Interval, Verdict
from tests.hw.rig import Powerd, Rig

MakeRig = Callable[..., Rig]
_NOT_SUPPORTED = 3
_FIELDS, _COUNTER, _USAGE = "nvmlDeviceGetFieldValues", "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"


def without(rig: Rig, *functions: str) -> Powerd:
    """Served by a driver that does not offer these functions."""
    for function in functions:
        rig.node.fault("rule", function=function, code=_NOT_SUPPORTED)
    rig.serve()
    return rig.connect()


def counted(powerd: Powerd, snapshots: int) -> tuple[int, int]:
    """Energy and the time it was counted in, from one reading of GPU 0 to another this many snapshots later."""
    first, begin = powerd.readings[0], powerd.snapshots
    powerd.until(lambda: powerd.snapshots >= begin + snapshots)
    last = powerd.readings[0]
    assert first.epoch == last.epoch
    assert first.energy_mj is not None
    assert last.energy_mj is not None
    assert first.energy_time_ns is not None
    assert last.energy_time_ns is not None
    return last.energy_mj - first.energy_mj, last.energy_time_ns - first.energy_time_ns


@pytest.mark.parametrize("model", ["a100-sxm-400w", "a100-pcie", "h100-sxm", "a40"])
def test_a_driver_with_power_fields_gives_both_the_instantaneous_and_the_average(make_rig: MakeRig, model: str) -> None:
    powerd = without(make_rig(model=model, gpus=1))
    assert powerd.readings[0].power_mw
    assert powerd.readings[0].power_average_mw
    assert powerd.readings[0].energy_method is EnergyMethod.COUNTER


@pytest.mark.parametrize(
    ("model", "instantaneous"),
    [
        ("a100-sxm-400w", True),
        ("a100-sxm-500w", True),
        ("a100-pcie", True),
        ("h100-sxm", False),
        ("h200-sxm", False),
        ("a40", False),
    ],
)
def test_without_fields_one_call_means_what_the_architecture_makes_of_it(
    make_rig: MakeRig, model: str, instantaneous: bool
) -> None:
    reading = without(make_rig(model=model, gpus=1), _FIELDS).readings[0]
    assert (reading.power_mw is not None, reading.power_average_mw is not None) == (instantaneous, not instantaneous)
    assert reading.energy_method is EnergyMethod.COUNTER  # the older call still counts
    assert reading.energy_mj is not None
    assert reading.power_limit_requested_mw == reading.power_limit_enforced_mw is not None


@pytest.mark.parametrize("model", ["a100-sxm-400w", "h100-sxm"])
def test_without_a_counter_power_is_integrated_says_so_and_agrees_with_what_was_drawn(make_rig: MakeRig, model: str) -> None:
    rig = make_rig(model=model, gpus=1)
    with rig.load(0, share=1.0):
        powerd = without(rig, _FIELDS, _COUNTER)
        assert not capabilities_of(powerd.until(lambda: powerd.tables.get(Table.CAPABILITIES))[0]).energy_counter
        assert powerd.readings[0].energy_method is EnergyMethod.INTEGRATED
        counted(powerd, 10)  # an averaging sensor has to come to the load's power first
        before_mj = rig.truth(0)["true_energy_mj"]
        energy_mj, _ = counted(powerd, 30)
        drawn_mj = rig.truth(0)["true_energy_mj"] - before_mj
    assert energy_mj == pytest.approx(drawn_mj, rel=0.15)
    assert energy_mj > 0


def test_without_any_power_reading_there_is_no_energy_and_no_zero(make_rig: MakeRig) -> None:
    powerd = without(make_rig(gpus=1), _FIELDS, _COUNTER, _USAGE)
    reading = powerd.readings[0]
    assert (reading.energy_mj, reading.energy_time_ns, reading.power_mw, reading.power_average_mw) == (None,) * 4
    assert reading.sm_clock_mhz


def test_a_clock_that_nobody_set_is_there_in_every_reading(rig: Rig) -> None:
    rig.serve()
    powerd = rig.connect()
    for _ in range(6):
        begin = powerd.snapshots

        def newer(begin: int = begin) -> bool:
            return powerd.snapshots > begin

        powerd.until(newer)
        assert all(r.sm_clock_mhz is not None and r.clock_event_reasons is not None for r in powerd.readings)


def test_a_lock_is_confirmed_by_the_first_reading_after_it_settled(rig: Rig) -> None:
    rig.serve()
    powerd = rig.connect()
    with rig.load(0):
        powerd.until(lambda: powerd.readings[0].utilization_percent)
        seq = powerd.desire((rig.uuids[0], Control.SM_CLOCK, Interval(1200, 1200)))
        returned = powerd.outcome(seq, rig.uuids[0], Control.SM_CLOCK, Verdict.PENDING, Verdict.PENDING_LOAD).returned_ns
        begin = powerd.snapshots
        done = powerd.outcome(seq, rig.uuids[0], Control.SM_CLOCK, Verdict.APPLIED)
    seen = [r.time_ns for r in powerd.readings if r.uuid == rig.uuids[0]]
    assert done.returned_ns == returned
    assert powerd.snapshots - begin <= 4, seen
