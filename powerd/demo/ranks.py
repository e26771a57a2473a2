"""The measured job of the demonstration: one rank per GPU runs its pipeline stage and measures itself through powerd.

House rules: a rank holds a lease on its own GPU, sets a clock, and puts one energy window around whole microbatches; it uses
powerd.client as any training script would, and all waiting is on the node's clock, so that stepped time is exact.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import traceback
from dataclasses import asdict

from powerd.client import Client
from powerd.clock import NS, Clock, Waiter, from_environment
from powerd.demo.children import say
from powerd.demo.job import microbatches
from powerd.model import Gpu
from powerd.sim.node import SimNode, attach
from powerd.sim.workload import Context
from powerd.sweep import verdict_of

SETTLE_NS = 700_000_000  # of the node's time, from the request for a clock: the driver takes milliseconds
#: Every clock begins on a whole second, whatever the daemon's last answer waited for, and the ranks apart from each other: no two
#: requests share an instant, so that the order in which the daemon serves them, which is chance, is none of the result's.
APART_NS = 3_000_017


class Rank:
    """One GPU of the job."""

    def __init__(self, client: Client, clock: Clock, node: SimNode, gpu: Gpu) -> None:
        self._client, self._clock, self._node, self._gpu = client, clock, node, gpu

    def sweep(self, waiter: Waiter, begin_ns: int, clocks: list[int], seconds: float) -> None:
        """At every clock: settle, one microbatch to warm up, then a window around whole ones of at least ``seconds``."""
        waiter.wait_until(begin_ns + (self._gpu.index + 1) * APART_NS)
        context = Context(self._gpu.index, node=self._node, name="gpt3-stage")  # not before: a context takes power
        which = [self._gpu.uuid]
        with self._client.lease(
            which, sm_clock_mhz=clocks[0], reason="energy-time sweep", job="demo", min_dwell_s=0.0, wait_s=0.5
        ) as lease:
            for clock in clocks:
                asked_ns = waiter.wait_until((self._clock.now_ns() // NS + 1) * NS + (self._gpu.index + 1) * APART_NS)
                lease.change(sm_clock_mhz=clock, wait_s=0.5)
                waiter.wait_until(asked_ns + SETTLE_NS)
                one_s = context.run(microbatches(self._gpu.index, 1)).seconds
                count = math.ceil(seconds / one_s)
                window = self._client.energy(f"{clock} MHz", which, job="demo").begin()
                done = context.run(microbatches(self._gpu.index, count))
                verdict = verdict_of(self._client.lease_view(lease.id).outcomes)
                figure = window.end().figures[0]
                say(gpu=self._gpu.index, clock_mhz=clock, microbatches=count, seconds=done.seconds,
                    window_s=window.duration_s, figure=asdict(figure), verdict=verdict)  # fmt: skip


def main() -> None:
    """``GPUS BEGIN_NS SECONDS [MHZ, ...]``: sweeps these clocks from this moment on and ends."""
    gpus, begin_ns, seconds, clocks = (json.loads(word) for word in sys.argv[1:5])
    client, clock = Client(timeout_s=60), from_environment()
    with attach() as node:
        ranks = [Rank(client, clock, node, c.gpu) for c in client.node().gpus if c.gpu.index < gpus]
        # Joined before anybody is told, so that time cannot run ahead of us.
        waiters = [clock.waiter("rank") for _ in ranks]

        def run(rank: Rank, waiter: Waiter) -> None:
            try:
                rank.sweep(waiter, begin_ns, clocks, seconds)
            except Exception:
                traceback.print_exc()
                os._exit(1)
            waiter.close()

        threads = [threading.Thread(target=run, args=pair) for pair in zip(ranks, waiters, strict=True)]
        for thread in threads:
            thread.start()
        say(ready=True)
        for thread in threads:
            thread.join()
    say(done=True, now_ns=clock.now_ns())


if __name__ == "__main__":
    main()
