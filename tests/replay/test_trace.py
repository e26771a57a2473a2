"""Traces: what is read is what the file says, what is wrong is named, scaled load keeps lengths and rate, weeks have a shape."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powerd import resources
from powerd.errors import RequestError
from powerd.sim.replay import generate, scale, trace
from powerd.sim.replay.generate import DAY_S, Shape
from powerd.sim.replay.trace import WEEK_S, Trace

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
REAL = resources.folder("profiles") / "traces" / "azure_llm_2023_conversation.csv.gz"


def test_the_published_hour_is_read_whole(hour: Trace) -> None:
    assert len(hour) == 19366
    assert (hour.prompt_tokens[0], hour.output_tokens[0]) == (374, 44)
    assert hour.arrival_s[1] == pytest.approx(4.314579)
    assert hour.arrival_s[-1] == pytest.approx(3501.721937)
    assert hour.begin_week_s == pytest.approx(3 * DAY_S + 18 * 3600 + 15 * 60 + 46.68059)  # a Thursday


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "t.csv:1: no column TIMESTAMP, ContextTokens, GeneratedTokens"),
        ("TIMESTAMP,ContextTokens\n1,2\n", "t.csv:1: no column GeneratedTokens"),
        (HEAD, "t.csv: no requests"),
        (HEAD + "2023-11-16 18:15:46,3,4\n\n2023-11-16 18:15:45,3,4\n", "t.csv:4: TIMESTAMP: earlier"),
        (HEAD + "2023-11-16 18:15:46,3,4\nsoon,3,4\n", "t.csv:3: TIMESTAMP: 'soon' is no time"),
        (HEAD + ",3,4\n", "t.csv:2: TIMESTAMP: '' is no time"),
        (HEAD + "1.5,3,4\nnan,3,4\n", "t.csv:3: TIMESTAMP: 'nan' is no time"),
        (HEAD + "1.5,3,4\n2,x,4\n", "t.csv:3: ContextTokens: 'x' is no number of tokens"),
        (HEAD + "1.5,3,4\n2,3,0\n", "t.csv:3: GeneratedTokens: '0' is no number of tokens"),
        (HEAD + "1.5,3,4\n2,3,-7\n", "t.csv:3: GeneratedTokens: '-7'"),
        (HEAD + "1.5,3,4\n2,99999999999999999999,4\n", "t.csv:3: ContextTokens"),
        (HEAD + "1.5,3.5,4\n", "t.csv:2: ContextTokens: '3.5'"),
        (HEAD + "1.5,3\n", "t.csv:2: GeneratedTokens: the row ends before it"),
    ],
)
def test_a_bad_trace_is_refused_with_file_line_and_column(text: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        trace.parse(text, "t.csv")
    assert str(caught.value).startswith(said)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no such file|No such file"):
        trace.read(tmp_path / "none.csv")
    broken = tmp_path / "broken.csv.gz"
    broken.write_bytes(gzip.compress(HEAD.encode() * 500)[:40])
    with pytest.raises(RequestError, match=r"broken\.csv\.gz"):
        trace.read(broken)


def test_columns_are_found_by_name_and_times_in_any_usual_form() -> None:
    dated = trace.parse(
        "id,GeneratedTokens,TIMESTAMP,ContextTokens\na,4,2024-05-10 00:00:00.009930+00:00,3\nb,5,2024-05-10T00:00:02Z,6\n", "t"
    )
    assert dated.prompt_tokens.tolist() == [3, 6]
    assert dated.output_tokens.tolist() == [4, 5]
    assert dated.arrival_s.tolist() == [0.0, pytest.approx(1.99007)]
    plain = trace.parse(HEAD + "10,3,4\n12.5,6,5\n", "t")
    assert plain.arrival_s.tolist() == [0.0, 2.5]


def test_what_is_written_is_read_again(tmp_path: Path, hour: Trace) -> None:
    part = hour.between(600, 900)
    trace.write(tmp_path / "part.csv.gz", part)
    again = trace.read(tmp_path / "part.csv.gz")
    assert np.array_equal(again.prompt_tokens, part.prompt_tokens)
    assert np.array_equal(again.output_tokens, part.output_tokens)
    assert np.allclose(again.arrival_s, part.arrival_s - part.arrival_s[0], atol=2e-6)


@settings(max_examples=20, deadline=None)
@given(factor=st.floats(0.05, 12.0), seed=st.integers(0, 5))
def test_scaled_load_keeps_lengths_time_and_rate(hour: Trace, factor: float, seed: int) -> None:
    made = scale.scaled(hour, factor, seed)
    assert len(made) == pytest.approx(factor * len(hour), rel=0.05)
    assert (np.diff(made.arrival_s) >= 0).all()
    assert made.arrival_s[0] >= 0
    assert made.arrival_s[-1] <= hour.length_s == made.length_s
    pairs = Counter(zip(made.prompt_tokens.tolist(), made.output_tokens.tolist(), strict=True))
    whole, real = int(factor), Counter(zip(hour.prompt_tokens.tolist(), hour.output_tokens.tolist(), strict=True))
    assert all(whole * real[pair] <= count <= (whole + 1) * real[pair] for pair, count in pairs.items())
    again = scale.scaled(hour, factor, seed)
    assert np.array_equal(again.arrival_s, made.arrival_s)
    assert np.array_equal(again.output_tokens, made.output_tokens)


def test_a_larger_load_holds_the_smaller_one(hour: Trace) -> None:
    small, large = (set(scale.scaled(hour, factor).arrival_s.tolist()) for factor in (2.3, 2.7))
    assert small < large


def test_copies_move_by_no_more_than_the_jitter() -> None:
    one = trace.parse(HEAD + "0,1,1\n100,2,2\n200,3,3\n", "t")
    many = scale.scaled(one, 50)
    for tokens, at_s in ((1, 0), (2, 100), (3, 200)):
        times = [t for t, p in zip(many.arrival_s, many.prompt_tokens, strict=True) if p == tokens]
        assert len(times) == 50
        assert max(abs(t - at_s) for t in times) <= 15
        assert max(times) - min(times) > 10


@pytest.mark.parametrize("factor", [0.0, -1.0, 101.0, float("nan")])
def test_a_senseless_load_is_refused(hour: Trace, factor: float) -> None:
    with pytest.raises(RequestError, match="load"):
        scale.scaled(hour, factor)


def test_a_generated_week_has_the_stated_mean_nights_and_weekends(hour: Trace) -> None:
    week = generate.generate(hour, WEEK_S, seed=3, shape=Shape(requests_per_s=2.0))
    assert week.requests_per_s == pytest.approx(2.0, rel=0.05)
    rate = np.bincount((week.arrival_s // 3600).astype(int), minlength=168) / 3600
    days = rate.reshape(7, 24)
    afternoon, night = days[:5, 13:16].mean(), days[:5, 1:4].mean()
    assert 2.5 < afternoon / night < 4.5
    assert 0.7 < days[5:].mean() / days[:5].mean() < 0.9
    real = set(zip(hour.prompt_tokens.tolist(), hour.output_tokens.tolist(), strict=True))
    assert set(zip(week.prompt_tokens[:5000].tolist(), week.output_tokens[:5000].tolist(), strict=True)) <= real
    at_night = (week.arrival_s % DAY_S // 3600) < 6
    assert week.output_tokens[at_night].mean() > 1.03 * week.output_tokens[~at_night].mean()


def test_a_seed_decides_everything_and_another_changes_it(hour: Trace) -> None:
    first, again, other = (generate.generate(hour, 7200, seed, begin_week_s=DAY_S) for seed in (1, 1, 2))
    assert np.array_equal(first.arrival_s, again.arrival_s)
    assert np.array_equal(first.output_tokens, again.output_tokens)
    assert first.arrival_s[:50].tolist() != other.arrival_s[:50].tolist()


def test_generated_load_is_as_bursty_as_the_real_hour(hour: Trace) -> None:
    """Variance over mean of counts in windows of 5 s and 60 s: Poisson would have 1."""
    made = generate.generate(hour, DAY_S, seed=4, shape=Shape(night=1.0, weekend=1.0))
    for window_s in (5, 60):
        counts = [np.bincount((t.arrival_s // window_s).astype(int))[:-1] for t in (hour, made)]
        real, generated = (c.var() / c.mean() for c in counts)
        assert generated == pytest.approx(real, rel=0.45)
