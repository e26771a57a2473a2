"""The unit files as systemd reads them: without a word of complaint, and well fenced in."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from powerd.cli import service

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("systemd")]

SERVICES = ("powerd.service", "powerd-hw.service")
# systemd-analyze calls up to 2.5 "OK"; it counts in tenths.
EXPOSURE_AT_MOST = 2.5


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, rendered for an interpreter that exists on this machine."""
    if shutil.which("systemd-analyze") is None:
        reason = "systemd-analyze missing: apt-get install systemd"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    for unit in service.UNITS:
        (tmp_path / unit).write_text(service.render(unit, "/usr/bin/env"), encoding="utf-8")
    return tmp_path


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


def test_verify_is_silent(units: Path) -> None:
    done = analyze("verify", *(units / unit for unit in service.UNITS))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_verify_would_complain(units: Path) -> None:
    unit = units / "powerd.service"
    unit.write_text(unit.read_text().replace("WatchdogSec=", "WatchdgSec="))
    assert "WatchdgSec" in analyze("verify", *(units / unit for unit in service.UNITS)).stderr


@pytest.mark.parametrize("unit", SERVICES)
def test_exposure_is_low(units: Path, unit: str) -> None:
    done = analyze("security", "--offline=true", f"--threshold={EXPOSURE_AT_MOST * 10:.0f}", "--no-pager", units / unit)
    assert done.returncode == 0, done.stdout
    report = analyze("security", "--offline=true", "--json=short", units / unit)
    assert json.loads(report.stdout), "the report is empty"
