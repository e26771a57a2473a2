"""A job over two running nodes and its report; CPU energy from a made-up powercap tree, which is not hardware."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from powerd.api import JobEvent, JobStep
from powerd.client import Client
from tests.e2e.live import LiveNode, wait_for
from tests.hw.test_rapl import FakePowercap

STEPS, STEP_NS = 260, 40_000_000
pytestmark = pytest.mark.xdist_group("report")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveNode, LiveNode, FakePowercap]]:
    tree = FakePowercap(tmp_path_factory.mktemp("host") / "powercap")
    with LiveNode(hw=f'powercap_dir = "{tree.root}"') as first, LiveNode() as second:
        yield first, second, tree


def stored_s(client: Client) -> int:
    """Seconds of samples in the store."""
    return len(client.history([0], since="60s", columns=["energy_mj"], points=100).series[0].time_s)


def told(node: LiveNode, seed: int) -> float:
    """260 steps of 40 ms under a plan and at full clock by turns, 9 % saved; the joules that they add up to."""
    client, dice = node.client, random.Random(seed)
    gpus = tuple(c.gpu.uuid for c in client.node().gpus)
    client.job_event_strict("j1", JobEvent("start"))
    begin_ns = client.now_ns()
    steps = []
    for i in range(STEPS):
        plan = "baseline" if i // 20 % 2 else "p-1"
        at_ns = begin_ns + i * STEP_NS
        energy = dice.gauss(1, 0.02) * (20.0 if plan == "baseline" else 18.2)
        steps.append(JobStep(i, at_ns, at_ns + STEP_NS, gpus, plan, energy))
    wait_for("ten seconds are stored", lambda: stored_s(client) >= 11)
    client.job_event_strict("j1", JobEvent("step", steps=tuple(steps)))
    client.job_event_strict("j1", JobEvent("end"))
    return sum(s.energy_j or 0.0 for s in steps)


def test_a_job_over_two_nodes_one_of_them_by_tcp(nodes: tuple[LiveNode, LiveNode, FakePowercap], tmp_path: Path) -> None:
    first, second, _ = nodes
    before = [node.client.snapshot() for node in (first, second)]
    reported = [told(first, 1), told(second, 2)]
    after = [node.client.snapshot() for node in (first, second)]
    file = tmp_path / "nodes.toml"
    file.write_text(f'''[[node]]
name = "first"
socket = "{first.socket}"
[[node]]
name = "second"
url = "http://127.0.0.1:{second.tcp_port}"
token_file = "{second.token_file}"
''')
    wait_for("the end is stored", lambda: min(stored_s(n.client) for n in (first, second)) >= 14)
    out = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "powerd.cli.main", "report", "--job", "j1", "--nodes", str(file), "--price", "0.12EUR/kWh",
         "-o", str(out)],
        env={**os.environ, **first.env}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["simulated"] is True
    assert [n["steps_energy_j"] for n in report["nodes"]] == pytest.approx(reported)
    assert report["energy_j"]["value"] is not None, report["gaps"]
    # No more than what the counters gained around the job, and about its share of that time.
    for part, low, high in zip(report["nodes"], before, after, strict=True):
        gained = (sum(r.energy_mj or 0 for r in high.readings) - sum(r.energy_mj or 0 for r in low.readings)) / 1000
        share = (report["end_s"] - report["begin_s"]) / ((high.wall_ns - low.wall_ns) / 1e9)
        assert part["energy_j"]["low"] <= gained * 1.02
        assert part["energy_j"]["value"] == pytest.approx(gained * share, rel=0.25)
    saving = report["saving"]
    assert saving["outcome"] == "saving", saving
    assert saving["saving"]["low"] < 0.09 < saving["saving"]["high"]
    assert (report["job"]["steps"], len(report["steps"])) == (STEPS, STEPS)
    assert report["lacks"] == ["cpu", "dram", "other"]


def test_cpu_and_dram_energy_reach_the_page_only_where_they_can_be_read(nodes: tuple[LiveNode, LiveNode, FakePowercap]) -> None:
    first, second, tree = nodes
    wait_for("the first reading", lambda: 'powerd_dram_energy_joules_total{package="1"}' in first.client.metrics())
    tree.set("intel-rapl:0", 43_000_000)
    wait_for("42 J of a CPU", lambda: 'powerd_cpu_energy_joules_total{package="0"} 42.0' in first.client.metrics())
    assert "powerd_cpu_energy" not in second.client.metrics()
    wait_for("it is stored", lambda: first.client.node_history(since="10s", points=1000)[-1].cpu_energy_j == 42.0)
    host = []
    for node in (first, second):
        done = node.powerctl("report", "--since", "9s")
        assert done.code == 0, done.err
        host.append(json.loads(done.out)["host_energy_j"])
    assert host[0]["known"] == pytest.approx(42.0, abs=0.1)
    assert host[1] is None
