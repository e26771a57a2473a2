"""`powerctl dynamollm profile` measures a running engine through powerd, goes on where it was, and tells what it cannot."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
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
    words = ["--endpoint", endpoint, *SHORT, "--ttft", "20", "--tbt", "5", "-o", str(out)]
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
        assert (point.request_class, point.tp, point.feasible, point.source) == ("SS", 2, True, "modelled"), done.stderr
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


def test_an_interruption_keeps_what_was_measured_and_gives_the_clocks_back(here: Stage, endpoint: str, tmp_path: Path) -> None:
    out = tmp_path / "profile.csv"
    words = ["--endpoint", endpoint, "--gpus", "0,1", "--classes", "SS", "--clocks", "1080", "--seconds", "10", "--warmup", "1"]
    words += ["--ttft", "20", "--tbt", "5", "-o", str(out)]
    long = [*POWERCTL, "dynamollm", "profile", *words, "--rates", "1,2,3,4,5,6,7,8"]
    with subprocess.Popen(long, env=here.env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as running:
        while not out.exists() or out.read_text().count("\n") < 2:
            assert running.poll() is None
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        told = running.communicate(timeout=60)[1]
    assert running.returncode == 130
    assert "the same command goes on there" in told
    assert not {"Traceback", "ignored", "destroyed"} & set(told.replace(":", " ").split())
    assert here.node.view(0).lock_max_mhz == 0
    measured = profile_file.load(out).points
    assert profile(here, *words, "--rates", "1").returncode == 0
    assert profile_file.load(out).points == measured


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--endpoint", "http://127.0.0.1:9", "--rates", "1"], 69, "does not answer"),
        (["--endpoint", "http://127.0.0.1:9", "--rates", "fast"], 2, "'fast' are no rates"),
        (["--endpoint", "http://127.0.0.1:9", "--rates", "0.001,1"], 2, "at 0.001/s no request comes in the 24 s"),
        (["--endpoint", "http://127.0.0.1:9", "--rates", "1", "--classes", "XL"], 2, "there is no request class 'XL'"),
        (["--endpoint", "http://127.0.0.1:9", "--rates", "1", "--tp", "4"], 2, "TP 4 runs on 4 GPUs, 2 are named"),
    ],
)
def test_what_cannot_be_measured_is_said(here: Stage, tmp_path: Path, words: list[str], code: int, message: str) -> None:
    done = profile(here, *SHORT, *words, "-o", str(tmp_path / "profile.csv"))
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert message in done.stderr
    assert not (tmp_path / "profile.csv").exists()


def test_requests_that_the_context_does_not_hold_are_left_out_and_it_is_said(here: Stage, endpoint: str, tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.csv"
    rows = "\n".join(
        f"{second},{prompt},{output}" for second, (prompt, output) in enumerate([(1100, 400), (8000, 9000), (1000, 16000)])
    )
    lengths.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}\n")
    words = ["--endpoint", endpoint, "--rates", "1", "--classes", "LL,ML", "--lengths", str(lengths)]
    done = profile(here, *SHORT[:2], *SHORT[4:], *words, "-o", str(tmp_path / "profile.csv"))
    assert done.returncode == 2
    assert "class LL: 50.0% of the requests are longer than the endpoint's context of 16384 tokens" in done.stderr
    assert "holds no request of class ML: the shortest has 17000" in done.stderr
    assert not (tmp_path / "profile.csv").exists()
