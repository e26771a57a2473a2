"""JOB.json and OUT.json: what is accepted, what is refused by name, and that the numbers add up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from powerd.errors import RequestError
from powerd_policies.perseus import baselines, document, profile, schedules, solve

ROWS: list[dict[str, Any]] = [
    {
        "stage": s,
        "instruction": kind,
        "frequency": mhz,
        "time": work * 1400 / mhz,
        "energy": work * (60 + 400 * (mhz / 1400) ** 3),
    }
    for s, size in ((0, 1.0), (1, 1.3))
    for kind, work in (("forward", 0.1 * size), ("backward", 0.2 * size))
    for mhz in (1400, 1200, 1000)
]
JOB: dict[str, Any] = {"schedule": "1f1b", "stages": 2, "microbatches": 3, "blocking_power_w": 80.0}


def request(**changes: Any) -> dict[str, Any]:
    return {"job": JOB, "profile_rows": ROWS, "deadline": "1.05x", **changes}


def test_the_issues_job_is_read() -> None:
    job = document.parse({"schedule": "1f1b", "stages": 8, "microbatches": 12, "profile": "profile.csv", "blocking_power_w": 83.6,
                          "data_parallel": 1, "tensor_parallel": 1})  # fmt: skip
    assert (job.schedule, job.stages, job.microbatches, job.profile, job.gpus_per_stage) == ("1f1b", 8, 12, "profile.csv", 1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"microbatch": 4}, "'microbatch' is not known; did you mean 'microbatches'"),
        ({"stages": 0}, "stages is 0"),
        ({"stages": "8"}, 'stages is "8", not a whole number'),
        ({"stages": True}, "stages is true"),
        ({"microbatches": 2.5}, "microbatches is 2.5"),
        ({"blocking_power_w": -1}, "blocking_power_w is -1"),
        ({"blocking_power_w": float("nan")}, "blocking_power_w is NaN"),
        ({"schedule": "1F1B"}, "'1F1B' is not known, '1f1b' is"),
        ({"recompute": 1}, "recompute is 1, not true or false"),
        ({"data_parallel": 0}, "data_parallel is 0"),
        ({"switching": {"latency": 0.005}}, "did you mean 'latency_s'"),
        ({"switching": {"latency_s": -1}}, "switching.latency_s is -1"),
        ({"switching": {"serialised": 1}}, "switching.serialised is 1, not true or false"),
        ({"order": []}, "order is a list of ranks"),
        ({"order": [[[0, "forward"]]]}, "order of rank 0, instruction 0"),
    ],
)
def test_a_wrong_job_is_refused_by_key(change: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        document.parse({**JOB, **change})


@pytest.mark.parametrize("key", ["schedule", "stages", "microbatches", "blocking_power_w"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(RequestError, match=f"{key} is missing"):
        document.parse({name: value for name, value in JOB.items() if name != key})


def test_a_recorded_order_stands_for_its_schedule() -> None:
    order = [[[s.stage, str(s.kind), s.microbatch] for s in steps] for steps in schedules.order("1f1b", 2, 3)]
    recorded = document.parse({"order": order, "blocking_power_w": 80.0})
    assert recorded.ranks_order() == tuple(tuple(steps) for steps in document.parse(JOB).ranks_order())
    assert document.parse(recorded.to_json()) == recorded
    with pytest.raises(RequestError, match="stages is 3, but the recorded order has 2 ranks"):
        document.parse({"order": order, "blocking_power_w": 80.0, "stages": 3})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1.0x", 10.0), ("1.05x", 10.5), ("1.05 X", 10.5), ("12.5", 12.5), ("12s", 12.0), (11, 11.0), ("fastest", 9.0)],
)
def test_a_deadline_as_people_write_it(text: str | float, seconds: float) -> None:
    assert document.deadline_s(text, 10.0, 9.0) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["soon", "x", "", "-1", "0x", "1.0.0x", "nan", "inf", "0.8x", "8.99"])
def test_a_deadline_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(RequestError):
        document.deadline_s(text, 10.0, 9.0)


def test_the_shortest_possible_time_is_told() -> None:
    with pytest.raises(RequestError, match=r"8 s is below 9 s, the shortest possible.*at least 0\.9x"):
        document.deadline_s("0.8x", 10.0, 9.0)


def test_the_numbers_of_a_plan_add_up() -> None:
    out = solve.answer(request(job={**JOB, "data_parallel": 2, "tensor_parallel": 4}))
    base = out["baseline"]
    assert out["deadline_s"] == pytest.approx(1.05 * base["iteration_time_s"])
    assert out["iteration_time_s"] <= out["deadline_s"] * (1 + 1e-9)
    clocks = out["clocks"]
    assert len(clocks) == 2 * 2 * 3
    assert set(clocks[0]) == {"stage", "instruction", "microbatch", "mhz", "time_s", "energy_j", "start_s"}
    busy_s = sum(row["time_s"] for row in clocks)
    waiting_j = 80.0 * (2 * out["deadline_s"] - busy_s) * 8
    assert out["energy_j"] == pytest.approx(sum(row["energy_j"] for row in clocks) + waiting_j)
    assert max(row["start_s"] + row["time_s"] for row in clocks) == pytest.approx(out["iteration_time_s"])
    assert out["lower_bound_j"] <= out["energy_j"] * (1 + 1e-9)
    assert out["energy_j"] < base["energy_j"]
    rows = {(r["stage"], r["instruction"], r["frequency"]): r for r in ROWS}
    for row in clocks:
        source = rows[row["stage"], row["instruction"], row["mhz"]]
        assert (row["time_s"], row["energy_j"]) == (source["time"], pytest.approx(source["energy"] * 8))
    assert base["energy_j"] == pytest.approx(
        8 * sum(r["energy"] * 3 for r in ROWS if r["frequency"] == 1400)
        + 8 * 80.0 * (2 * base["iteration_time_s"] - sum(r["time"] * 3 for r in ROWS if r["frequency"] == 1400))
    )


def test_a_plan_that_knows_what_changes_cost_keeps_its_deadline_with_them() -> None:
    slow = {"latency_s": 0.02, "min_dwell_s": 0.0, "serialised": True, "ranks_per_node": 2}
    out = solve.answer(request(job={**JOB, "switching": slow}, deadline="1.1x"))
    assert out["switching"]["iteration_time_s"] <= out["deadline_s"] * (1 + 1e-9)
    assert out["switching"]["switches"] >= 0
    assert out["job"]["switching"] == slow
    assert "switching" not in solve.answer(request())


def test_the_baseline_is_one_whatever_the_deadline() -> None:
    assert solve.answer(request(deadline="fastest"))["baseline"] == solve.answer(request(deadline="1.3x"))["baseline"]


def test_rows_may_be_lists_and_a_running_jobs_profile_may_have_holes() -> None:
    lists = [[row[column] for column in profile.COLUMNS] for row in ROWS]
    assert solve.answer(request(profile_rows=lists)) == solve.answer(request())
    del lists[1]  # one clock of one stage
    assert solve.answer(request(profile_rows=lists))["clocks"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([], "a request is a JSON object"),
        (request(profiles=[]), "did you mean 'profile_rows'"),
        ({"job": JOB}, "profile_rows is missing"),
        (request(profile_rows=[{**ROWS[0], "time": "NaN"}]), "row 1|line 1"),
        (request(profile_rows=[[0, "forward", 1400, 0.1]]), "row 1 has 4 values"),
        (request(profile_rows=[{**row, "stage": 5} if row is ROWS[-1] else row for row in ROWS]), "stage 5"),
        (request(profile_rows=[row for row in ROWS if row["stage"] == 0]), "no rows for forward of stage 1"),
        (request(deadline=[1]), "deadline is"),
        (request(deadline="0.5x"), "shortest possible"),
    ],
)
def test_the_childs_answer_to_bad_input_is_exit_code_2_and_says_why(content: Any, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        solve.answer(content)


def child(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "powerd_policies.perseus"], input=text, capture_output=True, text=True, timeout=60
    )


def test_the_child_prints_the_plan_and_nothing_else() -> None:
    done = child(json.dumps(request()))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(json.dumps(solve.answer(request())))


@pytest.mark.parametrize("text", ["{", json.dumps(request(deadline="0.5x"))])
def test_the_child_says_what_is_wrong(text: str) -> None:
    done = child(text)
    assert done.returncode == 2
    assert set(json.loads(done.stdout)) == {"error"}
    assert done.stderr == ""


def test_a_job_file_finds_its_profile_beside_itself(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(profile.write(document.rows_of(ROWS)))
    (tmp_path / "job.json").write_text(json.dumps({**JOB, "profile": "p.csv"}))
    job, rows = document.load(tmp_path / "job.json")
    assert baselines.max_clock(job.problem(rows)).iteration_time_s > 0
    (tmp_path / "job.json").write_text(json.dumps(JOB))
    with pytest.raises(RequestError, match="profile is missing"):
        document.load(tmp_path / "job.json")
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(RequestError, match="is not JSON"):
        document.load(tmp_path / "job.json")


def test_what_a_solver_prints_is_no_part_of_the_answer() -> None:
    talks = "import os; from powerd_policies.perseus.quiet import stdout_to_stderr\n"
    talks += "with stdout_to_stderr():\n    os.write(1, b'solver\\n'); print('python')\nprint('answer')"
    done = subprocess.run([sys.executable, "-c", talks], capture_output=True, text=True, timeout=60)
    assert done.stdout == "answer\n"
    assert done.stderr == "solver\npython\n"
