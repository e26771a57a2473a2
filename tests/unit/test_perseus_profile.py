"""Profiles: what is read, what is refused with its row, what is left to choose from."""

from __future__ import annotations

from pathlib import Path

import pytest

from powerd.errors import RequestError
from powerd.resources import folder
from powerd_policies.perseus import profile
from powerd_policies.perseus.profile import Row

HEADER = "stage,instruction,frequency,time,energy"
GOOD = [
    f"{stage},{kind},{mhz},{work * 1410 / mhz},{work * 300 * (mhz / 1410) ** 1.5 + 20}"
    for stage in (0, 1)
    for kind, work in (("forward", 0.1), ("backward", 0.2))
    for mhz in (1410, 1305, 1200, 1095)
]


def text(lines: list[str]) -> str:
    return "\n".join([HEADER, *lines]) + "\n"


def changed(line: int, column: str, value: str) -> str:
    """The good profile with one cell replaced; the header is line 1."""
    lines = list(GOOD)
    cells = lines[line - 2].split(",")
    cells[HEADER.split(",").index(column)] = value
    lines[line - 2] = ",".join(cells)
    return text(lines)


def without(*lines: int) -> str:
    return text([row for number, row in enumerate(GOOD, 2) if number not in lines])


def test_the_published_profiles_are_read() -> None:
    rows = profile.read(folder("profiles") / "stage_profile_gpt3-175b_a40.csv")
    assert len(rows) == 8 * 2 * 60
    assert rows[0] == Row(0, "forward", 1740, 0.11248032760620108, 33.59392799949646)
    assert profile.read(profile.write(rows)) == rows


def test_columns_may_come_in_another_order() -> None:
    rows = profile.read("energy,time,frequency,instruction,stage\n20,0.1,1410,forward,0\n15,0.12,1200,forward,0\n")
    assert rows[0] == Row(0, "forward", 1410, 0.1, 20.0)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (changed(4, "time", "nan"), "line 4: time is nan"),
        (changed(4, "energy", "inf"), "line 4: energy is inf"),
        (changed(5, "time", "0"), "line 5: time is 0"),
        (changed(5, "energy", "-3"), "line 5: energy is -3"),
        (changed(6, "frequency", "12.5"), "line 6: frequency is 12.5"),
        (changed(6, "frequency", "fast"), "line 6: frequency is 'fast'"),
        (changed(7, "stage", "-1"), "line 7: stage is -1"),
        (changed(7, "instruction", ""), "line 7: the instruction is empty"),
        (changed(4, "time", "0.01"), "line 4: forward of stage 0 at 1200 MHz takes 0.01 s, less than"),
        (changed(4, "energy", "2"), "line 4: forward of stage 0 at 1200 MHz draws"),
        (changed(4, "frequency", ""), "line 4: forward of stage 0: a row without a clock"),
        (text([*GOOD, GOOD[2]]), "line 18: forward of stage 0 at 1200 MHz is there twice"),
        (text([*GOOD, "1,forward,990,0.2"]), "line 18 has 4 cells"),
        (without(8), "backward of stage 0 has no row at 1200 MHz"),
        (without(8, 4), "forward|backward of stage 0 has no row at 1200 MHz"),
        (without(6), "backward of stage 0 has no row at 1410 MHz"),
        (without(14, 15, 16, 17), "stage 1 has no rows for backward, which stage 0 has"),
        (text([row.replace("1,", "2,", 1) if row.startswith("1,") else row for row in GOOD]), "stage 1 has no rows"),
        (text([row for row in GOOD if ",1410," in row]), "one clock only"),
        (text([]), "no rows"),
        ("stage,instruction,frequency,time\n0,forward,1,1\n", "the first line is stage,instruction,frequency,time"),
    ],
)
def test_a_bad_profile_is_refused_with_its_row(content: str, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        profile.read(content)


def test_an_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "measured.csv"
    path.write_text(changed(4, "time", "nan"))
    with pytest.raises(RequestError, match=r"measured\.csv: line 4"):
        profile.read(path)
    with pytest.raises(RequestError, match=r"elsewhere\.csv: No such file"):
        profile.read(tmp_path / "elsewhere.csv")


def test_a_sweep_that_stopped_earlier_on_one_stage_can_be_planned_with() -> None:
    rows = profile.read(without(13, 17))
    assert min(row.mhz or 0 for row in rows if row.stage == 1) == 1200


def test_stages_on_other_gpus_have_other_clocks() -> None:
    other = [f"2,{kind},{mhz},{90 / mhz},{0.05 * mhz}" for kind in ("forward", "backward") for mhz in (1530, 1297, 1132)]
    assert len(profile.read(text([*GOOD, *other]))) == len(GOOD) + len(other)


def test_noise_is_accepted_filtered_and_told() -> None:
    rows = profile.read(changed(4, "time", "0.107"))  # 1200 MHz a little faster than 1305
    kept = profile.options(rows, 80.0)[0, "forward"]
    assert [option.mhz for option in kept] == [1410, 1200, 1095]
    assert profile.notes(rows, 80.0) == ("forward of stage 0: another clock is better in time and energy than 1305 MHz",)


def test_options_are_fastest_first_and_judged_by_what_waiting_would_take() -> None:
    # Slower by 0.1 s and dearer by 5 J; but 0.1 s of waiting takes 8 J.
    rows = [Row(0, "forward", 1400, 0.5, 100.0), Row(0, "forward", 1300, 0.6, 105.0), Row(0, "forward", 1200, 0.7, 115.0)]
    assert [o.mhz for o in profile.options(rows, 80.0)[0, "forward"]] == [1400, 1300]
    assert [o.mhz for o in profile.options(rows, 0.0)[0, "forward"]] == [1400]
    assert [o.mhz for o in profile.options(rows, 0.0).measured[0, "forward"]] == [1400, 1300, 1200]


def test_an_operation_of_constant_time_has_one_row_without_a_clock() -> None:
    rows = profile.read(text([*GOOD, "0,embedding,,0.01,2.5"]))
    assert rows[-1] == Row(0, "embedding", None, 0.01, 2.5)
    assert profile.options(rows, 80.0)[0, "embedding"][0].mhz is None
    assert profile.read(profile.write(rows)) == rows


def test_parallel_ranks_are_one_that_is_as_slow_as_the_slowest() -> None:
    first = [Row(0, "forward", 1400, 0.50, 100.0), Row(0, "forward", 1200, 0.60, 80.0)]
    second = [Row(0, "forward", 1400, 0.52, 90.0), Row(0, "forward", 1200, 0.58, 85.0)]
    other_stage = [Row(1, "forward", 1400, 0.7, 120.0)]
    assert profile.collapse({0: first, 1: second, 2: other_stage}) == (
        Row(0, "forward", 1400, 0.52, 190.0), Row(0, "forward", 1200, 0.60, 165.0), Row(1, "forward", 1400, 0.7, 120.0),
    )  # fmt: skip


def test_parallel_ranks_that_disagree_on_clocks_are_named() -> None:
    first = [Row(0, "forward", 1400, 0.5, 100.0), Row(0, "forward", 1200, 0.6, 80.0)]
    with pytest.raises(RequestError, match="rank 3 and rank 1 disagree on forward of stage 0: only one of them has 1200 MHz"):
        profile.collapse({1: first, 3: first[:1]})
