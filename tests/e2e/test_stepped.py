"""The whole daemon in stepped time: powerd and powerd-hw as processes of their own, a client's and a job's threads, one clock."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from powerd.demo.stage import stage

BEGIN_NS = 60_000_000_000


@dataclass(frozen=True)
class Scored:
    """One window's answer beside the truth."""

    gpu: int
    seconds: float
    true_j: float
    energy_j: float
    low_j: float
    high_j: float

    @property
    def error(self) -> float:
        return self.energy_j / self.true_j - 1


def run(module: str, gpus: int, log: Path, *arguments: object) -> Any:
    """What a client's process says that begins once everybody has joined the clock."""
    with stage(gpus, "stepped") as here, log.open("w") as errors:
        command = [sys.executable, "-m", f"tests.e2e.{module}", *map(str, arguments), str(here.made_ns + BEGIN_NS)]
        root = Path(__file__).parents[2]
        env = {**here.env, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
        child = subprocess.Popen(command, env=env, cwd=root, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n", log.read_text()
            here.go()
            answer = child.stdout.readline()
            assert answer, log.read_text()
            assert child.wait(60) == 0, log.read_text()
        finally:
            child.kill()
            child.wait()
    return json.loads(answer)


def campaign(windows: int, seed: int, log: Path) -> list[Scored]:
    """Every window scored."""
    return [Scored(*row) for row in run("stepped_windows", 8, log, windows, seed)]


def judge(scored: list[Scored], windows: int) -> None:
    assert len(scored) == windows
    assert {s.gpu for s in scored} == set(range(8))
    assert min(s.seconds for s in scored) < 4
    assert max(s.seconds for s in scored) > 28
    powers = [s.true_j / s.seconds for s in scored]
    assert max(powers) > 2 * min(powers), "the load varies, so that edges matter"
    covered = sum(s.low_j <= s.true_j <= s.high_j for s in scored) / len(scored)
    long = [s for s in scored if s.seconds >= 10]
    mean_error = statistics.fmean(abs(s.error) for s in long)
    width = statistics.median((s.high_j - s.low_j) / 2 / s.true_j for s in long)
    print(f"{windows} windows: covered {covered:.2%}, mean |error| from 10 s {mean_error:.3%}, median half width {width:.3%}")
    assert covered >= 0.95
    assert mean_error <= 0.01
    assert width <= 0.015, "an interval that covers everything tells nothing"


def test_a_thousand_windows_through_the_api_cover_the_truth(tmp_path: Path) -> None:
    judge(campaign(1000, 8, tmp_path / "log"), 1000)


def test_one_seed_gives_one_answer(tmp_path: Path) -> None:
    first, again = (campaign(100, 7, tmp_path / name) for name in ("first.log", "again.log"))
    other = campaign(100, 9, tmp_path / "other.log")
    # The physics is advanced whenever somebody looks: how often anybody did moves its sums in the ninth digit.
    assert [replace(s, true_j=0.0) for s in again] == [replace(s, true_j=0.0) for s in first]
    assert [s.true_j for s in again] == pytest.approx([s.true_j for s in first], rel=1e-7)
    assert [s.seconds for s in other] != [s.seconds for s in first]


def test_the_clocks_of_a_plan_change_at_the_very_instants_of_its_beats(tmp_path: Path) -> None:
    found = run("stepped_beats", 4, tmp_path / "log")
    assert len(found) == 4
    for rows in found.values():
        assert len(rows) == 25 * 4 + 4
        assert {at for at, _, _ in rows if not isinstance(at, str)} == {1}, "simulated nanoseconds after the beat"
        assert [row for row in rows if row[1] != row[2]] == []
