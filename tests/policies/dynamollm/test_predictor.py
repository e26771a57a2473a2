"""The load predictor: what it knows of a week, of a burst and of nothing at all."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powerd_policies.dynamollm.fleet import ClassLoad
from powerd_policies.dynamollm.predictor import DAY_S, UNIX_EPOCH_S, WEEK_S, Injected, Knobs, LoadPredictor, Observed

PLAIN = Knobs(headroom=1.0)


def load(requests: int) -> dict[str, ClassLoad]:
    return {"MM": ClassLoad(requests, requests * 500, requests * 200)}


def daily(at_s: float) -> float:
    """Requests/s of a day: 1 at night, 5 at 14:00; half of it on weekends."""
    of_day = (at_s % DAY_S) / DAY_S
    weekend = (at_s % WEEK_S) >= 5 * DAY_S
    return (3.0 + 2.0 * math.cos(2 * math.pi * (of_day - 14 / 24))) * (0.5 if weekend else 1.0)


def rows(from_s: float, to_s: float, window_s: float = 300.0) -> list[Observed]:
    count = round((to_s - from_s) / window_s)
    return [
        (from_s + (n + 1) * window_s, window_s, load(round(daily(from_s + (n + 0.5) * window_s) * window_s)))
        for n in range(count)
    ]


def test_without_anything_nothing_is_expected() -> None:
    peak = LoadPredictor().peak(0.0, 1800.0)
    assert set(peak) == {i + o for i in "SML" for o in "SML"}
    assert all(rate.requests_per_s == 0.0 for rate in peak.values())


def test_first_minutes_expect_what_they_saw() -> None:
    predictor = LoadPredictor(knobs=PLAIN)
    for n in range(1, 61):
        predictor.observe(5.0 * n, 5.0, load(10))
    rate = predictor.peak(300.0, 600.0)["MM"]
    assert rate.requests_per_s == pytest.approx(2.0)
    assert rate.prompt_tokens_per_s == pytest.approx(1000.0)
    assert rate.output_tokens_per_s == pytest.approx(400.0)


def test_a_burst_is_seen_within_its_minute_and_chance_is_not() -> None:
    predictor = LoadPredictor(knobs=PLAIN)
    for n in range(1, 121):
        predictor.observe(5.0 * n, 5.0, load(5))  # 1/s
    for n in range(121, 133):
        predictor.observe(5.0 * n, 5.0, load(50))
    assert predictor.peak(660.0, 960.0)["MM"].requests_per_s > 8.0
    calm = LoadPredictor(knobs=PLAIN)
    for n in range(1, 121):
        calm.observe(5.0 * n, 5.0, load(6 if n % 24 < 12 else 4))  # a minute of 72, a minute of 48
    assert calm.peak(600.0, 900.0)["MM"].requests_per_s == pytest.approx(1.0, abs=0.05)


def test_a_steady_rise_goes_on_but_not_for_ever() -> None:
    predictor = LoadPredictor(knobs=PLAIN)
    for n in range(1, 31):
        predictor.observe(60.0 * n, 60.0, load(600 + 20 * n))  # 10 to 20 requests/s in half an hour
    soon = predictor.peak(1800.0, 2100.0)["MM"].requests_per_s
    assert 20.0 < soon < 24.0
    assert predictor.peak(1800.0, 1800.0 + 36_000.0)["MM"].requests_per_s <= 1.5 * 20.5


def test_a_learned_week_knows_the_morning_and_the_weekend() -> None:
    predictor = LoadPredictor(knobs=PLAIN)
    predictor.learn(rows(0.0, WEEK_S), shift_s=-WEEK_S)
    for row in rows(0.0, 6 * 3600.0):
        predictor.observe(*row)
    noon = predictor.peak(12 * 3600.0, 14.5 * 3600.0)["MM"].requests_per_s
    assert noon == pytest.approx(5.0, rel=0.03)
    saturday = predictor.peak(5 * DAY_S + 12 * 3600.0, 5 * DAY_S + 14.5 * 3600.0)["MM"].requests_per_s
    assert saturday == pytest.approx(2.5, rel=0.03)


def test_the_template_bends_to_a_busier_day_than_those_it_knows() -> None:
    predictor = LoadPredictor(knobs=PLAIN)
    predictor.learn(rows(0.0, WEEK_S), shift_s=-WEEK_S)
    for now_s, window_s, arrivals in rows(0.0, 6 * 3600.0):
        predictor.observe(now_s, window_s, load(round(1.4 * arrivals["MM"].requests)))
    assert predictor.peak(12 * 3600.0, 14.5 * 3600.0)["MM"].requests_per_s == pytest.approx(7.0, rel=0.05)


def test_one_strange_day_does_not_move_the_median_of_three() -> None:
    predictor = LoadPredictor(knobs=PLAIN)
    for day in range(4):
        for now_s, window_s, arrivals in rows(day * DAY_S, (day + (1.0 if day < 3 else 0.4)) * DAY_S):
            predictor.observe(now_s, window_s, load(round((10 if day == 1 else 1) * arrivals["MM"].requests)))
    assert predictor.peak(3 * DAY_S + 13 * 3600.0, 3 * DAY_S + 15 * 3600.0)["MM"].requests_per_s == pytest.approx(5.0, rel=0.03)


def test_what_was_not_observed_is_missing_and_not_zero() -> None:
    predictor = LoadPredictor(knobs=PLAIN)
    for n in range(1, 12):
        predictor.observe(300.0 * n, 60.0, load(120))  # a minute of every five
    assert predictor.peak(3300.0, 3600.0)["MM"].requests_per_s == pytest.approx(2.0)


def test_the_week_begins_where_it_is_said_to() -> None:
    """A trace that begins on a Saturday noon, after a week of history that ends there."""
    begin_s = 5 * DAY_S + 12 * 3600.0
    predictor = LoadPredictor(knobs=PLAIN, epoch_s=begin_s)
    predictor.learn(rows(begin_s, begin_s + WEEK_S), shift_s=-begin_s - WEEK_S)
    saturday = predictor.peak(1.5 * 3600.0, 2.5 * 3600.0)["MM"].requests_per_s
    monday = predictor.peak(2 * DAY_S + 1.5 * 3600.0, 2 * DAY_S + 2.5 * 3600.0)["MM"].requests_per_s
    assert saturday == pytest.approx(2.5, rel=0.03)
    assert monday == pytest.approx(5.0, rel=0.03)


def test_unix_time_knows_its_weekdays() -> None:
    predictor = LoadPredictor(knobs=PLAIN, epoch_s=UNIX_EPOCH_S)
    monday_s = datetime(2026, 11, 16, tzinfo=UTC).timestamp()
    predictor.learn(rows(0.0, WEEK_S), shift_s=monday_s)
    sunday = datetime(2026, 11, 29, 14, tzinfo=UTC).timestamp()
    assert predictor.peak(sunday, sunday + 1800.0)["MM"].requests_per_s == pytest.approx(2.5, rel=0.03)
    assert predictor.peak(sunday + DAY_S, sunday + DAY_S + 1800.0)["MM"].requests_per_s == pytest.approx(5.0, rel=0.03)


def test_overlapping_windows_count_each_request_once() -> None:
    predictor = LoadPredictor(knobs=PLAIN)
    for n in range(12, 200):
        predictor.observe(5.0 * n, 60.0, load(120))
    assert predictor.peak(1000.0, 1300.0)["MM"].requests_per_s == pytest.approx(2.0)


def test_time_that_runs_back_and_strange_classes_are_refused_and_change_nothing() -> None:
    predictor = LoadPredictor(knobs=PLAIN)
    predictor.observe(60.0, 60.0, load(60))
    before = predictor.peak(60.0, 360.0)
    with pytest.raises(ValueError, match="only later"):
        predictor.observe(30.0, 30.0, load(1000))
    with pytest.raises(ValueError, match="XX"):
        predictor.observe(90.0, 30.0, {"XX": ClassLoad(1, 1, 1)})
    with pytest.raises(ValueError, match="before it observes"):
        predictor.learn(rows(0.0, DAY_S), shift_s=-DAY_S)
    assert predictor.peak(60.0, 360.0) == before


def test_injected_error_is_the_same_every_time_and_as_large_as_asked() -> None:
    predictor = LoadPredictor(knobs=PLAIN, injected=Injected(bias=0.1))
    spread = LoadPredictor(knobs=PLAIN, injected=Injected(spread=0.2, seed=7))
    for each in (predictor, spread):
        for n in range(1, 61):
            each.observe(5.0 * n, 5.0, load(10))
    assert predictor.peak(300.0, 600.0)["MM"].requests_per_s == pytest.approx(2.2)
    assert spread.peak(300.0, 600.0) == spread.peak(300.0, 600.0)
    logs = [math.log(Injected(spread=0.2, seed=7).factor("MM", slot)) for slot in range(2000)]
    assert math.sqrt(sum(x * x for x in logs) / len(logs)) == pytest.approx(0.2, rel=0.1)


@settings(max_examples=40, deadline=None)
@given(
    past=st.lists(st.integers(0, 200), min_size=1, max_size=60),
    futures=st.tuples(*[st.lists(st.integers(0, 2000), max_size=30)] * 2),
    ahead_s=st.floats(0.0, 90_000.0),
    history=st.lists(st.integers(0, 500), max_size=40),
)
def test_whatever_comes_later_a_prediction_is_what_it_was(
    past: list[int], futures: tuple[list[int], list[int]], ahead_s: float, history: list[int]
) -> None:
    """Two services with one past and two futures: up to the fork every prediction is equal."""
    said = []
    for future in futures:
        predictor = LoadPredictor()
        predictor.learn([(300.0 * (n + 1), 300.0, load(x)) for n, x in enumerate(history)], shift_s=-DAY_S)
        answers = []
        for n, requests in enumerate(past + future):
            predictor.observe(60.0 * (n + 1), 60.0, load(requests))
            answers.append(predictor.peak(60.0 * (n + 1) + ahead_s, 60.0 * (n + 1) + ahead_s + 1800.0))
        said.append(answers[: len(past)])
    assert said[0] == said[1]
