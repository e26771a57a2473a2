"""The InfluxDB sink against real servers: nothing is lost, nothing is doubled, what is written is what is read back."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from powerd.sinks.spool import read_dead
from tests.real.front import Front
from tests.real.influx_feeder import CHUNK, GPUS, T0_NS
from tests.real.servers import Influxd, VictoriaMetrics, need, wait_for

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("influx")]

TICKS = 25 * CHUNK
POINTS = TICKS * GPUS
POISON_AT = 12 * CHUNK + 5


class Feeder:
    """The feeding process, its files, and its end by SIGKILL."""

    def __init__(self, folder: Path, url: str, bucket: str) -> None:
        self.folder = folder
        token = folder / "token"
        token.write_text("the-right-token\n")
        token.chmod(0o600)
        (folder / "powerd.toml").write_text(
            f'[influx]\nurl = "{url}"\norg = "o"\nbucket = "{bucket}"\ntoken_file = "{token}"\n'
            "sample_hz = 1\ntimeout_s = 1\nbatch_lines = 2000\n"
        )
        self.process: subprocess.Popen[str] | None = None
        self.kills = 0

    def start(self, event_at: int) -> None:
        argv = [sys.executable, "-m", "tests.real.influx_feeder", str(self.folder), str(TICKS), str(event_at)]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def kill(self) -> None:
        assert self.process is not None
        assert self.process.poll() is None, self.process.communicate()[0]
        self.process.kill()
        self.process.communicate()
        self.kills += 1

    def chunk(self) -> int:
        assert self.process is not None
        assert self.process.poll() in (None, 0), self.process.communicate()[0]
        progress = self.folder / "progress"
        return int(progress.read_text()) // CHUNK if progress.exists() else 0

    def run(self, script: list[tuple[int, Callable[[], None]]], event_at: int = -1) -> str:
        """Feed everything; each action of the script is done once its chunk is on disk."""
        self.start(event_at)
        try:
            for chunk, action in script:

                def spooled(chunk: int = chunk) -> bool:
                    return self.chunk() >= chunk

                wait_for(f"chunk {chunk} is spooled", spooled, 60)
                action()
                if self.process is not None and self.process.poll() is not None:
                    self.start(event_at)
            assert self.process is not None
            out = self.process.communicate(timeout=90)[0]
            assert self.process.returncode == 0, out
            return out
        finally:
            if self.process is not None and self.process.poll() is None:
                self.process.kill()
                self.process.communicate()


def test_nothing_is_lost_at_the_real_engine(tmp_path: Path) -> None:
    """12,800 points through three outages, four kills, a slow server, 429, 503 and a poisoned line."""
    need("influxd")
    engine = Influxd(tmp_path / "influxd")
    engine.start()
    front = Front(engine)
    front.start()
    feeder = Feeder(tmp_path, front.url, "lossless")
    try:
        engine.create("lossless")
        _seed_conflict(engine)
        feeder.run(
            [
                (2, feeder.kill),
                (3, engine.stop),
                (5, feeder.kill),
                (6, engine.start),
                (7, lambda: front.hurdles.extend([429, 503, 500, 1.5])),  # 1.5 s: written, but the answer comes too late
                (9, lambda: engine.stop(9)),
                (11, engine.start),
                (13, feeder.kill),
                (15, engine.stop),
                (16, lambda: front.hurdles.extend([503, 429])),
                (18, engine.start),
                (21, feeder.kill),
            ],
            POISON_AT,
        )
        assert feeder.kills == 4
        assert engine.value("select count(energy_joules) from gpu", "lossless") == POINTS
        assert engine.value("select sum(energy_joules) from gpu", "lossless") == POINTS * (POINTS - 1) / 2
        per_gpu = engine.query("select count(energy_joules) from gpu group by uuid", "lossless")
        assert [series["values"][0][1] for series in per_gpu] == [TICKS] * GPUS
        (dead,) = read_dead(tmp_path / "spool.sqlite")
        assert "poison" in dead.line
        assert dead.status == 422
        assert "field type conflict" in dead.message
        assert engine.query("select * from event where kind = 'poison'", "lossless") == []
        assert not front.hurdles, "not every hurdle was met"
    finally:
        front.stop()
        engine.stop()


def _seed_conflict(engine: Influxd) -> None:
    """Give one field of events a type that powerd's events have not."""
    body = f'event,host=node1 number="seven" {T0_NS - 1}'.encode()
    urllib.request.urlopen(urllib.request.Request(f"{engine.url}/write?db=lossless", body), timeout=10).close()


def test_nothing_is_lost_at_an_unmodified_v2_write_endpoint(tmp_path: Path) -> None:
    need("victoria-metrics")
    server = VictoriaMetrics(tmp_path / "vm")
    server.start()
    feeder = Feeder(tmp_path, server.url, "any")
    try:
        feeder.run(
            [
                (2, server.stop),
                (4, feeder.kill),
                (6, server.start),
                (8, server.stop),
                (10, server.start),
                (12, feeder.kill),
                (14, server.stop),
                (16, feeder.kill),
                (17, server.start),
                (20, feeder.kill),
            ]
        )
        wait_for("all points are seen", lambda: server.count("gpu_energy_joules") >= POINTS)
        series = server.export("gpu_energy_joules")
        assert sorted(v for one in series for v in one["values"]) == [float(n) for n in range(POINTS)]
        assert all(len(set(one["timestamps"])) == TICKS for one in series)
        assert server.invalid_rows() == 0
    finally:
        server.stop()
