"""A process that feeds a real InfluxSink known points and may be killed at any moment: FOLDER TICKS EVENT_AT.

House rules: what is on disk is noted in FOLDER/progress only afterwards, so a new process goes on where the last one was sure;
every point's time and values follow from its number, so sending one twice changes nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from powerd import config as configuration
from powerd.clock import NS, RealClock
from powerd.model import Event, Health, Reading, Snapshot
from powerd.sinks import delivery
from powerd.sinks.influx import InfluxSink
from powerd.sinks.influxsetup import read_token

GPUS = 8
CHUNK = 64  # ticks between two notes of progress
T0_NS = 1_790_000_000 * NS


def snapshot(tick: int) -> Snapshot:
    """The readings of one second: energy counts the points themselves, so that sums show what is missing or double."""
    wall_ns = T0_NS + tick * NS
    readings = tuple(
        Reading(
            f"GPU-00000000-0000-0000-0000-{gpu:012d}", wall_ns, Health.UP, 1, energy_mj=1000 * (tick * GPUS + gpu),
            power_mw=100_000 + tick, sm_clock_mhz=1410, temperature_c=50, clock_event_reasons=4,
        )
        for gpu in range(GPUS)
    )  # fmt: skip
    return Snapshot(tick, wall_ns, wall_ns, readings)


def main() -> None:
    """Feed until all ticks are on disk, then wait until all have arrived."""
    folder, ticks, event_at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    delivery._FIRST_WAIT_S, delivery._LONGEST_WAIT_S = 0.2, 1.0  # a test is shorter than an outage
    config = configuration.load(folder / "powerd.toml").influx
    sink = InfluxSink(config, folder / "spool.sqlite", RealClock(), "node1", 1.0, lambda: read_token(config))
    sink.start()
    progress = folder / "progress"
    tick = int(progress.read_text()) if progress.exists() else 0
    fed = 0
    while tick < ticks:
        for _ in range(CHUNK):
            sink.append(snapshot(tick))
            fed += GPUS
            if tick == event_at:
                sink.append_event(Event(7, 0, T0_NS, "poison", detail="the bucket has another type for one of its fields"))
                fed += 1
            tick += 1
        while sink.spooled < fed:
            time.sleep(0.005)
        new = folder / "progress.new"
        new.write_text(str(tick))
        os.replace(new, progress)
        time.sleep(0.15)
    while sink.stats().spool_points:
        time.sleep(0.02)
    stats = sink.stats()
    sink.close()
    print(json.dumps({"lines": stats.lines, "dropped": stats.dropped, "errors": stats.errors}))


if __name__ == "__main__":
    main()
