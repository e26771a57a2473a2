"""What the horizontal pod autoscaler makes of our metric."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerd_integrations.keda.hpa import Hpa, acted_on, desired_replicas


@pytest.mark.parametrize(
    ("current", "metric", "becomes"),
    [
        (11, 12, 11),  # within the tolerance: ignored
        (10, 12, 12),
        (12, 11, 12),  # likewise downward
        (12, 10, 10),
        (1, 2, 2),
        (10, 11, 10),  # exactly at the tolerance: Kubernetes counts it as within
        (0, 5, 0),  # from zero only KEDA starts
        (3, 0, 0),
    ],
)
def test_the_formula(current: int, metric: int, becomes: int) -> None:
    assert desired_replicas(metric, current) == becomes


def test_without_tolerance_it_follows_the_plan() -> None:
    assert desired_replicas(12, 11, tolerance=0.0) == 12
    assert desired_replicas(11, 12, tolerance=0.01) == 11


@given(st.integers(1, 2000), st.integers(0, 2000), st.floats(0.0, 0.5))
def test_growth_is_never_ignored_and_costs_the_tolerance_at_most(current: int, desired: int, tolerance: float) -> None:
    metric = acted_on(desired, current, tolerance)
    assert metric >= desired
    if desired > current:
        assert desired_replicas(metric, current, tolerance=tolerance) == metric > current
        assert metric <= max(desired, math.floor(current * (1 + tolerance)) + 2)
    else:
        assert metric == desired


def test_scale_down_waits_for_the_window_and_scale_up_does_not() -> None:
    hpa = Hpa(4)
    assert hpa.update(0.0, 8) == 8
    assert [hpa.update(15.0 * n, 2) for n in range(1, 21)] == [8] * 20, "five minutes"
    assert hpa.update(315.0, 2) == 2
    assert hpa.update(316.0, 6) == 6


def test_with_the_window_of_our_manifests_it_follows_at_once() -> None:
    hpa = Hpa(8, tolerance=0.0, scale_down_window_s=0.0)
    assert hpa.update(0.0, 2) == 2
