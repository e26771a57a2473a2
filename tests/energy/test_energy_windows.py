"""What a window says when counters restart, stand still or jump, and when a GPU is gone: synthetic readings."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from powerd.api import EnergyFigure, WindowView
from powerd.clock import NS, RealClock
from powerd.errors import RequestError
from powerd.model import EnergyMethod, Health, Reading, Snapshot
from powerd.windows import EnergyWindows

GPU = "GPU-00000000-0000-0000-0000-000000000001"
OTHER = "GPU-00000000-0000-0000-0000-000000000002"
TICK = NS // 10


class HandClock(RealClock):
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.ns = 1000 * NS

    def now_ns(self) -> int:
        return self.ns


class Bench:
    """One GPU at a constant 400 W whose counter is refreshed just before each sample."""

    def __init__(self, watts: int = 400) -> None:
        self.clock = HandClock()
        self.windows = EnergyWindows(self.clock, TICK)
        self.watts = watts
        self.reading = Reading(
            GPU, 0, Health.UP, 1, 0, 0, watts * 1000, power_limit_requested_mw=500_000, power_limit_enforced_mw=500_000
        )
        self.seq = 0

    def tick(self, count: int = 1, **changes: Any) -> None:
        for _ in range(count):
            self.clock.ns += TICK
            self.seq += 1
            energy = (self.reading.energy_mj or 0) + self.watts * 100
            base = replace(self.reading, time_ns=self.clock.ns, energy_mj=energy, energy_time_ns=self.clock.ns)
            shown = replace(base, **changes)
            if "energy_mj" not in changes or changes["energy_mj"] is not None:
                self.reading = shown
            self.windows.observe(Snapshot(self.seq, self.clock.ns, self.clock.ns, (shown,)))

    def end(self, id: str, wait: bool = False) -> WindowView:
        return asyncio.run(self.windows.end(id, wait))

    def window(self, before: Callable[[], object], seconds: float = 10) -> EnergyFigure:
        """A window around something that happens in its middle, ended with the closing samples in."""
        self.tick(20)
        view = self.windows.begin([GPU])
        self.tick(int(seconds * 5))
        before()
        self.tick(int(seconds * 5))
        return self._closed(view.id)

    def _closed(self, id: str) -> EnergyFigure:
        async def go() -> WindowView:
            task = asyncio.ensure_future(self.windows.end(id))
            await asyncio.sleep(0)
            for _ in range(3):
                self.tick()
                await asyncio.sleep(0)
            return await task

        return asyncio.run(go()).figures[0]


def test_a_plain_window_is_the_counter_difference_between_the_two_requests() -> None:
    bench = Bench()
    figure = bench.window(lambda: None)
    assert figure.energy_j == pytest.approx(4000, rel=0.001)
    assert figure.average_power_w == pytest.approx(400, rel=0.001)
    assert figure.low_j is not None
    assert figure.high_j is not None
    assert figure.low_j < 4000 < figure.high_j
    assert (figure.method, figure.epochs, figure.note) == ("counter", (1,), "")


def test_end_waits_for_the_sample_after_the_request_and_no_longer() -> None:
    bench = Bench()
    bench.tick(20)
    view = bench.windows.begin([GPU], name="step", job="j1")
    bench.tick(30)

    async def go() -> WindowView:
        task = asyncio.ensure_future(bench.windows.end(view.id))
        await asyncio.sleep(0)
        assert not task.done()
        bench.tick()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return await asyncio.wait_for(task, 1)

    ended = asyncio.run(go())
    assert (ended.name, ended.job) == ("step", "j1")
    assert ended.duration_s == pytest.approx(3.0)
    assert ended.figures[0].method == "counter"
    assert len(bench.windows) == 0


def test_a_counter_reset_is_never_subtracted_across_and_the_gap_is_bounded() -> None:
    bench = Bench()
    figure = bench.window(lambda: bench.tick(energy_mj=0, epoch=2))
    assert figure.epochs == (1, 2)
    assert figure.energy_j == pytest.approx(4040, rel=0.02)
    assert "restarted" in figure.note
    assert figure.method == "counter+power"
    assert figure.low_j is not None
    assert figure.high_j is not None
    # The tick in which it happened may have cost nothing or 1.2 times the limit.
    assert figure.low_j <= 4000
    assert figure.high_j >= 4060


def test_a_reset_that_shows_no_fall_is_known_by_its_epoch_alone() -> None:
    bench = Bench()
    figure = bench.window(lambda: bench.tick(energy_mj=10**9, epoch=2))
    assert figure.energy_j == pytest.approx(4040, rel=0.02)


def test_a_driver_reload_without_readings_for_seconds_widens_the_interval_by_what_the_limit_allows() -> None:
    bench = Bench()

    def reload() -> None:
        bench.clock.ns += 5 * NS
        bench.tick(energy_mj=0, epoch=2)

    figure = bench.window(reload)
    assert figure.low_j is not None
    assert figure.high_j is not None
    assert figure.low_j <= 4040
    assert figure.high_j >= 4040 + 5 * 500 * 1.1


def test_a_gap_without_a_power_limit_cannot_be_known() -> None:
    bench = Bench()
    bench.reading = replace(bench.reading, power_limit_enforced_mw=None, power_limit_requested_mw=None)
    figure = bench.window(lambda: bench.tick(energy_mj=0, epoch=2))
    assert (figure.energy_j, figure.low_j, figure.high_j) == (None, None, None)
    assert figure.note


def test_a_gpu_lost_inside_a_window_has_no_figure_and_the_window_after_it_has() -> None:
    bench = Bench()

    def lose() -> None:
        bench.tick(5, health=Health.LOST, energy_mj=None, energy_time_ns=None, power_mw=None)
        bench.tick(epoch=2, energy_mj=0)

    figure = bench.window(lose)
    assert figure.energy_j is None
    assert figure.low_j is None
    assert "GPU lost" in figure.note
    later = bench.window(lambda: None)
    assert later.energy_j == pytest.approx(4000, rel=0.001)
    assert later.epochs == (2,)


def test_a_gpu_that_is_still_lost_answers_at_once_with_none() -> None:
    bench = Bench()
    bench.tick(20)
    view = bench.windows.begin([GPU])
    bench.tick(3, health=Health.LOST, energy_mj=None, energy_time_ns=None, power_mw=None)
    figure = bench.end(view.id, wait=True).figures[0]
    assert figure.energy_j is None
    assert "lost" in figure.note


def test_an_impossible_jump_of_the_counter_is_left_out() -> None:
    bench = Bench()

    def jump() -> None:
        bench.tick(energy_mj=(bench.reading.energy_mj or 0) + 10**9)

    figure = bench.window(jump)
    assert figure.energy_j == pytest.approx(4040, rel=0.02)
    assert "impossible" in figure.note


def test_a_counter_that_stands_still_is_replaced_by_power() -> None:
    bench = Bench()

    def freeze() -> None:
        stuck = {"energy_mj": bench.reading.energy_mj, "energy_time_ns": bench.reading.energy_time_ns}
        bench.tick(50, **stuck)

    figure = bench.window(freeze)
    assert figure.energy_j == pytest.approx(6000, rel=0.02)
    assert "stood still" in figure.note
    assert figure.method == "counter+power"


def test_a_counter_that_stands_still_to_the_end_still_gives_an_answer_that_covers() -> None:
    bench = Bench()
    bench.tick(20)
    view = bench.windows.begin([GPU])
    stuck = {"energy_mj": bench.reading.energy_mj, "energy_time_ns": bench.reading.energy_time_ns}
    bench.tick(150, **stuck)
    figure = bench.end(view.id).figures[0]
    assert figure.low_j is not None
    assert figure.high_j is not None
    assert figure.low_j <= 6000 <= figure.high_j


def test_no_counter_means_integrated_power_with_the_sensors_own_allowance() -> None:
    bench = Bench()
    bench.reading = replace(bench.reading, energy_method=EnergyMethod.INTEGRATED)
    figure = bench.window(lambda: None)
    assert figure.method == "integrated"
    assert figure.energy_j == pytest.approx(4000, rel=0.01)
    assert figure.low_j is not None
    assert figure.low_j <= 4000 * 0.95 + 1


def test_repeated_snapshots_without_news_change_nothing() -> None:
    bench = Bench()
    bench.tick(20)
    view = bench.windows.begin([GPU])
    bench.tick(30)
    for _ in range(5):
        bench.windows.observe(Snapshot(bench.seq, bench.clock.ns, 0, (bench.reading,)))
    bench.tick(30)
    assert bench.end(view.id).figures[0].energy_j == pytest.approx(2400, rel=0.02)


def test_a_gpu_without_readings_after_the_end_is_answered_wide_after_the_deadline_of_the_clock() -> None:
    bench = Bench()
    bench.tick(20)
    view = bench.windows.begin([GPU])
    bench.tick(50)

    class Jumping(HandClock):
        def now_ns(self) -> int:  # each look finds a second gone, as on a simulated clock that runs fast
            self.ns += NS
            return self.ns

    jumping = Jumping()
    jumping.ns = bench.clock.ns
    bench.windows._clock = jumping
    figure = bench.end(view.id, wait=True).figures[0]
    assert figure.energy_j is not None
    assert figure.low_j is not None
    assert figure.energy_j - figure.low_j > 50


def test_windows_are_bounded_and_unknown_ids_and_gpus_are_told_apart() -> None:
    bench = Bench()
    bench.windows = EnergyWindows(bench.clock, TICK, max_open=2)
    bench.tick(3)
    first = bench.windows.begin([GPU])
    bench.windows.begin([GPU])
    with pytest.raises(RequestError) as full:
        bench.windows.begin([GPU])
    assert full.value.code.name == "too_many"
    bench.windows.drop(first.id)
    bench.windows.begin([GPU])
    for act in (bench.windows.drop, bench.end):
        with pytest.raises(RequestError) as gone:
            act(first.id)
        assert gone.value.code.name == "not_found"
    with pytest.raises(RequestError) as unknown:
        bench.windows.begin([OTHER])
    assert unknown.value.code.name == "unknown_gpu"
    with pytest.raises(RequestError):
        bench.windows.begin([])


def test_ids_are_not_used_twice() -> None:
    bench = Bench()
    bench.tick(3)
    ids = [bench.windows.begin([GPU]).id for _ in range(50)]
    assert len(set(ids)) == 50


def test_a_gpu_lost_before_the_first_sample_of_the_window_has_no_figure_even_when_it_is_back_at_once() -> None:
    bench = Bench()
    bench.tick(20)
    view = bench.windows.begin([GPU])
    bench.tick(2, health=Health.LOST, energy_mj=None, energy_time_ns=None, power_mw=None)
    bench.tick(epoch=2, energy_mj=0)
    bench.tick(50)
    figure = bench.end(view.id).figures[0]
    assert figure.energy_j is None
    assert "lost" in figure.note
