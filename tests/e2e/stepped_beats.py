"""Clock plans over the real client on a stepped node: one process, one thread per GPU, everything on the node's clock.

House rules: what is in force is read in the node itself; a closed socket with beats under way must not hold time.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback

from powerd.client import Client
from powerd.clock import NS, Waiter, from_environment
from powerd.model import ClockPlan
from powerd.sim.node import attach

CLOCKS = (1410, 1200, 900, 705)
SAFE = 1005
PERIOD_NS = NS // 50
STEPS = 25


def main() -> None:
    """``BEGIN_NS``: a JSON object GPU -> [[simulated ns since the beat, MHz asked, MHz locked], ...] with what came after."""
    begin_ns = int(sys.argv[1])
    client, clock = Client(timeout_s=60), from_environment()
    found: dict[int, list[object]] = {}
    with attach() as node:
        gpus = sorted((c.gpu.index, c.gpu.uuid) for c in client.node().gpus)

        def locked(gpu: int) -> int:
            return int(node.view(gpu).lock_max_mhz)

        def train(gpu: int, uuid: str, waiter: Waiter) -> None:
            rows = found.setdefault(gpu, [])
            waiter.wait_until(begin_ns)
            with client.lease([uuid], sm_clock_mhz=(None, 1410), reason="stepped", ttl_s=600) as lease:
                beats = lease.arm(ClockPlan(f"p{gpu}", uuid, CLOCKS, SAFE, iteration_s=PERIOD_NS * len(CLOCKS) / NS))
                first_ns = begin_ns + NS + gpu * PERIOD_NS // 8
                for number in range(STEPS * len(CLOCKS)):
                    step, index = divmod(number, len(CLOCKS))
                    at_ns = first_ns + number * PERIOD_NS
                    waiter.wait_until(at_ns)
                    beats.send(step, index)
                    waiter.wait_until(at_ns + 1)
                    rows.append([clock.now_ns() - at_ns, CLOCKS[index], locked(gpu)])
                last_ns = clock.now_ns() - 1
                late_ns = last_ns + 2 * PERIOD_NS * len(CLOCKS)
                waiter.wait_until(late_ns - 1)
                rows.append(["before it is late", CLOCKS[-1], locked(gpu)])
                waiter.wait_until(late_ns + 1)
                rows.append(["late", SAFE, locked(gpu)])
                beats.send(STEPS, 0)
                for index in range(1, 200):
                    beats.send(STEPS, index)
                beats.close()
                waiter.wait_until(clock.now_ns() + NS)
                rows.append(["closed", 1410, locked(gpu)])
            waiter.wait_until(clock.now_ns() + NS)
            rows.append(["released", 0, locked(gpu)])

        def start(gpu: int, uuid: str) -> threading.Thread:
            waiter = clock.waiter(f"train {gpu}")

            def body() -> None:
                try:
                    train(gpu, uuid, waiter)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                waiter.close()

            thread = threading.Thread(target=body)
            thread.start()
            return thread

        threads = [start(gpu, uuid) for gpu, uuid in gpus]
        print("ready", flush=True)
        for thread in threads:
            thread.join()
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
