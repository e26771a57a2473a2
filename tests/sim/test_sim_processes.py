"""Several processes share one node: lifetimes, crashes, monotonic counters, other users."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

import pynvml as p
import pytest

from powerd.sim.node import SimNode
from powerd.sim.workload import Context

SET_AND_TELL = (
    "p.nvmlDeviceSetPowerManagementLimit(handle(0), 300000)\n"
    "p.nvmlDeviceSetGpuLockedClocks(handle(0), 1200, 1200)\n"
    "print('set', flush=True)\n"
)
WAIT = "sys.stdin.read()\n"


def line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def end(child: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    child.send_signal(number)
    child.wait(20)


def settings(node: SimNode, gpu: int = 0) -> tuple[int, Any]:
    row = node.show()["gpus"][gpu]
    return row["limit_mw"], row["locked_clocks_mhz"]


def test_settings_are_seen_by_others_and_survive_their_setter(make_node: Any, spawn: Any) -> None:
    node = make_node(persistence=True)
    spawn(node, SET_AND_TELL).wait(20)
    assert line(spawn(node, "print(p.nvmlDeviceGetPowerManagementLimit(handle(0)))")) == "300000"
    assert settings(node) == (300_000, [1200, 1200])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_with_persistence_off_the_last_client_takes_settings_with_it(make_node: Any, spawn: Any, number: int) -> None:
    node = make_node(persistence=False)
    first = spawn(node, SET_AND_TELL + WAIT)
    assert line(first) == "set"
    second = spawn(node, "print('up', flush=True)\n" + WAIT)
    assert line(second) == "up"
    end(first, number)
    assert settings(node) == (300_000, [1200, 1200])
    end(second, number)
    assert settings(node) == (500_000, None)


def test_persistence_is_per_gpu(make_node: Any, spawn: Any) -> None:
    node = make_node(persistence=False)
    code = "p.nvmlDeviceSetPersistenceMode(handle(1), 1)\n" + "".join(
        f"p.nvmlDeviceSetPowerManagementLimit(handle({gpu}), 250000)\n" for gpu in (0, 1)
    )
    spawn(node, code).wait(20)
    assert [settings(node, gpu)[0] for gpu in (0, 1)] == [500_000, 250_000]


def test_a_running_workload_keeps_settings_alive(make_node: Any, spawn: Any) -> None:
    node = make_node(persistence=False)
    with Context(0, node=node):
        spawn(node, SET_AND_TELL).wait(20)
        assert settings(node) == (300_000, [1200, 1200])
    assert settings(node) == (500_000, None)


def test_driver_recovers_from_clients_killed_inside_setters(make_node: Any, spawn: Any) -> None:
    node = make_node(gpus=1)
    hammer = (
        "print('go', flush=True)\n"
        "while True:\n p.nvmlDeviceSetGpuLockedClocks(handle(0), 600, 600); p.nvmlDeviceGetPowerUsage(handle(0))\n"
    )
    for _ in range(3):
        children = [spawn(node, hammer) for _ in range(2)]
        for child in children:
            assert line(child) == "go"
        calls = node.view(0).setter_calls
        while node.view(0).setter_calls < calls + 2000:
            os.sched_yield()
        for child in children:
            end(child)
    assert line(spawn(node, "p.nvmlDeviceSetGpuLockedClocks(handle(0), 900, 900)\nprint('ok')")) == "ok"
    assert node.show()["gpus"][0]["locked_clocks_mhz"] == [900, 900]


def test_energy_counter_never_steps_back_for_any_of_several_readers(make_node: Any, spawn: Any) -> None:
    node = make_node("h100-sxm", time="x200", gpus=1)
    code = (
        "h = handle(0); last = 0; reads = 0; begin = p.nvmlDeviceGetTotalEnergyConsumption(h)\n"
        "while last < begin + 2_000_000 or reads < 20000:\n"
        " now = p.nvmlDeviceGetTotalEnergyConsumption(h); reads += 1\n"
        " assert now >= last, (now, last)\n last = now\n"
        "print('ok')\n"
    )
    children = [spawn(node, code) for _ in range(3)]
    with Context(0, node=node) as context:
        context.load(0.7, 60.0)
    assert [line(child) for child in children] == ["ok"] * 3


def test_processes_are_listed_while_they_live(nvml: Any, spawn: Any) -> None:
    node, (gpu, other) = nvml(time="real")
    code = (
        "from powerd.sim.workload import Context\nc = Context(0, memory_bytes=3 << 30)\n"
        "print('open', flush=True)\nsys.stdin.read()\n"
    )
    child = spawn(node, code)
    assert line(child) == "open"
    (row,) = p.nvmlDeviceGetComputeRunningProcesses(gpu)
    assert (row.pid, row.usedGpuMemory) == (child.pid, 3 << 30)
    assert p.nvmlDeviceGetMemoryInfo(gpu, p.nvmlMemory_v2).used == 3 << 30
    assert p.nvmlDeviceGetComputeRunningProcesses(other) == []
    end(child)
    assert p.nvmlDeviceGetComputeRunningProcesses(gpu) == []


def test_work_of_a_killed_process_stops_drawing_power(nvml: Any, spawn: Any) -> None:
    node, (gpu, _) = nvml(time="x20")
    code = "from powerd.sim.workload import Context\nContext(0).load(1.0, 1e6)\n"
    child = spawn(node, code)
    while p.nvmlDeviceGetPowerUsage(gpu) < 400_000:
        assert child.poll() is None
        node.advance(0.5)
    end(child)
    while p.nvmlDeviceGetPowerUsage(gpu) > 60_000:
        node.advance(0.5)
    assert p.nvmlDeviceGetClockInfo(gpu, p.NVML_CLOCK_SM) == 210


def test_a_forked_child_does_not_keep_its_dead_parent_alive(nvml: Any, spawn: Any) -> None:
    node, _ = nvml(time="real")
    code = (
        "from powerd.sim.workload import Context\nc = Context(0)\n"
        "child = os.fork()\n"
        "if child == 0:\n sys.stdin.read(); os._exit(0)\n"
        "print('open', flush=True)\nsys.stdin.read()\n"
    )
    parent = spawn(node, code)
    assert line(parent) == "open"
    assert node.view(0).processes == 1
    parent.kill()
    parent.wait(20)
    assert node.view(0).processes == 0


def test_another_user_reads_and_may_not_set(make_node: Any, spawn: Any) -> None:
    node = make_node(perm="root")
    code = (
        "p.nvmlShutdown()\n"
        "if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        "p.nvmlInit()\n"
        "print(p.nvmlDeviceGetPowerUsage(handle(0)) > 0)\n"
        "try: p.nvmlDeviceSetPowerManagementLimit(handle(0), 300000)\n"
        "except p.NVMLError as error: print(error.value)\n"
    )
    child = spawn(node, code)
    assert (line(child), line(child)) == ("True", str(p.NVML_ERROR_NO_PERMISSION))
    assert node.view(0).limit_mw == 500_000


def test_the_capability_alone_is_enough_to_set(make_node: Any, spawn: Any) -> None:
    node = make_node(perm="root")
    capset = 126 if os.uname().machine == "x86_64" else 91
    code = (
        "import ctypes; libc = ctypes.CDLL(None); p.nvmlShutdown()\n"
        "class Header(ctypes.Structure): _fields_ = [('version', ctypes.c_uint32), ('pid', ctypes.c_int)]\n"
        "data = (ctypes.c_uint32 * 6)(1 << 21, 1 << 21, 0, 0, 0, 0)\n"
        "if os.geteuid() == 0: libc.prctl(8, 1, 0, 0, 0); os.setgid(65534); os.setresuid(65534, 65534, 65534)\n"
        f"got = libc.syscall({capset}, ctypes.byref(Header(0x20080522, 0)), data)\n"
        "p.nvmlInit()\n"
        "try: p.nvmlDeviceSetPowerManagementLimit(handle(0), 300000); print('set', got)\n"
        "except p.NVMLError: print('refused', got)\n"
    )
    # Who did not start as root cannot have the capability, and is refused.
    root = os.geteuid() == 0
    assert line(spawn(node, code)) == ("set 0" if root else "refused -1")
    assert node.view(0).limit_mw == (300_000 if root else 500_000)
