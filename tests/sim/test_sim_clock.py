"""The one clock: real, scaled and stepped, with several participants, messages in flight and deaths."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from powerd.sim.layout import UINT64_MAX
from powerd.sim.node import parse_time

SECOND = 1_000_000_000


def test_real_time_is_the_machines_clock(nvml: Any) -> None:
    node, _ = nvml(time="real")
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    now = node.library.powerd_sim_now_ns()
    assert before <= now <= time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    assert node.library.powerd_sim_scale() == 1.0


def test_scaled_time_runs_faster_by_the_factor(nvml: Any) -> None:
    node, _ = nvml(time="x50")
    library = node.library
    assert library.powerd_sim_scale() == 50.0
    sim, real = library.powerd_sim_now_ns(), time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    slot = library.powerd_sim_join(b"test")
    reached = library.powerd_sim_wait(slot, sim + 5 * SECOND, -1)
    took = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - real
    library.powerd_sim_leave(slot)
    assert reached >= sim + 5 * SECOND
    assert took >= 5 * SECOND / 50


def test_stepped_time_stands_until_moved(nvml: Any) -> None:
    node, _ = nvml()
    start = node.now_ns()
    assert node.library.powerd_sim_scale() == 0.0
    assert node.library.powerd_sim_now_ns() == start
    assert node.advance(600) == start + 600 * SECOND
    assert node.library.powerd_sim_advance(start) == start + 600 * SECOND  # never back


def test_stepped_time_jumps_from_deadline_to_deadline(nvml: Any) -> None:
    node, _ = nvml()
    library, start = node.library, node.now_ns()
    log: list[tuple[str, int]] = []
    gate = threading.Barrier(2)

    def participant(name: str, periods: list[int]) -> None:
        slot = library.powerd_sim_join(name.encode())
        gate.wait(20)
        now = start
        for period in periods:
            now = library.powerd_sim_wait(slot, now + period, -1)
            log.append((name, now - start))
        library.powerd_sim_leave(slot)

    threads = [
        threading.Thread(target=participant, args=("a", [3, 3, 3])),
        threading.Thread(target=participant, args=("b", [2, 2, 2, 2])),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [now for _, now in log] == sorted(now for _, now in log)
    assert sorted(log) == [("a", 3), ("a", 6), ("a", 9), ("b", 2), ("b", 4), ("b", 6), ("b", 8)]
    assert node.now_ns() == start + 9


def test_nothing_moves_while_a_message_is_in_flight(nvml: Any) -> None:
    node, _ = nvml()
    library, start = node.library, node.now_ns()
    slot = library.powerd_sim_join(b"receiver")
    library.powerd_sim_flight(1)
    assert library.powerd_sim_wait(slot, start + SECOND, 50) == start
    library.powerd_sim_flight(-1)
    assert library.powerd_sim_wait(slot, start + SECOND, -1) == start + SECOND
    library.powerd_sim_leave(slot)


def test_a_wake_ends_a_wait_early_and_is_not_lost(nvml: Any) -> None:
    node, _ = nvml()
    library, start = node.library, node.now_ns()
    slot = library.powerd_sim_join(b"sleeper")
    library.powerd_sim_wake(slot)
    assert library.powerd_sim_wait(slot, UINT64_MAX, -1) == start
    waiting = threading.Thread(target=library.powerd_sim_wait, args=(slot, UINT64_MAX, -1))
    waiting.start()
    library.powerd_sim_wake(slot)
    waiting.join(20)
    assert not waiting.is_alive()
    library.powerd_sim_leave(slot)


def test_an_awake_participant_holds_the_clock_and_a_bounded_wait_returns(nvml: Any) -> None:
    node, _ = nvml()
    library, start = node.library, node.now_ns()
    awake, other = library.powerd_sim_join(b"awake"), library.powerd_sim_join(b"other")
    assert library.powerd_sim_wait(other, start + SECOND, 30) == start
    library.powerd_sim_leave(awake)
    assert library.powerd_sim_wait(other, start + SECOND, -1) == start + SECOND
    library.powerd_sim_leave(other)


def test_a_killed_participant_does_not_stop_the_clock(nvml: Any, spawn: Any) -> None:
    node, _ = nvml()
    code = (
        "from powerd.sim.node import attach\nn = attach(); n.load()\n"
        "print(n.library.powerd_sim_join(b'doomed'), flush=True)\nsys.stdin.read()\n"
    )
    child = spawn(node, code)
    assert int(child.stdout.readline()) >= 0
    library, start = node.library, node.now_ns()
    slot = library.powerd_sim_join(b"survivor")
    assert library.powerd_sim_wait(slot, start + SECOND, 60) == start
    child.kill()
    child.wait(20)
    assert library.powerd_sim_wait(slot, start + SECOND, -1) == start + SECOND
    library.powerd_sim_leave(slot)


def test_participants_in_two_processes_step_together(nvml: Any, spawn: Any) -> None:
    node, _ = nvml()
    code = (
        "from powerd.sim.node import attach\nn = attach(); n.load(); lib = n.library\n"
        "slot = lib.powerd_sim_join(b'child'); now = n.now_ns(); print('joined', flush=True)\n"
        "for _ in range(100):\n now = lib.powerd_sim_wait(slot, now + 10_000_000, -1)\n"
        "print(now, flush=True)\n"
    )
    library, start = node.library, node.now_ns()
    slot = library.powerd_sim_join(b"parent")
    child = spawn(node, code)
    assert child.stdout.readline().strip() == "joined"
    now = start
    for _ in range(40):
        now = library.powerd_sim_wait(slot, now + 25_000_000, -1)
    assert now == start + SECOND
    library.powerd_sim_leave(slot)
    assert int(child.stdout.readline()) == start + SECOND


def test_two_runs_with_one_seed_read_the_same(make_node: Any) -> None:
    def trace(seed: int) -> list[tuple[int, float]]:
        from powerd.sim.workload import Context

        node = make_node(seed=seed)
        out = []
        with Context(0, node=node) as context:
            for _ in range(20):
                context.load(0.6, 0.37)
                out.append((node.view(0).counter_mj, node.view(0).temperature_c))
        return out

    assert trace(5) == trace(5)
    assert trace(5) != trace(6)


@pytest.mark.parametrize("text", ["", "20", "x", "x0", "x-3", "fast", "x1e9"])
def test_unknown_time_modes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="time is"):
        parse_time(text)
