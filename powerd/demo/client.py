"""The client of the demonstration: one lease on all GPUs, one energy window per clock; then it holds a clock until it is killed.

House rules: it uses nothing but powerd.client; it measures nothing itself.
"""

from __future__ import annotations

import signal
import sys
import time

from powerd.client import Client
from powerd.demo.children import say
from powerd.sweep import verdict_of

SETTLE_S = 0.5  # of the node's time: the driver takes milliseconds, the job's present microbatches do not count anyway


def main() -> None:
    """``python -m powerd.demo.client SECONDS CLOCK...``; then a line with a clock on stdin makes it hold that."""
    seconds, clocks = float(sys.argv[1]), [int(word) for word in sys.argv[2:]]
    client = Client(timeout_s=20)
    scale = client.time_scale() or 1.0
    lease = client.lease("all", sm_clock_mhz=clocks[0], reason="energy-time sweep", job="demo", min_dwell_s=0.0)
    for clock in clocks:
        outcomes = lease.change(sm_clock_mhz=clock)
        time.sleep(SETTLE_S / scale)
        with client.energy(f"{clock} MHz", "all", job="demo") as window:
            time.sleep(seconds / scale)
        view = window.view
        say(
            clock_mhz=clock, verdict=verdict_of(outcomes),
            begin_ns=view.begin_ns if view else 0, end_ns=view.end_ns if view else 0,
            figures=[{"uuid": f.uuid, "energy_j": f.energy_j, "low_j": f.low_j, "high_j": f.high_j} for f in window.figures],
        )  # fmt: skip
    clock = int(sys.stdin.readline())
    lease.change(sm_clock_mhz=clock, wait_s=10)
    say(holding=clock, lease=lease.id)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
