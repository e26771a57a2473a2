"""1,000 windows of random length and phase on the stepped simulated driver: what is promised of energy windows."""

import functools
import statistics

import pytest

from benchmarks.energy import ScoredWindow, Setup, campaign


@functools.cache
def score(windows: int = 400, sample_hz: float = 10.0, counter: bool = True, wait: bool = True) -> list[ScoredWindow]:
    """Half of the windows on each model."""
    scored = []
    for model, seed in (("a100-sxm-500w", 11), ("h100-sxm", 12)):
        scored += campaign(Setup(model, windows // 2, seed, sample_hz=sample_hz, counter=counter, wait=wait))
    return scored


def covered(scored: list[ScoredWindow]) -> float:
    return sum(s.covered for s in scored) / len(scored)


def test_a_thousand_windows_cover_the_truth_and_are_accurate_from_ten_seconds() -> None:
    scored = score(1000)
    assert len(scored) == 1000
    assert min(s.seconds for s in scored) < 3
    assert max(s.seconds for s in scored) > 29
    assert covered(scored) >= 0.95
    long = [s for s in scored if s.seconds >= 10]
    assert abs(statistics.fmean(s.error for s in long)) <= 0.01
    assert statistics.fmean(abs(s.error) for s in long) <= 0.01
    assert {s.figure.method for s in scored} == {"counter"}
    # An interval that covers everything tells nothing.
    assert statistics.median(s.width for s in long) <= 0.015


def test_the_load_of_the_campaign_varies_so_that_edges_matter() -> None:
    powers = [s.true_j / s.seconds for s in score(1000)]
    assert max(powers) > 2 * min(powers)


def test_an_answer_at_once_is_wider_and_still_covers() -> None:
    waited, at_once = score(), score(wait=False)
    assert covered(at_once) >= 0.95
    short = [(a.width, b.width) for a, b in zip(waited, at_once, strict=True) if a.seconds < 5]
    assert statistics.median(b for _, b in short) > statistics.median(a for a, _ in short)
    assert {s.figure.method for s in at_once} == {"counter+power"}


@pytest.mark.parametrize(("sample_hz", "windows"), [(1.0, 400), (100.0, 64)])
def test_other_sampling_rates_cover_too(sample_hz: float, windows: int) -> None:
    assert covered(score(windows, sample_hz)) >= 0.95


def test_without_a_counter_power_is_integrated_and_the_interval_says_what_a_power_sensor_is_worth() -> None:
    scored = score(counter=False)
    assert {s.figure.method for s in scored} == {"integrated"}
    assert covered(scored) >= 0.95
    long = [s for s in scored if s.seconds >= 10]
    assert statistics.fmean(abs(s.error) for s in long) <= 0.01
    assert statistics.median(s.width for s in long) >= 0.05
