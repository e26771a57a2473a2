"""Well-known NVML clients, unmodified and at pinned versions, on a simulated node: they agree with its truth."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from powerd.sim import node as nodes

pytestmark = pytest.mark.peers

PINNED = {"nvitop": "1.7.2", "gpustat": "1.1.1", "py3nvml": "0.2.7", "zeus": "0.16.0"}


def peers_folder() -> Path:
    named = os.environ.get("POWERD_PEERS_VENV")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / ".venv-peers"
    return folder.parents[1] if folder.is_file() else folder


@pytest.fixture(scope="module")
def peers() -> Path:
    folder = peers_folder()
    if not (folder / "bin" / "python").exists():
        reason = f"no environment with the peers at {folder} (constraints-peers.txt; POWERD_PEERS_VENV names another)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder / "bin"


@pytest.fixture
def loaded_node() -> Iterator[nodes.SimNode]:
    """Two GPUs, one of them limited, locked and half loaded, in real time."""
    with nodes.create("h100-sxm", 2, "real", seed=7) as node:
        node.fault("foreign-limit", 1, value=400_000)
        node.fault("foreign-lock", 1, value=1200)
        command = [sys.executable, "-m", "powerd.sim.workload", "--gpu", "1", "--load", "0.5", "--seconds", "600"]
        worker = subprocess.Popen(command, env={**os.environ, **node.env()})
        while not node.view(1).utilization >= 45:
            assert worker.poll() is None
            node.advance(0.1)
        yield node
        worker.kill()
        worker.wait()


def run(peers: Path, node: nodes.SimNode, *command: str) -> str:
    env = {**os.environ, **node.env(), "COLUMNS": "160", "TERM": "dumb"}
    done = subprocess.run(
        [str(peers / command[0]), *command[1:]], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_versions_are_the_pinned_ones(peers: Path) -> None:
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {list(PINNED)}}}))"
    done = subprocess.run([str(peers / "python"), "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == PINNED


def test_nvitop_shows_the_node(peers: Path, loaded_node: nodes.SimNode) -> None:
    out = run(peers, loaded_node, "nvitop", "-1", "--ascii")
    idle, busy = (re.search(rf"\|\s+{gpu}\s+H100 80GB HBM3.*?(\d+)W / (\d+)W.*?(\d+)%", out, re.S) for gpu in (0, 1))
    assert idle
    assert busy
    assert (idle[2], busy[2]) == ("700", "400")
    view = loaded_node.view(1)
    assert float(busy[1]) == pytest.approx(view.power_w, rel=0.05)
    assert int(busy[3]) == pytest.approx(50, abs=8)
    assert "powerd.sim.workload" in out


def test_gpustat_agrees_in_json(peers: Path, loaded_node: nodes.SimNode) -> None:
    rows = json.loads(run(peers, loaded_node, "gpustat", "--json"))["gpus"]
    views = [loaded_node.view(gpu) for gpu in range(2)]
    assert [row["uuid"] for row in rows] == [view.uuid.decode() for view in views]
    assert [row["enforced.power.limit"] for row in rows] == [700, 400]
    assert [row["power.draw"] for row in rows] == pytest.approx([view.power_w for view in views], rel=0.05)
    assert [len(row["processes"]) for row in rows] == [0, 1]


def test_py3smi_agrees_though_it_uses_older_functions(peers: Path, loaded_node: nodes.SimNode) -> None:
    out = run(peers, loaded_node, "py3smi")
    powers = re.findall(r"(\d+)W / (\d+)W", out)
    assert [limit for _, limit in powers] == ["700", "400"]
    assert float(powers[1][0]) == pytest.approx(loaded_node.view(1).power_w, rel=0.05)


ZEUS = """
import json, sys, time
from zeus.device import get_gpus
from zeus.device.gpu.common import ZeusGPUInvalidArgError
from zeus.monitor import ZeusMonitor
import pynvml
gpus = get_gpus()
out = {}
monitor = ZeusMonitor(gpu_indices=[0, 1])
monitor.begin_window("w", sync_execution=False)
time.sleep(2.0)  # the window that is compared
window = monitor.end_window("w", sync_execution=False)
out["joules"] = [window.gpu_energy[0], window.gpu_energy[1]]
out["seconds"] = window.time
gpus.reset_power_management_limit(1)
out["limit_after_reset"] = gpus.get_power_management_limit(1)
gpus.set_power_management_limit(1, 350_000)
out["limit"] = gpus.get_power_management_limit(1)
try:
    gpus.set_power_management_limit(1, 900_000)
except ZeusGPUInvalidArgError as error:
    out["refused"] = str(error)
gpus.set_gpu_locked_clocks(1, 900, 900)
gpus.set_memory_locked_clocks(1, 1593, 1593)
time.sleep(0.3)  # clocks move within tens of milliseconds of load
handle = pynvml.nvmlDeviceGetHandleByIndex(1)
out["clocks"] = [pynvml.nvmlDeviceGetClockInfo(handle, kind) for kind in (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM)]
time.sleep(1.2)  # the driver's average is over the last second
out["watts"] = [gpus.get_average_power_usage(1) / 1000, gpus.get_instant_power_usage(1) / 1000]
print(json.dumps(out))
"""


def test_zeus_measures_windows_and_sets_clocks_and_limits(peers: Path, loaded_node: nodes.SimNode) -> None:
    watts = [loaded_node.view(gpu).power_w for gpu in range(2)]
    out = json.loads(run(peers, loaded_node, "python", "-c", ZEUS).splitlines()[-1])
    assert out["joules"] == pytest.approx([w * out["seconds"] for w in watts], rel=0.05)
    assert (out["limit_after_reset"], out["limit"]) == (700_000, 350_000)
    assert "refused" in out
    assert out["clocks"] == [900, 1593]
    view = loaded_node.view(1)
    assert (view.limit_mw, view.lock_max_mhz, view.memory_lock_max_mhz) == (350_000, 900, 1593)
    assert out["watts"] == pytest.approx([view.power_w] * 2, rel=0.05)


def test_clients_run_under_powerd_sim_run(peers: Path) -> None:
    command = [sys.executable, "-m", "powerd.sim", "run", "--gpus", "8", "--", str(peers / "gpustat"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["gpus"]) == 8
