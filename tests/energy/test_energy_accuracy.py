"""1,000 windows of random length and phase on the stepped simulated driver: what is promised of energy windows."""

import statistics

import pytest

from benchmarks.energy import Scored, Setup, campaign


def _score(**changes: object) -> list[Scored]:
    scored = []
    for model, seed in (("a100-sxm-500w", 11), ("h100-sxm", 12)):
        scored += campaign(Setup(model, 500, seed, **changes))
    return scored


def test_a_thousand_windows_cover_the_truth_and_are_accurate_from_ten_seconds():
    scored = _score()
    assert len(scored) == 1000
    assert min(s.seconds for s in scored) < 3
    assert max(s.seconds for s in scored) > 29
    assert sum(s.covered for s in scored) >= 950
    long = [s for s in scored if s.seconds >= 10]
    assert abs(statistics.fmean(s.error for s in long)) <= 0.01
    assert statistics.fmean(abs(s.error) for s in long) <= 0.01
    assert {s.figure.method for s in scored} == {"counter"}
    # An interval that covers everything tells nothing.
    assert statistics.median(s.width for s in long) <= 0.015


def test_the_load_of_the_campaign_varies_so_that_edges_matter():
    powers = [s.true_j / s.seconds for s in _score()]
    assert max(powers) > 2 * min(powers)


def test_an_answer_at_once_is_wider_and_still_covers():
    waited, at_once = _score(), _score(wait=False)
    assert sum(s.covered for s in at_once) >= 950
    short = [(a.width, b.width) for a, b in zip(waited, at_once, strict=True) if a.seconds < 5]
    assert statistics.median(b for _, b in short) > statistics.median(a for a, _ in short)
    assert {s.figure.method for s in at_once} == {"counter+power"}


@pytest.mark.parametrize("sample_hz", [1.0, 100.0])
def test_other_sampling_rates_cover_too(sample_hz: float):
    scored = _score(sample_hz=sample_hz)
    assert sum(s.covered for s in scored) >= 950


def test_without_a_counter_power_is_integrated_and_the_interval_says_what_a_power_sensor_is_worth():
    scored = _score(counter=False)
    assert {s.figure.method for s in scored} == {"integrated"}
    assert sum(s.covered for s in scored) >= 950
    long = [s for s in scored if s.seconds >= 10]
    assert statistics.fmean(abs(s.error) for s in long) <= 0.01
    assert statistics.median(s.width for s in long) >= 0.05
