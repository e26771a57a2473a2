"""The client of the demonstration: one lease on all GPUs, one energy window per clock; it is killed in the end.

House rules: it uses nothing but powerd.client; it measures nothing itself.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict

from powerd.client import Client
from powerd.demo.children import say
from powerd.sweep import verdict_of

SETTLE_S = 0.3  # of the node's time: the driver takes milliseconds


def main() -> None:
    """Commands on stdin: ``clock MHZ`` and ``measure SECONDS``; the first clock acquires the lease."""
    client = Client(timeout_s=20)
    scale = client.time_scale() or 1.0
    lease = None
    for line in sys.stdin:
        word, _, value = line.strip().partition(" ")
        if word == "clock" and lease is None:
            lease = client.lease("all", sm_clock_mhz=int(value), reason="energy-time sweep", job="demo", min_dwell_s=0.0)
        elif word == "clock" and lease is not None:
            lease.change(sm_clock_mhz=int(value), wait_s=0.5)
        elif lease is not None:
            window = client.energy("demo", "all", job="demo").begin()
            time.sleep(float(value) / scale)
            view = window.end().view
            say(
                begin_ns=view.begin_ns if view else 0, end_ns=view.end_ns if view else 0,
                verdict=verdict_of(client.lease_view(lease.id).outcomes),
                figures=[asdict(f) for f in window.figures],
            )  # fmt: skip
            continue
        time.sleep(SETTLE_S / scale)
        say(clock_mhz=int(value), held=lease is not None and lease.held)


if __name__ == "__main__":
    main()
