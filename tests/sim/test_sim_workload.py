"""Work progresses at the simulated clock, and says truthfully what it took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from typing import Any

import pynvml as p
import pytest

from powerd.sim import workload
from powerd.sim.calibration import load_profile
from powerd.sim.kernels import profile_path
from powerd.sim.node import SimError
from powerd.sim.workload import Context, GpuLostError

FORWARD = "gpt3-175b/0/forward"


def lock(node: Any, clock: int) -> None:
    node.library.powerd_sim_set_lock(node.pointer, 0, clock, clock)


@pytest.mark.parametrize("model", ["a100-sxm-500w", "a40"])
def test_measured_kernels_take_the_measured_time_and_energy_at_every_clock(make_node: Any, model: str) -> None:
    name = {"a100-sxm-500w": "a100_sxm", "a40": "a40"}[model]
    node = make_node(model)
    curve = load_profile(profile_path(f"stage_profile_gpt3-175b_{name}.csv"))[0, "forward"]
    with Context(0, node=node) as context:
        context.load(1.0, 60.0)  # warm
        for point in curve[::6]:
            lock(node, int(point.clock_mhz))
            context.run([(FORWARD, 10)])
            done = context.run([(FORWARD, 10)])
            assert done.seconds == pytest.approx(10 * point.time_s, rel=0.002)
            assert done.energy_mj / 1000 == pytest.approx(10 * point.time_s * point.power_w, rel=0.01)


def test_sweep_on_every_second_clock_predicts_the_left_out_ones(make_node: Any) -> None:
    node = make_node(fit_on="every-second")
    curve = load_profile(profile_path("stage_profile_gpt3-175b_a100_sxm.csv"))[0, "backward"]
    with Context(0, node=node) as context:
        context.load(1.0, 60.0)
        for point in curve[1:-1:2]:
            lock(node, int(point.clock_mhz))
            done = context.run([("gpt3-175b/0/backward", 5)])
            assert done.seconds == pytest.approx(5 * point.time_s, rel=0.03)
            assert done.energy_mj / 1000 == pytest.approx(5 * point.time_s * point.power_w, rel=0.03)


def test_a_clock_change_midway_moves_the_end_both_ways(nvml: Any, participant: Any) -> None:
    node, (gpu, _) = nvml()
    library = node.library
    with Context(0, node=node) as context:
        lock(node, 1410)
        fast = context.run([(FORWARD, 4)]).seconds
        lock(node, 855)
        slow = context.run([(FORWARD, 4)]).seconds
        for first, second in ((1410, 855), (855, 1410)):
            lock(node, first)
            slot = library.powerd_sim_join(b"setter")
            half = node.now_ns() + round((fast if first == 1410 else slow) / 2 * 1e9)
            worker, out = participant(node, lambda: context.run([(FORWARD, 4)]))
            library.powerd_sim_wait(slot, half, -1)
            p.nvmlDeviceSetGpuLockedClocks(gpu, second, second)
            library.powerd_sim_leave(slot)
            worker.join(30)
            assert out[0].seconds == pytest.approx((fast + slow) / 2, rel=0.002)


def test_two_processes_share_a_gpu(make_node: Any) -> None:
    node = make_node()
    with Context(0, node=node) as one:
        alone = one.run([(FORWARD, 2)]).seconds
    gate = threading.Barrier(2)
    out: list[float] = []

    def work() -> None:
        slot = node.library.powerd_sim_join(b"worker")
        with Context(0, node=node) as context:
            gate.wait(20)
            out.append(context.run([(FORWARD, 2)]).seconds)
        node.library.powerd_sim_leave(slot)

    node.load()
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert out == pytest.approx([2 * alone] * 2, rel=0.001)


def test_long_queues_and_many_chunks_add_up(make_node: Any) -> None:
    node = make_node()
    with Context(0, node=node) as context:
        one = context.run([(FORWARD, 0.01)] * 10).seconds
        many = context.run([(FORWARD, 0.01)] * 200).seconds
    assert many == pytest.approx(20 * one, rel=1e-6)


def test_real_time_work_takes_real_time(make_node: Any) -> None:
    node = make_node(time="x10")
    start = node.now_ns()
    done = workload.run([(FORWARD, 4)], 0, node=node)
    assert done.seconds == pytest.approx(2.006, rel=0.01)
    assert done.end_ns <= node.now_ns()
    assert done.end_ns - start >= 2.0e9


def test_a_busy_gpu_shows_its_use(nvml: Any) -> None:
    node, (gpu, other) = nvml()
    with Context(0, node=node, memory_bytes=10 << 30) as context:
        context.load(0.5, 3.0)
        assert p.nvmlDeviceGetUtilizationRates(gpu).gpu == pytest.approx(50, abs=6)
        assert p.nvmlDeviceGetUtilizationRates(other).gpu == 0
        (sample,) = p.nvmlDeviceGetProcessUtilization(gpu, 0)
        assert sample.pid == os.getpid()


def test_work_on_a_lost_gpu_fails_and_on_another_goes_on(make_node: Any) -> None:
    node = make_node()
    with Context(0, node=node) as context, Context(1, node=node) as other:
        node.fault("lost", 0)
        with pytest.raises(GpuLostError):
            context.run([(FORWARD, 1)])
        assert other.run([(FORWARD, 1)]).seconds > 0.4


def test_unknown_kernels_and_silly_numbers_are_refused(make_node: Any) -> None:
    node = make_node()
    with Context(0, node=node) as context:
        with pytest.raises(ValueError, match="no kernel 'nonsense'"):
            context.run([("nonsense", 1)])
        with pytest.raises(ValueError, match="activity"):
            context.load(1.5, 1.0)
        with pytest.raises(ValueError, match="a load lasts"):
            context.blocked(-1.0)
        with pytest.raises(SimError, match="refused"):
            context.run([(FORWARD, -1.0)])
    with pytest.raises(SimError, match="no such GPU"):
        Context(7, node=node)


def test_the_command_works_on_the_node_of_its_environment(make_node: Any) -> None:
    node = make_node(time="x100")
    command = [sys.executable, "-m", "powerd.sim.workload", "--json", "--gpu", "0", "--gpu", "1", f"{FORWARD}:4"]
    done = subprocess.run(command, env={**os.environ, **node.env()}, capture_output=True, text=True, check=True, timeout=60)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["gpu"] for row in rows] == [0, 1]
    assert all(row["simulated"] and row["seconds"] == pytest.approx(2.006, rel=0.02) for row in rows)
    clean = {k: v for k, v in os.environ.items() if k != "POWERD_SIM_STATE"}
    lost = subprocess.run(command, env=clean, capture_output=True, text=True, check=False, timeout=60)
    assert lost.returncode == 2
    assert lost.stderr.startswith("powerd.sim.workload: no simulated node")
