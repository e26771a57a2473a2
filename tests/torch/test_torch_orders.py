"""Our orders of torch's schedules are torch's, at many numbers of ranks and microbatches."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.torchenv import source_path, torch_python

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.xdist_group("torch")]


def test_orders_are_those_of_torch() -> None:
    job = Path(__file__).parent / "jobs" / "orders_job.py"
    env = {**os.environ, "PYTHONPATH": source_path()}
    done = subprocess.run([str(torch_python()), str(job)], env=env, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["different"] == [], done.stderr[-2000:]
    assert said["compared"] > 100
