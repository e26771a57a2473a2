"""The external scaler over real gRPC, asked by stubs that protoc makes from our .proto; in the fourth environment."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from powerd_integrations.fleet.published import Group, PublishedPlan, Serving, write_plan
from tests.e2e.live import free_port
from tests.rayenv import ROOT, ray_python, source_path

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]

PROTO = ROOT / "integrations" / "powerd_integrations" / "keda" / "externalscaler.proto"
LL8, LL4 = Group("LL", 8), Group("LL", 4)


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What a client of KEDA's contract hears from a scaler that runs as users run it."""
    folder = tmp_path_factory.mktemp("keda")
    plan = folder / "plan.json"
    serving = tuple(Serving(f"i{n}", LL8) for n in range(11))
    write_plan(PublishedPlan(1, time.time(), time.time(), desired={LL8: 12, LL4: 0}, serving=serving), plan)
    address = f"127.0.0.1:{free_port()}"
    env = {**os.environ, "PYTHONPATH": source_path()}
    argv = [str(ray_python()), "-m", "powerd_integrations.keda", "--plan", str(plan), "--listen", address]
    scaler = subprocess.Popen(argv, env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        assert scaler.stdout is not None
        assert "powerd-keda: on port" in scaler.stdout.readline()
        job = [
            str(ray_python()),
            str(Path(__file__).parent / "jobs" / "keda_job.py"),
            str(PROTO),
            str(folder),
            address,
            str(plan),
        ]
        done = subprocess.run(job, env=env, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr[-4000:]
        yield json.loads(done.stdout)
    finally:
        scaler.terminate()
        assert scaler.wait(20) == 0, "it ends cleanly"


def test_the_table_says_what_the_proto_file_says(heard: dict[str, Any]) -> None:
    assert heard["same"] is True


def test_the_metric_is_the_desired_replicas_and_its_target_is_one(heard: dict[str, Any]) -> None:
    assert heard["eleven"] == 12.0
    assert heard["spec"] == ["powerd-desired-replicas", 1, 1.0]
    assert heard["streamed_spec"] == 1.0


def test_growth_clears_the_tolerance_where_the_trigger_says_so(heard: dict[str, Any]) -> None:
    assert heard["cleared"] == 13.0


def test_a_group_is_active_while_any_replica_is_wanted_and_changes_are_pushed(heard: dict[str, Any]) -> None:
    assert heard["active"] == [True, False]
    assert heard["pushed"] == [False, True]


def test_what_is_wrong_is_said(heard: dict[str, Any]) -> None:
    no_pool, no_tp, unknown = heard["refused"]
    assert no_pool == "INVALID_ARGUMENT: metadata.pool is missing: the pool of this deployment"
    assert no_tp.startswith("INVALID_ARGUMENT: metadata.tp is the tensor parallelism")
    assert unknown == "UNAVAILABLE: the plan does not know XX-tp8"
