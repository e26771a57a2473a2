"""A long outage costs disk up to its bound and no memory, and afterwards everything that was kept arrives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sinks.outage import GPUS
from tests.sinks.scripted import Reply, ScriptedServer

GROWTH_MIB_PER_DAY = 20


def through(folder: Path, hours: float, spool_mib: int) -> tuple[dict[str, float], dict[str, float], set[str]]:
    """What was told at the outage's end and after it, and the points that arrived."""
    server = ScriptedServer()
    server.reply = lambda lines: Reply(503)
    server.keep_requests = False
    argv = [sys.executable, "-m", "tests.sinks.outage", server.url, str(folder), str(hours), str(spool_mib)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        during = json.loads(process.stdout.readline())
        server.reply = lambda lines: Reply()
        after = json.loads(process.stdout.readline())
        assert process.wait(60) == 0
        return during, after, set(server.points())
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        server.close()


@pytest.mark.parametrize("hours", [2, pytest.param(24, marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
def test_memory_stays_flat_and_nothing_is_lost(hours: int, tmp_path: Path) -> None:
    during, after, arrived = through(tmp_path, hours, 512)
    assert during["errors"] >= 5, "it did not try"
    assert during["points"] == hours * 3600 * GPUS
    assert during["dropped"] == 0
    assert during["lag_s"] == hours * 3600 - 1
    assert during["grown_mib"] < GROWTH_MIB_PER_DAY * during["span_h"] / 24, during
    assert after["lines"] == hours * 3600 * GPUS
    assert len(arrived) == hours * 3600 * GPUS


def test_an_outage_that_outlasts_the_bound_keeps_the_newest_and_counts_the_rest(tmp_path: Path) -> None:
    during, after, arrived = through(tmp_path, 2, 1)
    assert during["peak_spool"] <= 1 << 20
    assert during["file"] <= 3 << 20
    assert during["dropped"] > 0
    assert during["points"] + during["dropped"] == 2 * 3600 * GPUS
    assert after["lines"] == during["points"] == len(arrived)
    newest = max(int(text.rpartition(" ")[2]) for text in arrived)
    assert newest == 1_790_000_000_000 + (2 * 3600 - 1) * 1000
