"""`powerctl dynamollm profile` measures a running engine through powerd, goes on where it was, and tells what it cannot."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from powerd.demo.stage import Stage, stage
from powerd.sim import enginemodels
from powerd_policies.dynamollm import profile_file

POWERCTL = [sys.executable, "-m", "powerd.cli.main"]
SHORT = ["--gpus", "0,1", "--classes", "SS", "--clocks", "1980,1080", "--seconds", "24", "--warmup", "4"]
MODEL = enginemodels.load("llama2-70b_h100")


@pytest.fixture(scope="module")
def here() -> Iterator[Stage]:
    with stage(2, "x10", latency=0.0, fit_on=None, model="h100-sxm") as made:
        yield made


@pytest.fixture(scope="module")
def endpoint(here: Stage) -> str:
    words = ("sim", "engine", "--gpus", "0,1", "--tp", "2", "--served-model-name", "llama")
    return str(here.start("engine", "-m", "powerd.main", *words).next(60)["url"])


def profile(here: Stage, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*POWERCTL, "dynamollm", "profile", *words], env=here.env, capture_output=True, text=True, timeout=120)


def test_it_measures_clocks_and_loads_and_goes_on_where_it_was(here: Stage, endpoint: str, tmp_path: Path) -> None:
    out = tmp_path / "profile.csv"
    words = ["--endpoint", endpoint, *SHORT, "--ttft", "5", "--tbt", "1", "-o", str(out)]
    done = profile(here, *words, "--rates", "1")
    assert done.returncode == 0, done.stderr
    first = out.read_text()
    done = profile(here, *words, "--rates", "1,3")
    assert done.returncode == 0, done.stderr
    assert "2 of 4 cells" in done.stderr
    assert out.read_text().startswith(first), "what was measured stays as it is"
    points = {(p.clock_mhz, p.requests_per_s): p for p in profile_file.load(out).points}
    assert set(points) == {(1980, 1.0), (1080, 1.0), (1980, 3.0), (1080, 3.0)}
    for (clock_mhz, _), point in points.items():
        assert (point.request_class, point.tp, point.feasible, point.source) == ("SS", 2, True, "modelled")
        alone = MODEL.table[2, clock_mhz]
        assert alone.iteration_s(0, 1) * 0.8 < point.tbt_p99_s
        assert point.power_w == pytest.approx(point.energy_per_request_j * point.requests_per_s, rel=0.45)
        assert 2 * alone.idle_w < point.power_w < 2 * alone.prefill_w
    for load in (1.0, 3.0):
        assert points[1080, load].energy_per_request_j < points[1980, load].energy_per_request_j
    for clock_mhz in (1980, 1080):
        assert points[clock_mhz, 3.0].energy_per_request_j < points[clock_mhz, 1.0].energy_per_request_j
    assert here.node.view(0).lock_max_mhz == 0, "the lease is given back"
    done = profile(here, *words, "--rates", "1", "--seed", "2")
    assert done.returncode == 2
    assert "is of seed 1, this is 2" in done.stderr


def test_a_missed_slo_ends_the_loads_of_that_clock(here: Stage, endpoint: str, tmp_path: Path) -> None:
    out = tmp_path / "profile.csv"
    short = ["--gpus", "0,1", "--classes", "SS", "--clocks", "1980", "--seconds", "10", "--warmup", "1"]
    done = profile(here, "--endpoint", endpoint, *short, "--ttft", "0.001", "--rates", "2,4,8", "-o", str(out))
    assert done.returncode == 0, done.stderr
    assert "misses its SLO at 2/s: no higher load there" in done.stderr
    assert [(p.requests_per_s, p.feasible) for p in profile_file.load(out).points] == [(2.0, False)]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--endpoint", "http://127.0.0.1:9", "--rates", "1"], 69, "does not answer"),
        (["--endpoint", "http://127.0.0.1:9", "--rates", "fast"], 2, "'fast' are no rates"),
        (["--endpoint", "http://127.0.0.1:9", "--rates", "1", "--classes", "XL"], 2, "there is no request class 'XL'"),
        (["--endpoint", "http://127.0.0.1:9", "--rates", "1", "--tp", "4"], 2, "TP 4 runs on 4 GPUs, 2 are named"),
    ],
)
def test_what_cannot_be_measured_is_said(here: Stage, tmp_path: Path, words: list[str], code: int, message: str) -> None:
    done = profile(here, *SHORT, *words, "-o", str(tmp_path / "profile.csv"))
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert message in done.stderr
    assert not (tmp_path / "profile.csv").exists()
