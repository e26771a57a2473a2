"""The client and powerctl with the real daemon, the real hw unit and a simulated driver, in real time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from powerd.api import LeaseRequest, WantSpec
from powerd.client import Client
from powerd.errors import EXIT_DENIED, LeaseLostError, PowerdError, RequestError
from powerd.killpoint import KILL_POINTS
from powerd.model import Control
from powerd.sim.node import SimNode, create

GPUS = 2


class Node:
    """A simulated node with powerd-hw and powerd as two processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sim: SimNode = create("a100-sxm-500w", GPUS, "real", latency=0.2, first_open_s=0.0)
        places = {n: str(folder) for n in ("XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_CONFIG_HOME")}
        self.env = {**os.environ, **self.sim.env(), **places, "POWERD_SOCKET": str(folder / "powerd.sock")}
        for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "POWERD_KILL_AT"):
            self.env.pop(name, None)
        self.config = folder / "powerd.toml"
        self.config.write_text(
            f'[daemon]\ncontrol = true\nrun_dir = "{folder}"\nstate_dir = "{folder}/state"\npanic_file = "{folder}/panic"\n'
            "reattach_s = 2.0\n"
            f'[hw]\nrun_dir = "{folder}/hw"\njournal_dir = "{folder}/hw"\n'
        )
        (folder / "hw").mkdir()
        self.log = (folder / "log").open("wb")
        self.hw = self.spawn("-I", "-m", "powerd.hw", "serve", "--config", str(self.config))
        self.daemon = self.start_daemon()

    def spawn(self, *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, *words], env=self.env, stdout=self.log, stderr=self.log)

    def start_daemon(self) -> subprocess.Popen[bytes]:
        daemon = self.spawn(
            "-m", "powerd.main", "run", "--config", str(self.config), "--hw-socket", str(self.folder / "hw" / "hw.sock")
        )
        self.until(self.ready, "powerd is up")
        return daemon

    def ready(self) -> bool:
        try:
            with Client(self.env["POWERD_SOCKET"]) as client:
                return client.node().hw_connected and len(client.snapshot().readings) == GPUS
        except PowerdError:
            return False

    def locks(self) -> list[tuple[int, int]]:
        return [(view.lock_min_mhz, view.lock_max_mhz) for view in map(self.sim.view, range(GPUS))]

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline_s:
                raise AssertionError(f"not so after {timeout_s:g} s: {what}\n{(self.folder / 'log').read_text()[-3000:]}")
            time.sleep(0.02)

    def samples(self, count: int) -> None:
        """Wait until the GPUs have been read so many times more."""
        with Client(self.env["POWERD_SOCKET"]) as client:
            first = client.snapshot().seq
            self.until(lambda: client.snapshot().seq >= first + count, f"{count} samples")

    def powerctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "powerd.cli.main", *words]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)

    def close(self) -> None:
        for process in (self.daemon, self.hw):
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.log.close()
        self.sim.close()


@pytest.fixture(scope="module")
def rig() -> Iterator[Node]:
    folder = Path(tempfile.mkdtemp(prefix="pd-"))
    made = Node(folder)
    yield made
    made.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def node(rig: Node, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "LOCAL_RANK", "POWERD_SIM_STATE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("POWERD_SOCKET", rig.env["POWERD_SOCKET"])
    yield rig
    rig.until(lambda: rig.locks() == [(0, 0)] * GPUS, "every test leaves the GPUs unlocked")


def test_a_lease_sets_changes_and_undoes_the_driver_itself(node: Node) -> None:
    with Client() as client, client.lease([0], sm_clock_mhz=1200, power_limit_w=300, reason="test", min_dwell_s=0.0) as lease:
        assert node.locks()[0] == (1200, 1200)
        assert node.sim.view(0).limit_mw == 300_000
        assert {str(o.verdict) for o in lease.outcomes} <= {"applied", "pending_load", "pending"}
        lease.change(sm_clock_mhz=(900, 1110))
        assert node.locks()[0] == (900, 1110)
        node.until(lambda: node.sim.view(0).limit_mw == 500_000, "a want that is dropped is undone")
        assert node.locks()[1] == (0, 0)
    assert node.locks()[0] == (0, 0)


def test_visible_devices_decide_where_a_lease_goes(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with Client().lease(sm_clock_mhz=990):
        assert node.locks() == [(0, 0), (990, 990)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with Client().lease(sm_clock_mhz=990):
        assert node.locks() == [(990, 990), (0, 0)]


def test_energy_of_a_window_is_that_of_the_gpu(node: Node) -> None:
    window = Client().energy("check", [0]).begin()
    before_mj = node.sim.true_energy_mj(0)
    node.samples(20)
    after_mj = node.sim.true_energy_mj(0)
    window.end()
    assert window.energy_j == pytest.approx((after_mj - before_mj) / 1000, rel=0.03)
    assert window.energy_j is not None
    assert window.low_j is not None
    assert window.high_j is not None
    assert window.low_j <= window.energy_j <= window.high_j


def test_a_daemon_that_is_killed_and_comes_back_finds_the_lease_again(node: Node) -> None:
    client = Client()
    lease = client.lease([0], sm_clock_mhz=1200, reason="survivor")
    assert node.locks()[0] == (1200, 1200)
    seen = lease.view.age_s
    left = client.lease_create(LeaseRequest(client.resolve([1]), (WantSpec(Control.SM_CLOCK, 900, 900),), "nobody comes for it"))
    node.daemon.kill()
    node.daemon.wait()
    node.daemon = node.start_daemon()
    node.until(lease.renew, "the lease answers again")
    assert lease.held
    assert lease.view.age_s > seen

    def waits() -> bool:
        return left.id in [view.id for view in client.leases()]

    assert waits()
    node.until(lambda: not waits(), "the grace in which a holder has to come back is over")
    assert lease.held
    assert node.locks()[0] == (1200, 1200)
    lease.release()
    assert node.locks()[0] == (0, 0)


HOLDER = """
import sys
from powerd.client import Client
from powerd.model import ClockPlan
lease = Client().lease([0], sm_clock_mhz=1200, min_dwell_s=0.0)
lease.change(sm_clock_mhz=1110)
beats = lease.arm(ClockPlan("p", lease.view.gpus[0], (1110, 600), 900, 60.0))
beats.send(0, 0)
beats.send(0, 1)
lease.release()
print("survived")
"""


@pytest.mark.parametrize("point", [p for p in KILL_POINTS if p.startswith("client.")])
def test_a_client_killed_at_any_boundary_leaves_the_gpu_at_baseline(node: Node, point: str) -> None:
    child = subprocess.run(
        [sys.executable, "-c", HOLDER], env={**node.env, "POWERD_KILL_AT": point}, capture_output=True, text=True, timeout=30
    )
    assert child.returncode == -signal.SIGKILL, child.stdout + child.stderr
    client = Client()
    node.until(lambda: not [v for v in client.leases() if v.state != "ended"], f"no lease is left after {point}", 10)
    node.until(lambda: node.locks()[0] == (0, 0), f"the GPU is unlocked after {point}", 10)


def test_panic_takes_a_lease_away_and_its_holder_learns_it(node: Node) -> None:
    client = Client()
    lease = client.lease([0], sm_clock_mhz=1200)
    assert client.panic().ok
    node.until(lambda: not lease.held, "the holder learns it")
    with pytest.raises(LeaseLostError):
        lease.change(sm_clock_mhz=1000)
    with pytest.raises(PowerdError, match="panic"):
        client.lease([0], sm_clock_mhz=1200)
    assert client.resume().ok
    with client.lease([0], sm_clock_mhz=1200):
        pass


def test_a_clock_outside_the_device_is_refused_in_words(node: Node) -> None:
    with pytest.raises(RequestError, match=r"1410 MHz|outside"):
        Client().lease([0], sm_clock_mhz=9000)


def test_powerctl_end_to_end(node: Node, tmp_path: Path) -> None:
    status = node.powerctl("status", "--json")
    assert json.loads(status.stdout)["node"]["simulated"] is True
    done = node.powerctl("set", "1", "--sm-clock", "1.2GHz", "--for", "1m", "--json")
    assert done.returncode == 0, done.stderr
    lease_id = json.loads(done.stdout)["id"]
    assert node.locks()[1] == (1200, 1200)
    page = node.powerctl("explain", "1").stdout
    assert f"winner      {lease_id}: powerctl set" in page
    assert "requested   1200 MHz" in page
    assert node.powerctl("lease", "renew", lease_id).returncode == 0
    assert node.powerctl("lease", "release", lease_id).returncode == 0
    assert node.locks()[1] == (0, 0)
    assert node.powerctl("lease", "release", lease_id).returncode in (0, 4)
    run = node.powerctl("run", "--gpus", "0", "--sm-clock", "1200MHz", "--", sys.executable, "-m", "powerd.sim.workload",
                        "gemm:1", "--gpu", "0")  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "on 1 GPU (simulated)" in run.stderr
    assert node.locks() == [(0, 0)] * GPUS
    out = tmp_path / "s.csv"
    sweep = node.powerctl("sweep", "--gpus", "0", "--clocks", "1410,1110", "-o", str(out), "--", sys.executable, "-m",
                          "powerd.sim.workload", "gemm:1", "--gpu", "0")  # fmt: skip
    assert sweep.returncode == 0, sweep.stderr
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [r["clock_mhz"] for r in rows] == [1410, 1110]
    assert rows[1]["time_s"] > rows[0]["time_s"]
    assert node.powerctl("history", "0", "--since", "5m", "--json").returncode == 0
    assert node.powerctl("events", "--json").returncode == 0


def test_without_permission_nothing_is_set_and_77_says_so(node: Node) -> None:
    node.sim.fault("permission", permission="none")
    try:
        done = node.powerctl("set", "0", "--sm-clock", "1200MHz", "--for", "10s")
        assert done.returncode == EXIT_DENIED, done.stdout + done.stderr
        assert node.locks()[0] == (0, 0)
    finally:
        node.sim.clear_faults()
        client = Client()
        for view in client.leases():
            if view.state != "ended":
                client.lease_release(view.id)
