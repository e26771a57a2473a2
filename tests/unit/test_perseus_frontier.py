"""All plans worth having: their order, lookups for stragglers, and files that belong to one problem."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from powerd.errors import RequestError
from powerd_policies.perseus.frontier import Frontier, fingerprint, frontier, load
from powerd_policies.perseus.planner import Planner
from powerd_policies.perseus.problem import Problem
from tests.perseus_jobs import measured


@pytest.fixture(scope="module")
def problem() -> Problem:
    return measured("a100_sxm", 6)[0]


@pytest.fixture(scope="module")
def found(problem: Problem) -> Frontier:
    return frontier(problem, points=20)


def test_slower_plans_take_less_and_the_ends_are_the_fastest_and_the_cheapest(problem: Problem, found: Frontier) -> None:
    planner = Planner(problem)
    assert found.shortest_s == pytest.approx(planner.shortest_s, rel=1e-9)
    assert found.longest_s == pytest.approx(planner.cheapest_s, rel=1e-9)
    effective = [plan.energy_j - problem.blocking_j(plan.deadline_s) for plan in found.plans]
    assert effective == sorted(effective, reverse=True)
    assert list(found.times_s) == sorted(set(found.times_s))
    gaps = [later - sooner for sooner, later in zip(found.times_s, found.times_s[1:], strict=False)]
    assert gaps[0] < gaps[-1]
    assert max(plan.energy_j / plan.lower_bound_j - 1 for plan in found.plans) < 0.005


def test_a_lookup_takes_the_slowest_plan_in_time_and_no_slower_than_pays(found: Frontier) -> None:
    middle = 0.5 * (found.shortest_s + found.longest_s)
    taken = found.at(middle)
    assert taken.deadline_s == middle
    assert taken.iteration_time_s == max(time for time in found.times_s if time <= middle)
    far = found.at(10 * found.longest_s)
    assert far.iteration_time_s == found.longest_s
    waited_j = found.problem.blocking_j(9 * found.longest_s)
    assert far.energy_j == pytest.approx(found.at(found.longest_s).energy_j + waited_j)


@pytest.mark.parametrize("share", [0.99, math.nan, math.inf])
def test_a_lookup_refuses_what_cannot_be(found: Frontier, share: float) -> None:
    with pytest.raises(RequestError, match="deadline"):
        found.at(share * found.shortest_s)


def test_a_saved_frontier_answers_as_before(found: Frontier, problem: Problem, tmp_path: Path) -> None:
    found.save(tmp_path / "frontier.json")
    again = load(tmp_path / "frontier.json", problem)
    assert again.times_s == found.times_s
    assert again.at(1.1 * found.shortest_s).energy_j == found.at(1.1 * found.shortest_s).energy_j
    assert [path.name for path in tmp_path.iterdir()] == ["frontier.json"]


def test_a_frontier_of_another_problem_is_refused(found: Frontier, problem: Problem, tmp_path: Path) -> None:
    found.save(tmp_path / "frontier.json")
    other = dataclasses.replace(problem, blocking_power_w=problem.blocking_power_w + 1)
    with pytest.raises(RequestError, match="belongs to another problem"):
        load(tmp_path / "frontier.json", other)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 1}', '{"format": 2}', "null"])
def test_a_file_that_is_no_frontier_is_refused(problem: Problem, tmp_path: Path, text: str) -> None:
    (tmp_path / "frontier.json").write_text(text)
    with pytest.raises(RequestError, match="frontier"):
        load(tmp_path / "frontier.json", problem)
    with pytest.raises(RequestError, match="cannot read"):
        load(tmp_path / "missing.json", problem)


def test_choices_that_do_not_fit_are_refused(found: Frontier, problem: Problem, tmp_path: Path) -> None:
    document = json.loads(found.dumps())
    assert document["problem"] == fingerprint(problem)
    document["plans"][0]["choice"][0] = 10_000
    (tmp_path / "frontier.json").write_text(json.dumps(document))
    with pytest.raises(RequestError, match="do not fit"):
        load(tmp_path / "frontier.json", problem)


def test_one_point_is_no_frontier(problem: Problem) -> None:
    with pytest.raises(RequestError, match="two points"):
        frontier(problem, points=1)
