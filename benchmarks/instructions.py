"""What an instruction's begin and end cost the training thread of a rank that follows a plan.

House rules: the conductor that training uses, with real beats to a real powerd-hw; instructions come a while after one another,
as in training, so that caches are as cold as there.
"""

from __future__ import annotations

import random
import time

from benchmarks.daemon import running
from benchmarks.report import Progress, Report, percentile
from powerd import client as powerd_client
from powerd.model import ClockPlan
from powerd_integrations.pipeline import Alone, Conductor, Options, Place

MICROBATCHES = 12


def instructions(report: Report, progress: Progress, steps: int = 40) -> None:
    """Begin and end of an instruction in the training thread."""
    report.title, report.simulated = "a rank that follows its plan, begin and end of each instruction,", True
    order = tuple((0, kind, m) for m in range(MICROBATCHES) for kind in ("forward", "backward"))
    found: dict[bool, tuple[list[float], list[float], list[float]]] = {True: ([], [], []), False: ([], [], [])}
    dice = random.Random(1)  # noqa: S311 (phases, not secrets)
    with running(gpus=1) as daemon, powerd_client.Client(daemon.socket) as client:
        uuid = daemon.uuids[0]
        conductor = Conductor(Place(), Alone(), client, uuid=uuid, order=[order], options=Options(report=False, cache=None))
        clocks = tuple(dice.choice((1980, 1500, 1200)) for _ in order)
        with client.lease([uuid], sm_clock_mhz=(None, 1980), reason="benchmark") as lease:
            beats = lease.arm(ClockPlan("benchmark", uuid, clocks, None, iteration_s=60.0))
            conductor._expected, conductor._length, conductor._beats, conductor._send = order, len(order), beats, beats.send
            for step in range(2 * steps):
                apart = step < steps  # then the same again, one right after another
                begin_s, end_s, busy_s = found[apart]
                conductor.step_begin()
                for stage, kind, microbatch in order:
                    time.sleep(dice.uniform(0.002, 0.006) if apart else 0.0)
                    cpu = time.thread_time()
                    before = time.perf_counter()
                    conductor.begin(stage, kind, microbatch)
                    between = time.perf_counter()
                    conductor.end(stage, kind, microbatch)
                    end_s.append(time.perf_counter() - between)
                    begin_s.append(between - before)
                    busy_s.append(time.thread_time() - cpu)
                conductor._step += 1  # what step_end does, without its talk
                progress((step + 1) / (2 * steps))
            dropped = beats.dropped
        conductor.close()
    for apart, words in ((True, "2-6 ms apart"), (False, "one right after another")):
        begin_s, end_s, busy_s = found[apart]
        for name, times in (("begin", begin_s), ("end, the next one's beat sent", end_s)):
            report.add(f"{words}: {name}, p50", 1e6 * percentile(times, 0.5), "us", "< 10")
            report.add(f"{words}: {name}, p99", 1e6 * percentile(times, 0.99), "us")
        report.add(f"{words}: both, CPU time of the training thread, p50", 1e6 * percentile(busy_s, 0.5), "us")
    report.add("beats dropped", dropped, "")
    report.notes.append(f"{steps * len(order)} instructions each; a look at the simulated node's clock is in all of them.")
