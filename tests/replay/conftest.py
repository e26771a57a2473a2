"""One small replay that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from powerd.sim.replay import scale, session, trace
from powerd.sim.replay.compare import Comparison
from powerd.sim.replay.trace import Trace


@pytest.fixture(scope="session")
def hour() -> Trace:
    """The published conversation hour."""
    return trace.read(session.shipped_hour())


@pytest.fixture(scope="session")
def small(hour: Trace) -> Comparison:
    """Ten minutes of it at three times the load, on the reference cluster."""
    part = hour.between(600, 1200)
    return session.prepare(scale.scaled(part, 3.0, 1), session.scenario(None))


@pytest.fixture
def part_csv(hour: Trace, tmp_path: Path) -> Path:
    """Three minutes of it as a file."""
    path = tmp_path / "part.csv.gz"
    trace.write(path, hour.between(600, 780))
    return path
