"""A fake daemon on a short path."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client.fake_daemon import FakeDaemon


@pytest.fixture
def run_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="pd-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def daemon(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "LOCAL_RANK", "POWERD_SIM_STATE", "SLURM_JOB_GPUS"):
        monkeypatch.delenv(name, raising=False)
    made = FakeDaemon(run_folder)
    monkeypatch.setenv("POWERD_SOCKET", str(made.socket))
    yield made
    made.close()
