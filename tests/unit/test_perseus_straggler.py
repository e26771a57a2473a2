"""Stragglers: who counts as one, from when to when, and what a job with one needs."""

from __future__ import annotations

import pytest

from powerd.errors import RequestError
from powerd_policies.perseus.straggler import Patience, Stragglers, job_energy, optimal_time, slowest

USUAL = 1.0
QUICK = Patience(begin=1, end=1)


def run(state: Stragglers, *rows: dict[int, tuple[float, float]]) -> Stragglers:
    for row in rows:
        state = state.report(row)
    return state


def test_beyond_the_time_of_least_energy_slower_saves_nothing() -> None:
    assert optimal_time(1.15, 1.2) == 1.15
    assert optimal_time(1.15, 1.1) == 1.1
    assert slowest([1.1, 1.3, 1.2]) == 1.3
    assert slowest([]) is None


def test_a_straggler_counts_after_patience_and_the_others_follow() -> None:
    late = {0: (USUAL, 1.0), 1: (USUAL, 1.2)}
    once = run(Stragglers(), late)
    assert once.straggler_time_s is None, "one late iteration is no straggler"
    twice = run(once, late)
    assert twice.straggler_time_s == 1.2
    assert twice.who == (1,)
    assert twice.deadline_s(0, USUAL, 1.15) == 1.15
    assert twice.deadline_s(0, USUAL, 1.5) == 1.2
    assert twice.deadline_s(1, USUAL, 1.5) == USUAL, "the straggler goes on as fast as it can"


def test_who_was_asked_to_be_slow_is_no_straggler() -> None:
    state = run(Stragglers(), *[{0: (1.2, 1.2), 1: (USUAL, 1.2)}] * 5)
    assert state.who == (1,)


def test_several_stragglers_count_as_the_slowest() -> None:
    state = run(Stragglers(QUICK), {0: (USUAL, 1.0), 1: (USUAL, 1.2), 2: (USUAL, 1.35)})
    assert state.straggler_time_s == 1.35
    assert state.who == (1, 2)
    state = run(state, {0: (1.35, 1.35), 1: (USUAL, 1.2), 2: (USUAL, 1.0)})
    assert state.straggler_time_s == 1.2


def test_recovery_needs_patience_and_noise_does_not_flap() -> None:
    late, fine = {0: (USUAL, 1.0), 1: (USUAL, 1.2)}, {0: (1.2, 1.2), 1: (USUAL, 1.005)}
    state = run(Stragglers(), late, late, fine, fine)
    assert state.straggler_time_s == 1.2, "two good iterations are not three"
    assert run(state, late, fine, fine).straggler_time_s == 1.2, "a late one in between starts anew"
    back = run(state, fine)
    assert back.straggler_time_s is None
    assert back.deadline_s(0, USUAL, 1.5) == USUAL


def test_between_rise_and_fall_nothing_changes() -> None:
    between = {1: (USUAL, 1.02)}
    assert run(Stragglers(), *[between] * 10).who == ()
    assert run(Stragglers(), *[{1: (USUAL, 1.2)}] * 2, *[between] * 10).who == (1,)


def test_small_changes_of_a_straggler_do_not_change_the_plan() -> None:
    state = run(Stragglers(QUICK), {1: (USUAL, 1.2)}, {1: (USUAL, 1.21)})
    assert state.straggler_time_s == 1.2
    assert run(state, {1: (USUAL, 1.3)}).straggler_time_s == 1.3


def test_a_pipeline_that_is_gone_holds_nobody_up() -> None:
    state = run(Stragglers(QUICK), {0: (USUAL, 1.0), 1: (USUAL, 1.4)}, {0: (1.4, 1.4)})
    assert state.straggler_time_s is None


def test_a_report_that_is_no_time_is_refused() -> None:
    with pytest.raises(RequestError, match="pipeline 3"):
        Stragglers().report({3: (1.0, float("nan"))})


def test_job_energy_is_the_papers_formula() -> None:
    # base = E0*sf + E0*(n-1) + P_b*(T'-T)*pp*(n-1), one GPU per stage
    base_j = job_energy(1000.0 * 1.2, 1000.0, 10.0, 12.0, pipelines=16, ranks=8, blocking_power_w=80.0)
    assert base_j == pytest.approx(1000 * 1.2 + 1000 * 15 + 80 * 2.0 * 8 * 15)
    ours_j = job_energy(850.0 * 1.2, 740.0, 11.5, 12.0, pipelines=16, ranks=8, blocking_power_w=80.0)
    assert ours_j == pytest.approx(850 * 1.2 + 740 * 15 + 80 * 0.5 * 8 * 15)
    assert job_energy(1.0, 5.0, 10.0, 10.0, pipelines=3, ranks=1, blocking_power_w=9.0, stragglers=0) == pytest.approx(15.0)
    with pytest.raises(RequestError):
        job_energy(1.0, 1.0, 1.0, 1.0, pipelines=2, ranks=1, blocking_power_w=1.0, stragglers=3)
