"""Clock plans in powerd-hw: which orders to follow one are refused, and that the longest is not."""

from __future__ import annotations

from typing import Any

import pytest

from powerd.hw import frames
from powerd.hw.frames import Kind, Table
from powerd.hw.plan import Order
from tests.hw.planrig import plan_for, served
from tests.hw.rig import Rig

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
def test_hw_checks_every_value_of_a_plan_again(rig: Rig, change: dict[str, Any], named: str) -> None:
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
