"""Whatever was measured: interpolation is exact at the points, stays between neighbours, keeps order, and never goes beyond."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerd_policies.dynamollm import profile_file
from powerd_policies.dynamollm.classes import NAMES, Slo
from powerd_policies.dynamollm.profile import NotCoveredError, Profile, ProfilePoint, Source

VALUES = ("energy_per_request_j", "ttft_p99_s", "tbt_p99_s", "power_w")
number = st.floats(1e-3, 1e4)


@st.composite
def rows(draw: st.DrawFn, monotone: bool = False) -> list[ProfilePoint]:
    """One class, parallelism and clock at several loads."""
    loads = sorted(draw(st.lists(st.floats(0.01, 100), min_size=2, max_size=8, unique_by=lambda x: round(x, 3))))
    columns = [draw(st.lists(number, min_size=len(loads), max_size=len(loads))) for _ in VALUES]
    if monotone:
        columns = [sorted(columns[0], reverse=True), *(sorted(column) for column in columns[1:])]
    feasible = draw(st.lists(st.booleans(), min_size=len(loads), max_size=len(loads)))
    energy, ttft, tbt, watts = columns
    return [ProfilePoint("MM", 4, 1500, load, energy[n], ttft[n], tbt[n], watts[n], feasible[n]) for n, load in enumerate(loads)]


@given(rows(), st.floats(0, 1), st.data())
def test_it_is_exact_at_the_points_and_between_its_neighbours_elsewhere(
    row: list[ProfilePoint], share: float, data: st.DataObject
) -> None:
    profile = Profile(data.draw(st.permutations(row)))
    for own in row:
        assert profile.at("MM", 4, 1500, own.requests_per_s) is own
    at = data.draw(st.integers(0, len(row) - 2))
    low, high = row[at], row[at + 1]
    load = low.requests_per_s + share * (high.requests_per_s - low.requests_per_s)
    made = profile.at("MM", 4, 1500, load)
    for name in VALUES:
        ends = sorted((getattr(low, name), getattr(high, name)))
        assert ends[0] * (1 - 1e-9) <= getattr(made, name) <= ends[1] * (1 + 1e-9)
    if made not in row:
        assert made.source == "interpolated"
        assert made.feasible == (low.feasible and high.feasible)


@given(rows(monotone=True), st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_what_rises_with_load_rises_between_the_points_too(row: list[ProfilePoint], shares: list[float]) -> None:
    profile = Profile(row)
    first, last = row[0].requests_per_s, row[-1].requests_per_s
    low, high = (profile.at("MM", 4, 1500, min(first + share * (last - first), last)) for share in sorted(shares))
    for name in VALUES[1:]:
        assert getattr(low, name) <= getattr(high, name) * (1 + 1e-9)


@given(rows(), st.floats(1e-6, 10))
def test_it_never_goes_beyond(row: list[ProfilePoint], by: float) -> None:
    profile = Profile(row)
    for load in (row[0].requests_per_s * (1 - min(by, 0.99)), row[-1].requests_per_s * (1 + by)):
        with pytest.raises(NotCoveredError):
            profile.at("MM", 4, 1500, load)
    for clock_mhz in (1499, 1501):
        with pytest.raises(NotCoveredError):
            profile.at("MM", 4, clock_mhz, row[0].requests_per_s)


@given(rows(), number, number)
def test_every_load_up_to_the_capacity_keeps_the_slo(row: list[ProfilePoint], ttft_s: float, tbt_s: float) -> None:
    profile, slo = Profile(row), Slo(ttft_s, tbt_s)
    most = profile.capacity_rps("MM", 4, 1500, slo)
    assert most == 0.0 or row[0].requests_per_s <= most <= row[-1].requests_per_s
    assert profile.capacity_rps("MM", 4, 1500, Slo(2 * ttft_s, 2 * tbt_s)) >= most, "a looser SLO holds no less"
    for n in range(1, 20):
        load = most * n / 19
        if load >= row[0].requests_per_s:
            seen = profile.at("MM", 4, 1500, load)
            assert seen.ttft_p99_s <= ttft_s * (1 + 1e-6)
            assert seen.tbt_p99_s <= tbt_s * (1 + 1e-6)


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from((2, 4, 8)), st.integers(1, 2000), number), min_size=1,
                unique=True), st.data())  # fmt: skip
def test_what_is_written_is_read_back(keys: list[tuple[str, int, int, float]], data: st.DataObject) -> None:
    numbers = st.tuples(number, number, number, number)
    sources: st.SearchStrategy[Source] = st.sampled_from(("measured", "modelled", "interpolated"))
    points = []
    for key in keys:
        energy, ttft, tbt, watts = data.draw(numbers)
        points.append(ProfilePoint(*key, energy, ttft, tbt, watts, data.draw(st.booleans()), data.draw(sources)))
    assert set(profile_file.parse(profile_file.dump(Profile(points))).points) == set(points)
