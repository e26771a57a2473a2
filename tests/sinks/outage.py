"""A sink through an outage, second by second in stepped time, telling its memory: URL FOLDER HOURS SPOOL_MIB.

House rules: stepped means that a second is over once its points are on disk; the sending thread really tries all the while,
far more often than it would; after the line that tells the outage's end, it waits until everything has arrived.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
from pathlib import Path

import psutil

from powerd.clock import NS, RealClock
from powerd.config import InfluxConfig
from powerd.model import Health, Reading, Snapshot
from powerd.sinks import delivery
from powerd.sinks.influx import InfluxSink

GPUS = 8
T0_NS = 1_790_000_000 * NS
WARM_UP = 0.25  # of the time, in which caches fill


class SteppedClock(RealClock):
    """Wall time as the test steps it."""

    now = T0_NS

    def wall_ns(self) -> int:
        return self.now


def snapshot(second: int) -> Snapshot:
    """All that a GPU can tell, never the same twice."""
    wall_ns = T0_NS + second * NS
    return Snapshot(
        second, wall_ns, wall_ns,
        tuple(
            Reading(
                f"GPU-00000000-0000-0000-0000-{gpu:012d}", wall_ns, Health.UP, 1, energy_mj=300_000 * second + gpu,
                power_mw=200_000 + second * 7919 % 100_000, power_average_mw=200_000 + second * 104_729 % 90_000,
                sm_clock_mhz=900 + second % 500, memory_clock_mhz=1593, temperature_c=40 + second % 40,
                utilization_percent=second % 101, memory_used_bytes=second << 20, memory_total_bytes=80 << 30,
                power_limit_requested_mw=400_000, power_limit_enforced_mw=400_000, clock_event_reasons=1 << second % 8,
            )
            for gpu in range(GPUS)
        ),
    )  # fmt: skip


def main() -> None:
    """Tell memory and counts at the end of the outage, and counts once everything has arrived."""
    url, folder, hours, spool_mib = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    delivery._FIRST_WAIT_S, delivery._LONGEST_WAIT_S = 0.02, 0.1
    clock = SteppedClock()
    config = InfluxConfig(url=url, org="o", bucket="b", spool_max_mib=spool_mib)
    sink = InfluxSink(config, folder / "spool.sqlite", clock, "node1", 1.0, lambda: "token")
    sink.delivery.start()
    seconds = round(hours * 3600)
    process = psutil.Process()
    begin = peak_spool = 0
    for second in range(seconds):
        clock.now = T0_NS + second * NS
        sink.append(snapshot(second))
        sink.tick()
        peak_spool = max(peak_spool, sink.stats().spool_bytes)
        if second == int(seconds * WARM_UP):
            gc.collect()
            begin = process.memory_info().rss
    gc.collect()
    stats = sink.stats()
    grown = process.memory_info().rss - begin
    told = {
        "grown_mib": grown / 2**20, "span_h": hours * (1 - WARM_UP), "points": stats.spool_points,
        "dropped": stats.dropped["bounds"], "errors": sum(stats.errors.values()), "peak_spool": peak_spool,
        "file": (folder / "spool.sqlite").stat().st_size,
        "lag_s": stats.lag_s,
    }  # fmt: skip
    print(json.dumps(told), flush=True)
    while sink.stats().spool_points:
        threading.Event().wait(0.02)
    sink.delivery.finish(sink.delivery.last_call(5.0))
    print(json.dumps({"lines": sink.stats().lines}), flush=True)
    sink.spool.close()


if __name__ == "__main__":
    main()
