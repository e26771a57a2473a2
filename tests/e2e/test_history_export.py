"""What a running powerd stored, read again: exports, past leases, the host's load."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from powerd.client import Client
from powerd.clock import RealClock
from powerd.config import StoreConfig
from powerd.model import Health, Reading, Snapshot
from powerd.records import HostLoad
from powerd.sinks.store import Store
from tests.e2e.daemon_rig import Rig, limit, rig
from tests.e2e.live import wait_for

HOURS = 5


def fill(path: Path, uuids: list[str], now_s: int) -> None:
    """Five hours of seconds of every GPU, with a hole of ten minutes."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    store = Store(path, StoreConfig(), RealClock())
    for at in range(now_s - HOURS * 3600, now_s):
        if now_s - 4000 <= at < now_s - 3400:
            continue
        rows = tuple(
            Reading(u, at * 10**9, Health.UP, epoch=1, energy_mj=1000 * (at - now_s + HOURS * 3600), power_mw=300_000 + 1000 * n)
            for n, u in enumerate(uuids)
        )
        while store.stats().backlog > 2000:
            time.sleep(0.01)
        store.append(Snapshot(at & 0xFFFFFFFF, at * 10**9, at * 10**9, rows))
    store.append_load(HostLoad(now_s * 10**9, 0.5, 2.25, 8 << 30, 64 << 30, (), 1234.5))
    store.close(60)


@pytest.fixture(scope="module")
def node() -> Iterator[Rig]:
    with rig() as made:
        now_s = int(time.time()) - 60
        fill(made.folder / "state" / "history.sqlite", made.hw.uuids, now_s)
        made.start()
        yield made


def powerctl(node: Rig, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "powerd.cli.main", "--socket", str(node.socket), *words],
        capture_output=True, text=True, timeout=120, env={**os.environ, "TZ": "UTC"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_export_holds_every_second_once(node: Rig, tmp_path: Path) -> None:
    until = int(time.time()) - 70
    since = until - 4 * 3600 - 17
    span = ("--since", str(since), "--until", str(until), "--columns", "power_mw,energy_mj")
    powerctl(node, "history", "--export", str(tmp_path / "h.csv"), *span)
    rows = list(csv.reader((tmp_path / "h.csv").open()))
    assert rows[0] == ["time_s", "step_s", "uuid", "power_mw", "energy_mj"]
    for number, uuid in enumerate(node.hw.uuids):
        mine = [row for row in rows[1:] if row[2] == uuid]
        times = [int(row[0]) for row in mine]
        assert len(times) == len(set(times)) == 4 * 3600 + 17 - 600
        assert times == sorted(times)
        assert {row[1] for row in mine} == {"1"}
        assert {row[3] for row in mine} == {str(300_000 + 1000 * number)}
        assert int(mine[-1][4]) - int(mine[0][4]) == 1000 * (times[-1] - times[0])
    powerctl(node, "history", "--export", str(tmp_path / "h.parquet"), *span)
    table: Any = parquet.ParquetFile(str(tmp_path / "h.parquet")).read()
    assert table.column_names == rows[0]
    assert table.num_rows == len(rows) - 1
    assert table.column("uuid").to_pylist() == [row[2] for row in rows[1:]]
    assert table.column("energy_mj").to_pylist() == [float(row[4]) for row in rows[1:]]
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".part")] == []


def test_a_lease_is_found_after_its_end(node: Rig) -> None:
    lease = node.granted(limit(300), detached=True, job="night 7")
    assert node.request("DELETE", f"/v1/leases/{lease['id']}", Powerd_Lease_Token=lease["token"])[0] == 200
    client = Client(node.socket)
    wait_for("the lease is stored", lambda: any(row.id == lease["id"] and row.ending for row in client.past_leases()))
    found = json.loads(powerctl(node, "history", "--leases", "--json"))
    assert [(r["state"], r["ending"], r["job"]) for r in found if r["id"] == lease["id"]] == [("ended", "released", "night 7")]
    assert lease["id"] in powerctl(node, "history", "--leases")
    assert client.past_leases(since=1, until=2) == ()


def test_the_hosts_load_is_read_shown_and_stored(node: Rig) -> None:
    client = Client(node.socket)
    wait_for("the host was read", lambda: "powerd_node_cpu_utilization_ratio" in client.metrics())
    load = json.loads(powerctl(node, "status", "--json"))["load"]
    assert 0 <= load["cpu_ratio"] <= 1
    assert 0 < load["memory_used_bytes"] < load["memory_size_bytes"]
    page = client.metrics()
    shown = re.search(r"^powerd_node_memory_size_bytes (\S+)$", page, re.M)
    assert shown is not None
    assert float(shown[1]) == load["memory_size_bytes"]

    def stored_loads() -> list[HostLoad]:
        with_store = Store(node.folder / "state" / "history.sqlite", StoreConfig(), RealClock())
        try:
            return list(with_store.loads(time.time() - 4000, time.time() + 10, 5000))
        finally:
            with_store.close()

    # The first row was written before the daemon began; shown is what it read, stored comes by its own thread.
    wait_for("the daemon's own row is stored", lambda: len(stored_loads()) > 1)
    stored = stored_loads()
    assert stored[0].cpu_ratio == 0.5
    assert (stored[0].load_1min, stored[0].memory_used_bytes, stored[0].memory_size_bytes) == (2.25, 8 << 30, 64 << 30)
    assert (stored[0].cpu_energy_j, stored[0].dram_energy_j) == (1234.5, None)
    assert client.node_history(since="1h", points=1)[-1].wall_ns >= stored[-1].wall_ns
