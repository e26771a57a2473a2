"""Clocks that take time to change: what a plan becomes, and plans that keep their deadline all the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from powerd.errors import RequestError
from powerd_policies.perseus.planner import Planner, plan
from powerd_policies.perseus.problem import Plan
from powerd_policies.perseus.switching import Switching, realise
from tests.perseus_jobs import measured, small

TABLE = [(1.0, 300.0), (2.0, 100.0)]  # 1000 MHz at 300 W, 990 MHz at 50 W


def chosen(problem_ranks: list[int], edges: list[tuple[int, int]], choice: list[int], deadline_s: float) -> Plan:
    problem = small(edges, problem_ranks, [TABLE], [0] * len(choice))
    return Plan(problem, np.array(choice), deadline_s, 0.0)


def test_clocks_that_change_at_once_change_nothing() -> None:
    run = chosen([0, 0, 0], [(0, 1), (1, 2)], [0, 1, 0], 5.0)
    found = realise(run, Switching(latency_s=0.0))
    assert found.iteration_time_s == pytest.approx(run.iteration_time_s)
    assert found.energy_j == pytest.approx(run.energy_j)
    assert found.switches == 2


def test_the_old_clock_holds_until_the_new_one_does() -> None:
    found = realise(chosen([0, 0], [(0, 1)], [0, 1], 4.0), Switching(latency_s=0.1))
    # The second instruction runs 0.1 s at the fast clock: a tenth of it, for 30 J; the rest at the slow one.
    assert found.times_s.tolist() == pytest.approx([1.0, 0.1 + 0.9 * 2.0])
    assert found.energy_j == pytest.approx(300.0 + 30.0 + 90.0 + 50.0 * (4.0 - 2.9))


def test_a_clock_asked_for_in_a_wait_is_there_in_time() -> None:
    # Rank 1 waits 1 s for rank 0 between its two instructions: its change costs nothing.
    run = chosen([0, 1, 0, 1], [(0, 2), (1, 3), (2, 3)], [1, 0, 1, 1], 10.0)
    found = realise(run, Switching(latency_s=0.5))
    assert found.times_s.tolist() == pytest.approx([2.0, 1.0, 2.0, 2.0])


def test_the_driver_serves_one_gpu_of_a_node_after_the_other() -> None:
    run = chosen([0, 1, 0, 1], [(0, 2), (1, 3)], [0, 0, 1, 1], 10.0)
    together = realise(run, Switching(latency_s=0.1))
    assert sorted(together.times_s[2:].tolist()) == pytest.approx([0.2 + 0.8 * 2.0, 1.9])
    apart = realise(run, Switching(latency_s=0.1, ranks_per_node=1))
    assert apart.times_s[2:].tolist() == pytest.approx([1.9, 1.9])
    assert realise(run, Switching(latency_s=0.1, serialised=False)).times_s.tolist() == pytest.approx(apart.times_s.tolist())


def test_a_clock_is_held_as_long_as_it_must() -> None:
    run = chosen([0, 0, 0], [(0, 1), (1, 2)], [1, 0, 1], 10.0)
    found = realise(run, Switching(latency_s=0.0, min_dwell_s=1.5))
    # The change back is asked for 1 s after the one before: the third instruction runs 0.5 s, half of it, at the fast clock.
    assert found.times_s.tolist() == pytest.approx([2.0, 1.0, 0.5 + 0.5 * 2.0])


@pytest.mark.parametrize("gpu", ["a100_sxm", "a40"])
@pytest.mark.parametrize("slower", [1.0, 1.02, 1.1])
def test_a_plan_keeps_its_deadline_with_clocks_that_take_time(gpu: str, slower: float) -> None:
    problem, time_s = measured(gpu, 6)
    deadline_s, how = slower * time_s, Switching()
    easy = Planner(problem).plan(deadline_s)
    found = plan(problem, deadline_s, how)
    assert found.realised is not None
    assert found.realised.iteration_time_s <= deadline_s * (1 + 1e-9)
    again = realise(found, how)
    assert (again.iteration_time_s, again.energy_j) == (found.realised.iteration_time_s, found.realised.energy_j)
    assert found.realised.energy_j <= 1.03 * easy.energy_j
    assert found.realised.switches <= 1.1 * realise(easy, how).switches


def test_slow_changes_are_made_less_often() -> None:
    problem, time_s = measured("a100_sxm", 6)
    quick, slow = (plan(problem, 1.1 * time_s, Switching(latency_s=latency_s)).realised for latency_s in (0.001, 0.05))
    assert quick is not None
    assert slow is not None
    assert slow.switches < quick.switches
    assert slow.iteration_time_s <= 1.1 * time_s * (1 + 1e-9)


def test_a_deadline_that_changes_cannot_keep_says_what_they_can() -> None:
    # Each instruction is fastest at another clock, so that there is no way without a change.
    tables = [[(1.0, 300.0), (2.0, 100.0)], [(0.5, 10.0), (0.9, 5.0)]]
    problem = small([(0, 1)], [0, 0], tables, [0, 1])
    crossed = type(problem)(problem.dag, (problem.tables[0], problem.tables[1][::-1]), problem.table, 50.0)
    options = (crossed.tables[1][0], crossed.tables[1][1])
    swapped = tuple(type(o)(1990 - (o.mhz or 0), o.time_s, o.energy_j) for o in options)
    with pytest.raises(RequestError, match="the shortest takes"):
        plan(type(problem)(problem.dag, (problem.tables[0], swapped), problem.table, 50.0), 1.5, Switching(latency_s=0.4))


@pytest.mark.parametrize("wrong", [{"latency_s": -1.0}, {"min_dwell_s": float("nan")}, {"ranks_per_node": 0}])
def test_a_model_of_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        Switching(**wrong)
