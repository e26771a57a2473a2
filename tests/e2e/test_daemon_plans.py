"""``POST /v1/perseus/plan`` with the real planner: the daemon plans for a job that has no solver, and time waits for it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from powerd.client import Client
from powerd.demo.stage import stage
from powerd.errors import RequestError
from powerd.resources import folder
from tests.e2e.daemon_rig import Rig

ROOT = Path(__file__).parents[2]


def job(microbatches: int = 6, **more: Any) -> dict[str, Any]:
    """A pipeline of four of the measured stages."""
    with (folder("profiles") / "stage_profile_gpt3-175b_a100_sxm.csv").open() as lines:
        table = [row for row in csv.DictReader(lines) if row["stage"] in "0123"]
    rows = [[int(r["stage"]), r["instruction"], int(r["frequency"]), float(r["time"]), float(r["energy"])] for r in table]
    shape = {"schedule": "1f1b", "stages": 4, "microbatches": microbatches, "blocking_power_w": 83.6}
    return {**shape, "profile_rows": rows, "deadline": "1.0x", **more}


def test_a_plan_comes_back_and_saves(node: Rig) -> None:
    plan = Client(node.socket).perseus_plan(job())
    assert len(plan["clocks"]) == 4 * 6 * 2
    assert plan["iteration_time_s"] <= plan["deadline_s"] * 1.0001
    assert plan["lower_bound_j"] <= plan["energy_j"] < 0.95 * plan["baseline"]["energy_j"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"deadline": 0.001}, "shortest possible"),
        ({"schedule": "2f2b"}, "2f2b"),
        ({"profile_rows": [[0, "forward", 1410, float("nan"), 1.0]]}, "line 1"),
        ({"profile_rows": [[0, "forward", 1410, 0.05]]}, "row 1"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_bad_jobs_are_the_callers_fault(node: Rig, change: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        Client(node.socket).perseus_plan(job(**change))


RANK = """
import json, sys
from powerd.client import Client, JobLog
from powerd.clock import NS, from_environment

client, clock = Client(timeout_s=60), from_environment()
waiter = clock.waiter("rank")
uuid = client.node().gpus[0].gpu.uuid
print("ready", flush=True)
with JobLog(client, "stepped", gpus=[uuid]) as log, client.lease([uuid], sm_clock_mhz=1200, ttl_s=5, reason="test") as lease:
    for step in range(8):
        begin = client.now_ns()
        waiter.wait_until(begin + NS)
        log.step(step, begin, client.now_ns(), energy_j=100.0)
    asked_ns = client.now_ns()
    plan = client.perseus_plan(json.loads(sys.stdin.read()))
    took_ns = client.now_ns() - asked_ns
    waiter.wait_until(client.now_ns() + 3 * NS)
    held = lease.held
view = client.job("stepped")
print(json.dumps({"took_ns": took_ns, "held": held, "steps": view.steps, "state": view.state, "time_s": view.time_s,
                  "dropped": log.dropped, "clocks": len(plan["clocks"])}), flush=True)
waiter.close()
"""


def test_stepped_time_waits_for_the_child_and_for_no_log(tmp_path: Path) -> None:
    with stage(1, "stepped") as here, (tmp_path / "log").open("w") as log:
        env = {**here.env, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        rank = subprocess.Popen([sys.executable, "-c", RANK], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                                text=True)  # fmt: skip
        try:
            assert rank.stdin is not None
            assert rank.stdout is not None
            rank.stdin.write(json.dumps(job(12)))
            rank.stdin.close()
            assert rank.stdout.readline() == "ready\n", (tmp_path / "log").read_text()
            here.go()
            answer = rank.stdout.readline()
            assert answer, (tmp_path / "log").read_text()
        finally:
            rank.kill()
            rank.wait()
    found = json.loads(answer)
    assert found["took_ns"] == 0, "the child's real seconds are nothing that happens on the simulated node"
    assert found["held"]
    assert found["clocks"] == 4 * 12 * 2
    assert (found["steps"], found["state"], found["time_s"], found["dropped"]) == (8, "ended", 1.0, 0)
