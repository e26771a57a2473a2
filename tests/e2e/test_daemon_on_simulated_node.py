"""powerd with the real powerd-hw on a simulated node: what is granted is in the driver, and whatever dies, it is undone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from powerd.sim import node as sim_node
from tests.e2e.daemon_rig import Rig, limit, pin


class Hw:
    """What the rig needs to know of an hw that is none of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.uuids: list[str] = []


class SimRig(Rig):
    def __init__(self) -> None:
        self.node = sim_node.create("h100-sxm", gpus=2, time="real", seed=3)
        folder = Path(tempfile.mkdtemp(prefix="pd-"))
        hw: Any = Hw(folder / "none.sock")
        super().__init__(folder, hw)

    def command(self, *options: str) -> list[str]:
        words = [w for w in super().command(*options) if w not in ("--hw-socket", str(self.hw.path))]
        return [*words, "--control"]

    def up(self) -> None:
        environment: dict[str, Any] = self.node.env()
        self.start(**environment)
        self.hw.uuids = [c["gpu"]["uuid"] for c in self.get("/v1/node")["gpus"]]

    def driver(self, index: int = 0) -> dict[str, Any]:
        show = subprocess.run(
            [sys.executable, "-m", "powerd.sim", "show", "--json"],
            env={**os.environ, **self.node.env()}, capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        gpu: dict[str, Any] = json.loads(show.stdout)["gpus"][index]
        return gpu

    def children(self) -> list[int]:
        assert self.process is not None
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in text.split()]


@pytest.fixture
def node() -> Iterator[SimRig]:
    made = SimRig()
    made.up()
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.terminate()
        made.process.wait(30)
    made.node.close()
    shutil.rmtree(made.folder, ignore_errors=True)


def test_a_lease_reaches_the_driver_and_its_release_restores_it(node: SimRig) -> None:
    before = node.driver()
    lease = node.granted(limit(300), pin(1203), detached=True)
    assert {o["control"]: o["verdict"] for o in lease["outcomes"]} == {"power_limit": "applied", "sm_clock": "pending_load"}
    assert [o["enforced"] for o in lease["outcomes"] if o["control"] == "power_limit"] == [300_000]
    set_now = node.driver()
    assert (set_now["limit_mw"], set_now["lock_max_mhz"]) == (300_000, 1200)
    assert node.driver(1)["limit_mw"] == before["limit_mw"], "the other GPU is left alone"
    node.request("DELETE", f"/v1/leases/{lease['id']}")
    after = node.driver()
    assert (after["limit_mw"], after["lock_max_mhz"]) == (before["limit_mw"], before["lock_max_mhz"])


def test_a_closed_connection_restores_the_driver(node: SimRig) -> None:
    before = node.driver()
    link, _ = node.attach(node.granted(limit(300)))
    link.close()
    node.until(lambda: node.driver()["limit_mw"] == before["limit_mw"], "not restored", timeout_s=5)


def test_a_killed_hw_is_restored_restarted_and_told_again(node: SimRig) -> None:
    lease = node.granted(limit(300), detached=True)
    generation = node.get("/v1/node")["hw_generation"]
    (hw,) = node.children()
    os.kill(hw, signal.SIGKILL)
    node.until(lambda: (g := node.get("/v1/node"))["hw_connected"] and g["hw_generation"] != generation, "hw did not come back")
    node.until(lambda: node.driver()["limit_mw"] == 300_000, "the lease was not set again")
    assert node.lease(lease)["state"] == "active"


def test_a_stopped_development_powerd_leaves_baseline(node: SimRig) -> None:
    before = node.driver()
    node.granted(limit(300), pin(1200), detached=True)
    assert node.stop() == 0
    after = node.driver()
    assert (after["limit_mw"], after["lock_max_mhz"]) == (before["limit_mw"], before["lock_max_mhz"])


def test_quiesce_closes_the_driver_and_resume_sets_the_lease_again(node: SimRig) -> None:
    before = node.driver()
    node.granted(limit(300), detached=True)
    assert node.request("POST", "/v1/quiesce", {"max_s": 60})[0] == 200
    node.until(lambda: node.driver()["limit_mw"] == before["limit_mw"], "not at baseline")
    assert node.request("POST", "/v1/resume")[0] == 200
    node.until(lambda: node.driver()["limit_mw"] == 300_000, "not set again")


def test_panic_brings_the_driver_to_baseline(node: SimRig) -> None:
    before = node.driver()
    node.granted(limit(300), pin(1200), detached=True)
    assert node.request("POST", "/v1/panic")[0] == 200
    node.until(lambda: node.driver()["limit_mw"] == before["limit_mw"], "not at baseline")
    assert node.driver()["lock_max_mhz"] == before["lock_max_mhz"]
