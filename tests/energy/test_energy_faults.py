"""Energy windows over faults of the simulated driver, read by powerd-hw's own samplers and scored by the truth."""

import asyncio
from collections.abc import Callable, Iterator

import pytest

from benchmarks import load
from benchmarks.energy import NodeClock, Poller, polled_node
from powerd.api import EnergyFigure, WindowView
from powerd.clock import NS
from powerd.sim.node import SimNode
from powerd.sim.workload import LOAD, Context
from powerd.windows import EnergyWindows


class Rig:
    """Two GPUs, the first under a steady load, sampled at 10 Hz."""

    def __init__(self, node: SimNode, poller: Poller) -> None:
        self.node, self.poller = node, poller
        self.windows = EnergyWindows(NodeClock(node), NS // 10)
        load.begin(Context(0, node=node), LOAD, "gemm", 0.8, 600 * NS)
        self.run(3)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds * 10)):
            self.node.advance(0.1)
            self.windows.observe(self.poller.read())

    def window(self, seconds: float, middle: Callable[[], object]) -> tuple[list[EnergyFigure], list[float]]:
        """The figures of both GPUs over a window with something in its middle, and the truth in joules."""

        async def closing(id: str) -> WindowView:
            task = asyncio.ensure_future(self.windows.end(id))
            await asyncio.sleep(0)
            for _ in range(3):
                self.run(0.1)
                await asyncio.sleep(0)
            return await task

        self.node.advance(0.037)
        view = self.windows.begin(self.poller.uuids)
        before = [self.node.true_energy_mj(g) for g in range(2)]
        self.run(seconds / 2)
        middle()
        self.run(seconds / 2)
        self.node.advance(0.013)
        truth = [(self.node.true_energy_mj(g) - before[g]) / 1000 for g in range(2)]
        return list(asyncio.run(closing(view.id)).figures), truth


@pytest.fixture
def rig() -> Iterator[Rig]:
    with polled_node("h100-sxm", 2, seed=5) as (node, poller):
        yield Rig(node, poller)


def covered(figure: EnergyFigure, true_j: float) -> bool:
    assert figure.low_j is not None
    assert figure.high_j is not None
    return figure.low_j <= true_j <= figure.high_j


def test_without_a_fault_both_gpus_are_covered_and_loads_told_apart(rig: Rig) -> None:
    figures, truth = rig.window(10, lambda: None)
    assert all(covered(f, t) for f, t in zip(figures, truth, strict=True))
    assert truth[0] > 2 * truth[1]
    assert [f.method for f in figures] == ["counter", "counter"]


def test_a_counter_reset_begins_an_epoch_and_the_window_still_covers(rig: Rig) -> None:
    figures, truth = rig.window(10, lambda: rig.node.fault("counter-reset", 0))
    assert [len(f.epochs) for f in figures] == [2, 1]
    assert all(covered(f, t) for f, t in zip(figures, truth, strict=True))
    assert figures[0].energy_j == pytest.approx(truth[0], rel=0.03)
    assert figures[0].note
    assert not figures[1].note


def test_two_resets_in_one_window(rig: Rig) -> None:
    def twice() -> None:
        rig.node.fault("counter-reset", 0)
        rig.run(2)
        rig.node.fault("counter-reset", 0)

    figures, truth = rig.window(12, twice)
    assert len(figures[0].epochs) == 3
    assert covered(figures[0], truth[0])


def test_frozen_sensors_are_bridged_by_the_last_power_and_told(rig: Rig) -> None:
    def freeze() -> None:
        rig.node.fault("freeze", 0)
        rig.run(6)
        rig.node.fault("freeze", 0, value=0)

    figures, truth = rig.window(10, freeze)
    assert "stood still" in figures[0].note
    assert figures[0].energy_j == pytest.approx(truth[0], rel=0.1)
    assert covered(figures[0], truth[0])


def test_a_lost_gpu_has_no_figure_and_the_other_one_has(rig: Rig) -> None:
    figures, truth = rig.window(10, lambda: rig.node.fault("lost", 0))
    assert figures[0].energy_j is None
    assert "lost" in figures[0].note
    assert covered(figures[1], truth[1])


def test_a_gpu_that_came_back_is_measured_again_in_a_new_epoch(rig: Rig) -> None:
    def away() -> None:
        rig.node.fault("lost", 0)
        rig.run(3)
        rig.node.fault("lost", 0, value=0)

    figures, _ = rig.window(10, away)
    assert figures[0].energy_j is None
    rig.run(3)
    again, truth = rig.window(10, lambda: None)
    assert covered(again[0], truth[0])
    assert min(again[0].epochs) > 1
