"""Profiles: exact where measured, labelled where interpolated, "not covered" beyond; files with their faults named."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from powerd.errors import RequestError
from powerd_policies.dynamollm import profile_file
from powerd_policies.dynamollm.classes import Slo
from powerd_policies.dynamollm.profile import NotCoveredError, Profile, ProfilePoint, Source


def point(
    name: str = "SS", tp: int = 4, clock_mhz: int = 1500, rps: float = 1.0, power_w: float = 1000.0, ttft_s: float = 0.1,
    tbt_s: float = 0.05, feasible: bool = True, source: Source = "measured",
) -> ProfilePoint:  # fmt: skip
    return ProfilePoint(name, tp, clock_mhz, rps, power_w / rps, ttft_s, tbt_s, power_w, feasible, source)


def row(tp: int, clock_mhz: int, watts: Iterable[float], name: str = "SS", last: bool = True) -> list[ProfilePoint]:
    """Loads 1, 2, 3, ...: watts as given, TTFT 0.1 s more with each."""
    made = [point(name, tp, clock_mhz, n, w, 0.1 * n, 0.02 * n) for n, w in enumerate(watts, 1)]
    if not last:
        made[-1] = point(name, tp, clock_mhz, len(made), made[-1].power_w, 0.1 * len(made), 0.02 * len(made), feasible=False)
    return made


GRID = Profile(
    [
        *row(4, 1800, (1000, 1200, 1400)),
        *row(4, 1200, (600, 700, 800), last=False),
        *row(8, 1800, (1500, 1700, 2000)),
        *row(8, 1500, (1100, 1300, 1500)),
        *row(8, 1200, (900, 1000, 1100)),
    ]
)


def test_a_measured_point_is_given_back_as_it_is() -> None:
    for own in GRID.points:
        assert GRID.at(own.request_class, own.tp, own.clock_mhz, own.requests_per_s) is own


def test_between_two_loads_power_and_latency_are_on_a_line_and_labelled() -> None:
    half = GRID.at("SS", 4, 1800, 1.5)
    assert (half.power_w, half.source) == (1100, "interpolated")
    assert half.ttft_p99_s == pytest.approx(0.15)
    assert half.energy_per_request_j == pytest.approx(1100 / 1.5), "energy per second is on the line, as power is"


def test_a_clock_between_two_measured_ones_is_on_the_line_between_them() -> None:
    between = GRID.at("SS", 4, 1500, 2)
    assert (between.clock_mhz, between.power_w, between.source) == (1500, 950, "interpolated")
    assert GRID.at("SS", 4, 1500, 3).feasible is False, "one of its neighbours is infeasible there"


def test_a_clock_measured_at_another_parallelism_only_gets_its_difference() -> None:
    sparse = Profile([*row(4, 1800, (1000, 1200)), *row(8, 1800, (1500, 1700)), *row(8, 1500, (1400, 1500))])
    added = sparse.at("SS", 4, 1500, 2)
    assert (added.tp, added.clock_mhz, added.source) == (4, 1500, "interpolated")
    assert added.power_w == 1200 + (1500 - 1700)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("SS", 4, 1800, 3.5), "3.5 requests/s .* not covered: the profile holds 1 to 3"),
        (("SS", 4, 1800, 0.5), "0.5 requests/s .* the profile holds 1 to 3"),
        (("SS", 4, 1950, 2), "1950 MHz is not covered for class SS at TP4: the profile holds 1200 to 1800 MHz"),
        (("SS", 4, 900, 2), "900 MHz is not covered"),
        (("SS", 2, 1800, 1), "does not hold TP2: it holds TP4, TP8"),
        (("LL", 4, 1800, 1), "does not hold class LL: it holds SS"),
    ],
)
def test_beyond_the_axes_the_answer_is_not_covered(asked: tuple[str, int, int, float], said: str) -> None:
    with pytest.raises(NotCoveredError, match=said):
        GRID.at(*asked)


def test_capacity_is_the_load_at_which_the_slo_is_just_kept() -> None:
    assert GRID.capacity_rps("SS", 4, 1800) == 3
    assert GRID.capacity_rps("SS", 4, 1200) == 2, "the third point is infeasible"
    assert GRID.capacity_rps("SS", 4, 1800, Slo(0.25, 1.0)) == pytest.approx(2.5)
    assert GRID.capacity_rps("SS", 4, 1800, Slo(1.0, 0.03)) == pytest.approx(1.5)
    assert GRID.capacity_rps("SS", 4, 1800, Slo(0.05, 1.0)) == 0.0
    assert GRID.capacity_rps("SS", 4, 1500) == 2, "a clock without its own points"
    with pytest.raises(NotCoveredError, match="TP2"):
        GRID.capacity_rps("SS", 2, 1800)


def test_power_of_one_class_alone_is_its_own_and_of_two_is_between() -> None:
    both = Profile([*row(4, 1500, (1000, 1200, 1400)), *row(4, 1500, (800, 900, 1000, 1100), name="LL")])
    assert both.power_w(4, 1500, {"SS": 2}) == pytest.approx(1200)
    # A third of SS's capacity and a quarter of LL's: both weigh what they would draw alone at 7/12.
    used = 1 / 3 + 1 / 4
    alone = (both.at("SS", 4, 1500, used * 3).power_w, both.at("LL", 4, 1500, used * 4).power_w)
    told = both.power_w(4, 1500, {"SS": 1, "LL": 1})
    assert told == pytest.approx((alone[0] / 3 + alone[1] / 4) / used)
    assert both.power_w(4, 1500, {"SS": 0.1}) == 1000, "the lowest load that was measured is an upper bound"
    assert both.power_w(4, 1500, {}) == 800


def test_power_of_more_than_fits_is_not_covered() -> None:
    with pytest.raises(NotCoveredError, match="133% of what TP4 at 1800 MHz holds: 4/s of SS"):
        GRID.power_w(4, 1800, {"SS": 4})
    never = Profile([point(feasible=False)])
    with pytest.raises(NotCoveredError, match="class SS is infeasible at TP4 and 1500 MHz"):
        never.power_w(4, 1500, {"SS": 1})


def test_what_cannot_be_planned_with_is_refused_before_planning() -> None:
    slos = {"SS": Slo(0.25, 0.1)}
    GRID.require(slos, (4, 8))
    with pytest.raises(RequestError, match="does not hold TP2") as refused:
        GRID.require(slos, (2, 4))
    assert refused.value.hint.startswith("it holds TP4, TP8")
    with pytest.raises(RequestError, match="does not hold class LL"):
        GRID.require({**slos, "LL": Slo(2.0, 0.1)})
    with pytest.raises(RequestError, match=r"class SS cannot keep TTFT 0\.01 s .* TTFT 0\.1 s and TBT 0\.02 s; allow that much"):
        GRID.require({"SS": Slo(0.01, 0.1)})
    with pytest.raises(RequestError, match="class SS is marked infeasible at every load"):
        Profile([point(feasible=False)]).require(slos)


def test_a_point_that_is_there_twice_is_refused() -> None:
    with pytest.raises(RequestError, match="class SS at TP4, 1500 MHz and 1 requests/s is there twice"):
        Profile([point(), point(power_w=900)])


HEAD = "class,tp,clock_mhz,requests_per_s,energy_per_request_j,ttft_p99_s,tbt_p99_s,power_w,feasible,source"
GOOD = "SS,4,1500,1.0,1000.0,0.1,0.05,1000.0,true,measured"


def test_columns_may_come_in_any_order_and_rows_too() -> None:
    text = "feasible,tp,class,clock_mhz,power_w,tbt_p99_s,ttft_p99_s,energy_per_request_j,requests_per_s\n"
    text += "yes,4,SS,1500,1200,0.05,0.1,600,2\n\nno,4,SS,1500,1000,0.05,0.1,1000,1\n"
    found = profile_file.parse(text).points
    assert [(p.requests_per_s, p.feasible, p.source) for p in found] == [(1, False, "measured"), (2, True, "measured")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1 lacks the column class"),
        (HEAD, "has no rows"),
        (HEAD.replace(",power_w", "") + "\n" + GOOD, "line 1 lacks the column power_w"),
        (HEAD + ",colour\n" + GOOD + ",red", "unknown column 'colour'"),
        (HEAD + "\n" + GOOD + ",red", "line 2 has 11 cells, the first line 10"),
        (HEAD + "\n" + GOOD.replace("0.1", "nan"), "line 2: ttft_p99_s is nan"),
        (HEAD + "\n" + GOOD.replace("0.05", "inf"), "line 2: tbt_p99_s is inf"),
        (HEAD + "\n" + GOOD.replace("1000.0,true", "-5,true"), "line 2: power_w is -5"),
        (HEAD + "\n" + GOOD + "\n" + GOOD.replace("1.0", "0", 1), "line 3: requests_per_s is 0"),
        (HEAD + "\n" + GOOD.replace("1500", "fast"), "line 2: clock_mhz is 'fast', which is no number"),
        (HEAD + "\n" + GOOD.replace(",4,", ",4.5,"), "line 2: tp is 4.5"),
        (HEAD + "\n" + GOOD.replace("SS", "XL"), "line 2: class is 'XL'"),
        (HEAD + "\n" + GOOD.replace("true", "maybe"), "line 2: feasible is 'maybe'"),
        (HEAD + "\n" + GOOD.replace("measured", "guessed"), "line 2: source is 'guessed'"),
        (HEAD + "\n" + GOOD + "\n" + GOOD, "line 3 is there already, in line 2"),
    ],
)
def test_a_bad_file_is_refused_with_line_and_column(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.csv"
    file.write_text(text)
    with pytest.raises(RequestError) as refused:
        profile_file.load(file)
    assert refused.value.message.startswith(str(file))
    assert said in refused.value.message


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"cannot read the profile .*gone\.csv"):
        profile_file.load(tmp_path / "gone.csv")
