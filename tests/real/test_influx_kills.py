"""The whole daemon killed four times while it logs: no point that was on disk is lost, none is doubled, no hole within a life."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
import urllib.request
import zlib
from itertools import pairwise
from pathlib import Path

import pytest

from powerd.sinks.spool import read_dead
from tests.e2e.live import LiveNode, wait_for
from tests.real.front import Front
from tests.real.servers import Influxd, need
from tests.real.test_influx_daemon import section

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("influx")]

BUCKET = "killed"
GPUS = 8
BATCH_MS = 10_000  # of the node's time, which runs ten times as fast as ours: what is put on disk at once
Point = tuple[str, int]


def at_server(engine: Influxd) -> list[Point]:
    """Every point of the measurement gpu as the engine reads it back."""
    found = engine.query("select energy_joules from gpu group by uuid", BUCKET)
    return [(series["tags"]["uuid"], round(row[0] / 1e6)) for series in found for row in series["values"]]


def in_spool(path: Path) -> set[Point]:
    """Every point of the measurement gpu that waits on disk."""
    link = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        batches = [zlib.decompress(data).decode() for (data,) in link.execute("SELECT data FROM batch")]
    finally:
        link.close()
    points = [line.split(" ") for batch in batches for line in batch.splitlines() if line.startswith("gpu,")]
    return {(next(t[5:] for t in words[0].split(",") if t.startswith("uuid=")), int(words[-1])) for words in points}


class Watched:
    """What is known of a node's points: on disk or at the server; each life's own ones apart."""

    def __init__(self, engine: Influxd, spool: Path) -> None:
        self.engine, self.spool = engine, spool
        self.lives: list[set[Point]] = []

    @property
    def all(self) -> set[Point]:
        return {point for known in self.lives for point in known}

    def seen(self) -> set[Point]:
        """What this life has added so far."""
        there = set(at_server(self.engine)) if self.engine.process is not None else set()
        return (in_spool(self.spool) | there) - self.all


def kill(node: LiveNode) -> None:
    """SIGKILL, seen from a moment at which nothing is being written."""
    node.process.kill()
    node.process.wait(20)


def test_the_daemon_killed_four_times_loses_and_doubles_nothing(tmp_path: Path) -> None:
    need("influxd")
    engine = Influxd(tmp_path / "influxd")
    engine.start()
    front = Front(engine)
    front.start()
    try:
        engine.create(BUCKET)
        seed = f'lease,host=another high_power_limit_watts="many" {time.time_ns()}'.encode()  # its type, in this shard
        urllib.request.urlopen(urllib.request.Request(f"{engine.url}/write?db={BUCKET}", seed), timeout=10).close()
        with LiveNode(time="x10", gpus=GPUS, more=section(front.url, tmp_path, "timeout_s = 1\n", BUCKET)) as node:
            watched = Watched(engine, next(node.state_dir.glob("*spool*.sqlite")))
            for life in range(5):
                if life:
                    node.start()
                wait_for("points come", watched.seen, 40)
                if life == 1:
                    node.powerctl("set", "0", "--for", "1m", "--power-limit", "300W", "--reason", "its line is poisoned")
                if life in (0, 2, 4):
                    engine.stop()
                    front.hurdles.extend([429, 503])
                wait_for("enough is on disk or sent", lambda: len(watched.seen()) > 2200, 60)
                if life in (2, 4):
                    front.hurdles.append(1.5)  # written, but the answer comes too late
                    engine.start()
                if life < 4:
                    os.kill(node.process.pid, signal.SIGSTOP)
                    spooled = in_spool(watched.spool)
                    kill(node)
                    if life == 0:
                        engine.start()
                    watched.lives.append((spooled | set(at_server(engine))) - watched.all)
            watched.lives.append(watched.seen())
            wait_for("what was on disk has arrived", lambda: watched.all <= set(at_server(engine)), 60)
            found, dead = at_server(engine), read_dead(watched.spool)
        assert len(found) > 10_000
        assert len(set(found)) == len(found)
        for uuid in {uuid for uuid, _ in found}:
            for known in watched.lives:
                times = sorted(ms for other, ms in known if other == uuid)
                assert max(after - at for at, after in pairwise(times)) < BATCH_MS / 2, "a hole within a life"
        assert dead
        assert all(row.line.startswith("lease,") and "high_power_limit_watts" in row.line for row in dead)
        assert engine.query("select high_power_limit_watts from lease where host != 'another'", BUCKET) == []
    finally:
        front.stop()
        engine.stop()
