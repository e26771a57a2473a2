"""powerctl in this process, against a fake daemon."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "client"))

from powerd.cli.main import _run
from tests.client.fake_daemon import FakeDaemon


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


Powerctl = Callable[..., Answer]


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "LOCAL_RANK", "POWERD_SIM_STATE", "SLURM_JOB_GPUS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("COLUMNS", "160")
    folder = Path(tempfile.mkdtemp(prefix="pd-"))
    made = FakeDaemon(folder)
    monkeypatch.setenv("POWERD_SOCKET", str(made.socket))
    yield made
    made.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def powerctl(capfd: pytest.CaptureFixture[str]) -> Powerctl:
    def call(*words: str) -> Answer:
        capfd.readouterr()
        code = _run(list(words))
        out, err = capfd.readouterr()
        return Answer(code, out, err)

    return call
