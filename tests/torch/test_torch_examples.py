"""The example of docs/training.md runs as it is written, under torchrun and under a real srun."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.real.slurm import Slurm
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


def test_the_example_trains_under_a_real_srun(tmp_path: Path) -> None:
    words = ["srun", "--kill-on-bad-exit=1", "--ntasks=2", str(torch_python()), str(EXAMPLE), "--pipeline", "2", "--steps", "10"]
    with Slurm(tmp_path / "slurm") as slurm:
        done = slurm.run(*words, env=environment(tmp_path), timeout_s=200)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "step 10: loss" in done.stdout
