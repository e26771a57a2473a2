"""One instance's clock: low when it may be, up at once, down after a dwell, highest when nothing sure is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerd.sim import enginemodels
from powerd_policies.dynamollm.classes import Slo
from powerd_policies.dynamollm.fleet import InstanceLoad
from powerd_policies.dynamollm.instance import InstanceController

MODEL = enginemodels.load()
TOP = MODEL.max_clock_mhz
LIGHT = InstanceLoad(running=8, requests_per_s=0.5, prompt_tokens_per_s=300.0, output_tokens_per_s=100.0)
BUSY = InstanceLoad(running=60, queued=2, queued_prompt_tokens=900, requests_per_s=4.0, prompt_tokens_per_s=4000.0)


def controller(**more: Any) -> InstanceController:
    settings: dict[str, Any] = {"dwell_s": 10.0, "memory_s": 5.0, "peers": 12}
    return InstanceController(MODEL, 4, Slo(2.0, 0.1), **{**settings, **more})


def settled(load: InstanceLoad, **more: object) -> int:
    mine = controller(**more)
    return [mine.clock(5.0 * n, load).clock_mhz for n in range(5)][-1]


def test_a_light_load_runs_below_the_highest_clock_and_a_heavy_one_above_it() -> None:
    assert settled(LIGHT) < settled(BUSY) <= TOP


def test_up_at_once_and_down_after_the_dwell() -> None:
    mine = controller()
    assert mine.clock(0.0, LIGHT).clock_mhz == TOP
    assert mine.clock(5.0, LIGHT).clock_mhz == TOP
    low = mine.clock(10.0, LIGHT).clock_mhz
    assert low < TOP
    high = mine.clock(15.0, BUSY).clock_mhz
    assert high > low
    assert mine.clock(20.0, LIGHT).clock_mhz == high


def test_load_that_swings_faster_than_the_dwell_does_not_move_the_clock() -> None:
    mine = controller(dwell_s=15.0)
    clocks = [mine.clock(5.0 * n, (LIGHT, BUSY)[n % 2]).clock_mhz for n in range(2, 40)]
    assert len(set(clocks[4:])) == 1


@pytest.mark.parametrize(
    "load",
    [
        InstanceLoad(running=1, age_s=60.0),
        InstanceLoad(running=1, kv_used_ratio=None),
        InstanceLoad(running=1, kv_used_ratio=0.97),
        InstanceLoad(running=-3),
        InstanceLoad(running=1, prompt_tokens_per_s=float("nan")),
        InstanceLoad(running=1, oldest_wait_s=float("inf")),
        InstanceLoad(running=20, queued=30, queued_prompt_tokens=60_000),
        InstanceLoad(running=20, queued=1, queued_prompt_tokens=500, oldest_wait_s=1.9),
        InstanceLoad(running=20, queued=40, queued_prompt_tokens=None, requests_per_s=None, prompt_tokens_per_s=None),
    ],
)
def test_pressure_and_what_is_not_sure_mean_the_highest_clock(load: InstanceLoad) -> None:
    assert settled(load) == TOP


def test_an_idle_instance_parks_where_a_lone_request_would_still_be_in_time() -> None:
    parked = settled(InstanceLoad())
    assert parked < settled(LIGHT)
    strict = InstanceController(MODEL, 4, Slo(0.16, 0.1), dwell_s=0.0)
    strict.clock(0.0, InstanceLoad())
    assert strict.clock(5.0, InstanceLoad()).clock_mhz > parked


@given(
    running=st.integers(0, 120), queued=st.integers(0, 5), prompt=st.floats(0, 9000), output=st.floats(0, 3000),
    floor=st.sampled_from((None, 1080, 1530, 1980)), ceiling=st.sampled_from((None, 1080, 1530)),
)  # fmt: skip
def test_always_a_clock_of_the_model_within_floor_and_ceiling(
    running: int, queued: int, prompt: float, output: float, floor: int | None, ceiling: int | None
) -> None:
    mine = controller(dwell_s=0.0)
    mine.floor_mhz, mine.ceiling_mhz = floor, ceiling
    load = InstanceLoad(running, queued, 300 * queued, 0.2, 0.0, prompt / 1000, prompt, output)
    decided = [mine.clock(5.0 * n, load) for n in range(3)][-1]
    assert decided.clock_mhz in MODEL.clocks_mhz(4)
    assert decided.reason
    assert floor is None or ceiling is not None or decided.clock_mhz >= floor
    assert ceiling is None or decided.clock_mhz <= ceiling


def test_a_gap_that_the_batch_makes_too_long_raises_the_clock() -> None:
    small, large = (InstanceLoad(running=n, requests_per_s=1.0, prompt_tokens_per_s=400.0) for n in (5, 70))
    assert settled(large) > settled(small)


def test_clocks_stay_where_they_are_when_they_are_not_scaled() -> None:
    assert settled(LIGHT, scaling=False) == TOP
    with pytest.raises(ValueError, match="no clock for tensor parallelism 3"):
        InstanceController(MODEL, 3, Slo(1.0, 0.1))


def test_gaps_seen_close_to_the_promise_make_it_careful_and_it_forgets() -> None:
    mine = controller(dwell_s=0.0)
    load = InstanceLoad(running=45, requests_per_s=1.0, prompt_tokens_per_s=400.0, tbt_p99_s=0.05)
    calm = [mine.clock(5.0 * n, load).clock_mhz for n in range(4)][-1]
    close = replace(load, tbt_p99_s=0.0985)
    assert [mine.clock(20.0 + 5.0 * n, close).clock_mhz for n in range(6)][-1] > calm
    assert [mine.clock(60.0 + 5.0 * n, load).clock_mhz for n in range(400)][-1] == calm


def test_gaps_measured_above_the_promise_mean_the_highest_clock_whatever_the_model_says() -> None:
    calm = InstanceLoad(running=5, requests_per_s=0.5, prompt_tokens_per_s=200.0, tbt_p99_s=0.05)
    late = replace(calm, tbt_p99_s=0.11)
    for backs_off in (True, False):
        mine = controller(dwell_s=0.0, backs_off=backs_off)
        assert mine.clock(0.0, calm).clock_mhz < TOP
        assert (mine.clock(5.0, late).clock_mhz == TOP) is backs_off


def test_gaps_missed_again_and_again_leave_more_of_the_promise_in_hand_than_gaps_close_to_it() -> None:
    load = InstanceLoad(running=45, requests_per_s=1.0, prompt_tokens_per_s=400.0, tbt_p99_s=0.05)
    clocks = {}
    for seen_s in (0.0985, 0.11):
        mine = controller(dwell_s=0.0)
        for n in range(6):
            mine.clock(5.0 * n, replace(load, tbt_p99_s=seen_s))
        clocks[seen_s] = mine.clock(30.0, load).clock_mhz
    assert clocks[0.11] > clocks[0.0985]
