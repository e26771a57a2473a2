"""powerd-hw in stepped and scaled time: the same code, exact and fast."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from powerd.clock import NS
from powerd.model import Control, Health, Verdict
from tests.hw.rig import LIMIT, Rig


@pytest.mark.parametrize("time", ["stepped", "x20"])
def test_an_hour_long_setpoint_ends_in_seconds_at_its_simulated_moment(make_rig: Callable[..., Rig], time: str) -> None:
    rig = make_rig(time=time, gpus=1)
    rig.configure(hw="sample_hz = 1")
    rig.serve()
    powerd = rig.connect()
    ttl_s = 120.0 if time == "stepped" else 30.0
    begin_ns = rig.clock.now_ns()
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT), ttl_s=ttl_s)
    assert powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT).verdict is Verdict.APPLIED
    event = powerd.event("restored", cause="setpoint_expired")
    late_s = (event["time_ns"] - begin_ns) / NS - ttl_s
    assert 0 <= late_s < (0.2 if time == "stepped" else 5.0)
    assert rig.at_baseline()


def test_stepped_samples_come_exactly_on_their_period(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(time="stepped", gpus=2, latency=1.0)
    rig.serve()
    powerd = rig.connect()
    times: list[int] = []
    while len(times) < 50:
        powerd.snapshots = 0
        powerd.until(lambda: powerd.snapshots)
        assert all(r.health is Health.UP for r in powerd.readings)
        times.append(powerd.readings[0].time_ns)
    gaps = {b - a for a, b in pairwise(times)}
    assert gaps == {NS // 10}
    assert {at % (NS // 10) for at in times} == {0}, "the phase would depend on when powerd-hw came up"
