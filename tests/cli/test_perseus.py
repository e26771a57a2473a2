"""powerctl perseus: plan, show, report; no daemon needed."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from powerd.errors import EXIT_USAGE
from powerd_policies.perseus import document, profile

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CLOCKS = (1410, 1305, 1200, 1095, 990)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """Two unequal stages of which the second has a loss of constant time."""
    rows = [
        {"stage": s, "instruction": kind, "frequency": mhz, "time": round(work * (0.1 + 0.9 * 1410 / mhz), 6),
         "energy": round(work * (0.1 + 0.9 * 1410 / mhz) * (90 + 310 * (mhz / 1410) ** 2.5), 4)}
        for s, size in ((0, 1.0), (1, 1.4))
        for kind, work in (("forward", 0.05 * size), ("backward", 0.1 * size))
        for mhz in CLOCKS
    ]  # fmt: skip
    (tmp_path / "profile.csv").write_text(profile.write(document.rows_of(rows)))
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"schedule": "1f1b", "stages": 2, "microbatches": 3, "profile": "profile.csv",
                                "blocking_power_w": 83.6, "data_parallel": 2}))  # fmt: skip
    return path


def rounded(value: Any) -> Any:
    """Seven digits: another version of a solver may add up in another order."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def test_the_file_of_a_plan_stays_as_it_is(job: Path, powerctl: Callable[..., Any]) -> None:
    out = job.parent / "out.json"
    answer = powerctl("perseus", "plan", str(job), "--deadline", "1.05x", "-o", str(out))
    assert answer.code == 0, answer.err
    text = json.dumps(rounded(json.loads(out.read_text())), indent=1) + "\n"
    file = GOLDEN / "perseus_plan.json"
    if os.environ.get("POWERD_WRITE_GOLDEN"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8"), f"POWERD_WRITE_GOLDEN=1 pytest {__file__} writes it anew"


def test_json_is_what_the_file_holds(job: Path, powerctl: Callable[..., Any]) -> None:
    out = job.parent / "out.json"
    answer = powerctl("perseus", "plan", str(job), "--json", "-o", str(out))
    assert json.loads(answer.out) == json.loads(out.read_text())
    made = json.loads(answer.out)
    assert made["deadline_s"] == made["baseline"]["iteration_time_s"], "the default is no slowdown"


def test_a_person_sees_time_energy_saving_and_bound(job: Path, powerctl: Callable[..., Any]) -> None:
    answer = powerctl("perseus", "plan", str(job), "--deadline", "1.1x")
    assert "12 computations on 2 pipeline ranks x 2 GPUs" in answer.out
    assert re.search(r"plan +\d\S* s \(\+\d+\.\d+%\) +\d\S* J +\d+\.\d+%", answer.out), answer.out
    assert "lower bound" in answer.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--deadline", "0.5x"], "shortest possible"),
        (["--deadline", "soon"], "not understood"),
        (["-o", "/nowhere/out.json"], "cannot write"),
    ],
)
def test_a_wrong_command_line_is_one_line(job: Path, powerctl: Callable[..., Any], words: list[str], told: str) -> None:
    answer = powerctl("perseus", "plan", str(job), *words)
    assert answer.code == EXIT_USAGE
    assert answer.out == ""
    assert told in answer.err
    assert answer.err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "column", "value", "told"),
    [(4, 3, "nan", "line 4: time is nan"), (7, 4, "0", "line 7: energy is 0"), (3, 2, "", "without a clock"),
     (5, 3, "0.001", "line 5: forward of stage 0 at 1095 MHz takes 0.001 s")],
)  # fmt: skip
def test_a_bad_profile_is_told_with_file_and_row(
    job: Path, powerctl: Callable[..., Any], line: int, column: int, value: str, told: str
) -> None:
    path = job.parent / "profile.csv"
    lines = path.read_text().splitlines()
    cells = lines[line - 1].split(",")
    cells[column] = value
    lines[line - 1] = ",".join(cells)
    path.write_text("\n".join(lines) + "\n")
    answer = powerctl("perseus", "plan", str(job))
    assert answer.code == EXIT_USAGE
    assert told in answer.err
    assert "profile.csv" in answer.err


def test_a_recorded_order_that_cannot_run_is_told_with_rank(job: Path, powerctl: Callable[..., Any]) -> None:
    content = json.loads(job.read_text())
    content["microbatches"] = 1
    content["order"] = [[[0, "backward", 0], [0, "forward", 0]], [[1, "forward", 0], [1, "backward", 0]]]
    job.write_text(json.dumps(content))
    answer = powerctl("perseus", "plan", str(job))
    assert answer.code == EXIT_USAGE
    assert "rank 0 waits at backward of microbatch 0 on stage 0" in answer.err


def test_what_was_filtered_is_told(job: Path, powerctl: Callable[..., Any]) -> None:
    path = job.parent / "profile.csv"
    lines = path.read_text().splitlines()
    cells = lines[2].split(",")
    assert cells[2] == "1305"
    cells[4] = str(float(cells[4]) * 1.2)
    lines[2] = ",".join(cells)
    path.write_text("\n".join(lines) + "\n")
    assert "20 profile rows are of use" in powerctl("perseus", "plan", str(job)).err
    assert (
        "forward of stage 0: another clock is better in time and energy than 1305"
        in powerctl("perseus", "plan", str(job), "-v").err
    )


def test_the_timeline_shows_before_and_after(job: Path, powerctl: Callable[..., Any]) -> None:
    out = job.parent / "out.json"
    powerctl("perseus", "plan", str(job), "--deadline", "1.1x", "-o", str(out))
    answer = powerctl("perseus", "show", str(out), "--width", "80")
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert lines[0].startswith("highest clocks:")
    assert lines[3].startswith("planned:")
    for before, after in ((lines[1], lines[4]), (lines[2], lines[5])):
        assert re.fullmatch(r"rank +\d [FB·]+ \d+-1410 MHz", before)
        assert set("FB·") >= set(after.split()[2])
    assert "1410-1410 MHz" in lines[1]
    assert "1410-1410 MHz" not in lines[4]


def test_a_plan_without_our_extras_is_drawn_too(job: Path, powerctl: Callable[..., Any]) -> None:
    out = job.parent / "out.json"
    made = json.loads(powerctl("perseus", "plan", str(job), "--json").out)
    del made["job"], made["baseline"]["clocks"]
    out.write_text(json.dumps(made))
    answer = powerctl("perseus", "show", str(out))
    assert answer.code == 0, answer.err
    assert answer.out.splitlines()[0].startswith("planned:")


def test_what_is_no_plan_is_refused(job: Path, powerctl: Callable[..., Any]) -> None:
    answer = powerctl("perseus", "show", str(job))
    assert answer.code == EXIT_USAGE
    assert "is no plan" in answer.err


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_pictures_are_drawn(job: Path, powerctl: Callable[..., Any], kind: str) -> None:
    pytest.importorskip("matplotlib")
    out, picture, curve = (job.parent / name for name in ("out.json", f"timeline.{kind}", f"frontier.{kind}"))
    powerctl("perseus", "plan", str(job), "-o", str(out))
    assert powerctl("perseus", "show", str(out), "-o", str(picture)).code == 0
    assert powerctl("perseus", "report", str(job), "--frontier", "4", "-o", str(curve)).code == 0
    start = {"svg": b"<?xml", "png": b"\x89PNG"}[kind]
    for path in (picture, curve):
        assert path.read_bytes().startswith(start)
    if kind == "svg":
        assert "highest clocks" in picture.read_text()
        assert "lower bound" in curve.read_text()


def test_a_picture_of_no_kind_is_refused_before_anything_is_planned(job: Path, powerctl: Callable[..., Any]) -> None:
    answer = powerctl("perseus", "report", str(job), "-o", "frontier.txt")
    assert answer.code == EXIT_USAGE
    assert "a picture ends in" in answer.err


def test_the_frontier_falls_and_is_kept(job: Path, powerctl: Callable[..., Any]) -> None:
    cache = job.parent / "frontier.json"
    words = ("perseus", "report", str(job), "--frontier", "8", "--cache", str(cache), "--json")
    first = powerctl(*words)
    assert first.code == 0, first.err
    report = json.loads(first.out)
    energies = [row["energy_j"] - 83.6 * 4 * row["deadline_s"] for row in report["points"]]  # without waiting, four GPUs
    times = [row["deadline_s"] for row in report["points"]]
    assert times == sorted(times)
    assert energies == sorted(energies, reverse=True)
    assert all(row["lower_bound_j"] <= row["energy_j"] * (1 + 1e-9) for row in report["points"])
    second = powerctl(*words)
    assert "took the frontier from" in second.err
    assert rounded(json.loads(second.out)) == rounded(report)


def test_a_cache_of_another_job_is_not_taken(job: Path, powerctl: Callable[..., Any]) -> None:
    cache = job.parent / "frontier.json"
    words = ("perseus", "report", str(job), "--frontier", "4", "--cache", str(cache), "--json")
    powerctl(*words)
    content = json.loads(job.read_text())
    job.write_text(json.dumps({**content, "microbatches": 4}))
    again = powerctl(*words)
    assert again.code == 0, again.err
    assert "is of no use" in again.err


def test_nobody_else_saves_more_within_the_same_time(job: Path, powerctl: Callable[..., Any]) -> None:
    report = json.loads(powerctl("perseus", "report", str(job), "--frontier", "4", "--json").out)
    for allowed in (0.0, 0.05, 0.1):
        rows = {row["name"]: row for row in report["beside"] if row["allowed"] == allowed}
        assert {"global power limit", "per-stage power limit", "EnvPipe", "Perseus"} <= set(rows)
        assert rows["Perseus"]["saving"] >= max(row["saving"] for row in rows.values()) - 1e-9
        assert all(row["slowdown"] <= allowed + 1e-9 for row in rows.values())
    for row in report["straggling"]:
        assert row["savings"]["Perseus"] >= max(row["savings"].values()) - 1e-9


def test_a_plan_may_carry_its_frontier(job: Path, powerctl: Callable[..., Any]) -> None:
    out = job.parent / "out.json"
    answer = powerctl("perseus", "plan", str(job), "--frontier", "5", "-o", str(out))
    assert "frontier" in answer.out
    assert 2 <= len(json.loads(out.read_text())["frontier"]) <= 5


def test_without_the_libraries_of_a_planner_it_says_what_to_install(
    job: Path, powerctl: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    for words in (("plan", str(job)), ("show", str(job)), ("report", str(job))):
        answer = powerctl("perseus", *words)
        assert answer.code == EXIT_USAGE
        assert "pip install 'powerd[plan]'" in answer.err
