"""The example of docs/training.md runs as it is written, under torchrun and under srun's environment."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.e2e.live import free_port
from tests.torchenv import ROOT, source_path, torch_python

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.xdist_group("torch")]

EXAMPLE = ROOT / "integrations" / "examples" / "torch_pipeline.py"


def environment(tmp_path: Path) -> dict[str, str]:
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in foreign and not k.startswith("SLURM_")}
    none = {"POWERD_SOCKET": str(tmp_path / "none.sock"), "XDG_CACHE_HOME": str(tmp_path)}
    return {**kept, **none, "PYTHONPATH": source_path(), "OMP_NUM_THREADS": "1"}


def test_the_example_trains_under_torchrun(tmp_path: Path) -> None:
    argv = [str(torch_python()), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", str(EXAMPLE)]
    argv += ["--pipeline", "2", "--steps", "10"]
    done = subprocess.run(argv, env=environment(tmp_path), text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "step 10: loss" in done.stdout


def test_the_example_trains_with_what_srun_tells_its_tasks(tmp_path: Path) -> None:
    job = str(free_port() % 20000)  # the port is made from it
    base = {**environment(tmp_path), "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": job}
    tasks = [
        subprocess.Popen(
            [str(torch_python()), str(EXAMPLE), "--pipeline", "2", "--steps", "10"],
            env={**base, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [task.communicate(timeout=150) for task in tasks]
    finally:
        for task in tasks:
            if task.poll() is None:
                task.kill()
                task.wait()
    assert [task.returncode for task in tasks] == [0, 0], said
    assert "step 10: loss" in said[1][0]
