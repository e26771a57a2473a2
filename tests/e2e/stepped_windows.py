"""Energy windows over HTTP on a stepped node: the campaign of test_stepped, run as a client's process of its own.

House rules: everything that waits is on the node's clock; the truth is read at the very instants of the requests, because stepped
time stands still during an exchange; one seed gives one answer.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial

from powerd.client import Client
from powerd.clock import NS, Waiter, from_environment
from powerd.sim.node import attach
from powerd.sim.workload import Context

AT_ONCE = 4  # windows that are open on each GPU
KERNELS = ("gemm", "prefill", "decode", "mixed")


def main() -> None:
    """``WINDOWS SEED BEGIN_NS``: a JSON list of [GPU, seconds, true J, J, low J, high J], by GPU and beginning."""
    windows, seed, begin_ns = (int(word) for word in sys.argv[1:4])
    client, clock, found = Client(timeout_s=60), from_environment(), []
    over = threading.Event()
    with attach() as node:
        gpus = sorted((c.gpu.index, c.gpu.uuid) for c in client.node().gpus)

        def measure(gpu: int, uuid: str, number: int, count: int, waiter: Waiter) -> None:
            rng = random.Random(f"{seed} window {gpu} {number}")
            waiter.wait_until(begin_ns + 2 * NS)
            for _ in range(count):
                waiter.wait_until(clock.now_ns() + round(rng.uniform(0.1, 5) * NS))
                before_mj, before_ns = node.true_energy_mj(gpu), clock.now_ns()
                window = client.energy("campaign", [uuid]).begin()
                waiter.wait_until(clock.now_ns() + round(rng.uniform(2, 30) * NS))
                after_mj, after_ns = node.true_energy_mj(gpu), clock.now_ns()
                view = window.end().view
                assert view is not None
                assert (view.begin_ns, view.end_ns) == (before_ns, after_ns), "time moved during an exchange"
                (figure,) = view.figures
                found.append([gpu, before_ns, (after_ns - before_ns) / NS, (after_mj - before_mj) / 1000,
                              figure.energy_j, figure.low_j, figure.high_j])  # fmt: skip

        def work(gpu: int, waiter: Waiter) -> None:
            rng = random.Random(f"{seed} load {gpu}")
            waiter.wait_until(begin_ns)
            with Context(gpu, node=node) as context:
                while not over.is_set():
                    what, seconds = rng.choice(("idle", "blocked", "load", "load", "load")), rng.uniform(0.3, 12)
                    if what == "load":
                        context.load(rng.uniform(0.3, 1.0), seconds, rng.choice(KERNELS))
                    elif what == "blocked":
                        context.blocked(seconds / 4)
                    else:
                        waiter.wait_until(clock.now_ns() + round(seconds * NS))

        def start(action: Callable[[Waiter], None], name: str) -> threading.Thread:
            waiter = clock.waiter(name)  # joined before anybody is told, so that time cannot run ahead of it

            def body() -> None:
                try:
                    action(waiter)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                waiter.close()

            thread = threading.Thread(target=body)
            thread.start()
            return thread

        share, more = divmod(windows, AT_ONCE * len(gpus))
        loads = [start(partial(work, gpu), "load") for gpu, _ in gpus]
        measurers = [
            start(partial(measure, gpu, uuid, number, share + (number * len(gpus) + gpu < more)), "window")
            for gpu, uuid in gpus
            for number in range(AT_ONCE)
        ]
        print("ready", flush=True)
        for thread in measurers:
            thread.join()
        over.set()
        print(json.dumps([[row[0], *row[2:]] for row in sorted(found)]), flush=True)
        for thread in loads:
            thread.join()


if __name__ == "__main__":
    main()
