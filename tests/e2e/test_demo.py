"""The demonstration, short: everything real but the driver."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SHORT = ["--gpus", "2", "--step", "12", "--scale", "5"]  # a slower node is less sensitive to a busy machine


def left_running(marker: str) -> list[str]:
    """Processes whose environment names this test's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and entry.name != str(os.getpid()) and marker.encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "DEMO_TEST_MARKER": str(tmp_path)}


def test_the_main_job_measures_chooses_and_is_restored(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "powerd.demo", "--out", str(out), *SHORT],
        env=environment(tmp_path), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((out / "result.json").read_text())
    assert result["simulated"] is True
    assert result["restored"] is True
    clocks = [row["clock_mhz"] for row in result["rows"]]
    assert clocks == [1410, 1230, 1050, 870]
    errors = result["error_percent"]["all"]
    assert errors["rows"] == 2 * len(clocks)
    assert errors["time_max"] < 3
    assert errors["energy_mean"] < 3
    savings = [choice["saving"] for choice in result["choices"]]
    assert savings == sorted(savings)
    assert savings[-1] > 0.1
    for choice in result["choices"]:
        assert choice["slowdown"] <= choice["slowdown_allowed"] + 1e-9
    rows = list(csv.DictReader((out / "energy_time.csv").open()))
    assert len(rows) == 2 * len(clocks)
    assert list(rows[0]) == ["stage", "instruction", "frequency", "time", "energy"]
    assert (out / "energy_time.png").stat().st_size > 10_000
    assert "<svg" in (out / "energy_time.svg").read_text()
    assert "ms after SIGKILL" in done.stdout
    assert re.search(r"^0 +NVIDIA A100", done.stdout, re.MULTILINE), "powerctl status is shown"
    numbers = [line for line in done.stdout.splitlines() if re.search(r"\d (W|J|%|MHz)", line) and "MHz  " not in line]
    assert "simulated" in done.stdout.splitlines()[0]
    assert numbers
    assert left_running(str(tmp_path)) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_at_any_time_it_leaves_nothing_running(tmp_path: Path, number: signal.Signals) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "powerd.demo", "--out", str(tmp_path / "out"), *SHORT, "--seconds", "300"],
        env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    for line in child.stdout:
        if "control is on" in line:
            break
    child.send_signal(number)
    child.stdout.read()  # ends when the last process that could write to it has ended
    assert child.wait(30) == (130 if number is not signal.SIGKILL else -9)
    for _ in range(200):
        if not left_running(str(tmp_path)):
            return
        signal.sigtimedwait([], 0.1)
    assert left_running(str(tmp_path)) == []
