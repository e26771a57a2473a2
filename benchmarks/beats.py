"""Beats of a clock plan: what one costs the training loop, and how soon its clock is there.

House rules: the public client sends, as a training process does; the moment of the driver's call and of the clock are seen in the
simulated node itself, not in what powerd says of them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from benchmarks.daemon import Running, running
from benchmarks.report import Progress, Report, percentile
from powerd import client as powerd_client
from powerd.client.beats import Beats
from powerd.model import ClockPlan

CLOCKS = (1980, 1200, 1500, 900, 1755, 1065)
_PATIENCE_S = 1.0
_LOOK_S = 0.00005  # a watcher that spins would keep powerd-hw from the core that it was woken on


def beats(report: Report, progress: Progress, rounds: int = 396) -> None:
    """Cost of a beat, and its way to the driver and to the clock."""
    report.title, report.simulated = "beats of one clock plan, one GPU busy, the daemon otherwise idle,", True
    wants = {"sm_clock_mhz": (None, max(CLOCKS)), "reason": "benchmark", "ttl_s": 600.0}
    with running(gpus=1) as daemon, powerd_client.Client(daemon.socket) as client:
        plan = ClockPlan("benchmark", daemon.uuids[0], CLOCKS, None, iteration_s=60.0)
        with client.lease(list(daemon.uuids), **wants) as lease, lease.arm(plan) as held:  # type: ignore[arg-type]
            cost, busy = _cost(held, 5 * rounds, lambda s: progress(s / 3))
            clock = _way(daemon, held, rounds, 5 * rounds, _clock_is, lambda s: progress((1 + s) / 3))
            daemon.node.fault("latency", value=0)
            call = _way(daemon, held, rounds, 6 * rounds, _lock_is, lambda s: progress((2 + s) / 3))
            daemon.node.clear_faults()
            dropped = held.dropped
    for name, found, unit, scale, bar in (
        ("send, in the training thread", cost, "us", 1e6, "< 10"),
        ("send, CPU time of that thread", busy, "us", 1e6, ""),
        ("beat -> driver call", call, "ms", 1e3, ""),
        ("beat -> clock in force, driver's own time included", clock, "ms", 1e3, ""),
    ):
        report.add(f"{name}, p50", scale * percentile(found, 0.5), unit, bar)
        report.add(f"{name}, p99", scale * percentile(found, 0.99), unit)
    report.add("beats dropped", dropped, "")
    report.notes.append(f"send: {5 * rounds} beats 1-3 ms apart from a thread that is busy in between.")
    report.notes.append(
        f"The ways: {rounds} beats each, 10-20 ms apart; the simulated driver takes 4.5 ms at p50 and settles in 0.9 ms."
    )
    report.notes.append(
        "The way to the driver call is seen with a driver that takes no time: from before send to the lock's change."
    )


def _cost(held: Beats, rounds: int, progress: Progress) -> tuple[list[float], list[float]]:
    """Seconds in ``send``, and CPU seconds in it."""
    cost, busy = [], []
    dice = random.Random(1)  # noqa: S311 (phases, not secrets)
    for number in range(rounds):
        step, index = divmod(number, len(CLOCKS))
        until = time.perf_counter() + dice.uniform(0.001, 0.003)
        while time.perf_counter() < until:
            pass
        clock, found = (time.perf_counter, cost) if number % 2 else (time.thread_time, busy)  # each without the other's own cost
        begin = clock()
        held.send(step, index)
        found.append(clock() - begin)
        if number % 100 == 0:
            progress(number / rounds)
    return cost, busy


def _way(
    daemon: Running, held: Beats, rounds: int, first: int, there: Callable[[Running, int], bool], progress: Progress
) -> list[float]:
    """Seconds from before ``send`` until what was asked for is seen."""
    seen = []
    dice = random.Random(2)  # noqa: S311 (phases, not secrets)
    for number in range(first, first + rounds):
        step, index = divmod(number, len(CLOCKS))
        time.sleep(dice.uniform(0.01, 0.02))
        begin = time.perf_counter()
        held.send(step, index)
        while not there(daemon, CLOCKS[index]):
            time.sleep(_LOOK_S)
            if time.perf_counter() - begin > _PATIENCE_S:
                raise RuntimeError(f"{CLOCKS[index]} MHz never came: {held.view}")
        seen.append(time.perf_counter() - begin)
        progress((number - first) / rounds)
    return seen


def _clock_is(daemon: Running, mhz: int) -> bool:
    return bool(abs(daemon.node.view(0).clock_mhz - mhz) < 8)


def _lock_is(daemon: Running, mhz: int) -> bool:
    return bool(daemon.node.view(0).lock_max_mhz == mhz)
