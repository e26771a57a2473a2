"""The InfluxDB sink: how fast it drains after an outage beside influxdb-client alone, and what it costs all the time.

House rules: a real server (VictoriaMetrics, unmodified) takes everything; both sides send the very same lines in the same run, in
turns; the faster of the two ways to feed influxdb-client is the one to be compared with.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.report import Progress, Report
from powerd.clock import NS, RealClock
from powerd.config import InfluxConfig
from powerd.model import Health, Reading, Snapshot
from powerd.sinks.delivery import Delivery
from powerd.sinks.influx import InfluxSink
from powerd.sinks.lines import line
from powerd.sinks.spool import Spool

GPUS, FIELDS, BATCH, HZ = 8, 20, 5000, 10
_BUCKET = "benchmark"


def influx(report: Report, progress: Progress, points: int = 200_000, rounds: int = 5, seconds: float = 30.0) -> None:
    """Drain after an outage, and the CPU of writing all the time."""
    from tests.real.servers import VictoriaMetrics

    report.title = f"InfluxDB sink, {FIELDS} fields a point, batches of {BATCH}, into VictoriaMetrics on the same machine"
    with tempfile.TemporaryDirectory(prefix="pb-") as name:
        folder = Path(name)
        server = VictoriaMetrics(folder / "vm")
        server.start()
        try:
            config = InfluxConfig(url=server.url, org="o", bucket=_BUCKET, sample_hz=HZ, batch_lines=BATCH)
            lines = _lines(points)
            _client_alone(config, lines[: 4 * BATCH], joined=True)  # the series exist from here on
            ways: dict[str, Callable[[], float]] = {
                "influxdb-client, list of lines": lambda: _client_alone(config, lines, joined=False),
                "influxdb-client, joined lines": lambda: _client_alone(config, lines, joined=True),
                "powerd's drain": lambda: _drain(config, lines, folder),
            }
            rates: dict[str, list[float]] = {way: [] for way in ways}
            for number in range(rounds):
                for way, run in ways.items():
                    rates[way].append(points / run())
                progress(0.7 * (number + 1) / rounds)
            middle = {way: statistics.median(found) for way, found in rates.items()}
            for way, rate in middle.items():
                report.add(f"{way}", rate, "points/s")
            alone = max(rate for way, rate in middle.items() if not way.startswith("powerd"))
            report.add("drain / the faster of the two", middle["powerd's drain"] / alone, "", ">= 0.8")
            loop, whole = _steady(config, folder, seconds)
            report.add(f"steady {GPUS} GPUs at {HZ} Hz: in the daemon's loop", 100 * loop, "% of one core")
            report.add(f"steady {GPUS} GPUs at {HZ} Hz: with both threads", 100 * whole, "% of one core", "< 1")
            assert server.invalid_rows() == 0, "the server could not read every line"
        finally:
            server.stop()
    progress(1.0)
    report.notes.append(
        f"{points} points a run, medians of {rounds} runs in turns; the spool holds one batch a second of the outage."
    )
    report.notes.append(
        f"Steady: {seconds:.0f} s in real time, one request a second; 24 fields a point (the gpu measurement's own)."
    )


def _uuid(gpu: int) -> str:
    return f"GPU-00000000-0000-0000-0000-{gpu:012d}"


def _lines(points: int) -> list[str]:
    made = []
    for number in range(points):
        tick, gpu = divmod(number, GPUS)
        fields = {f"f{n}": 100.0 + (tick * 7919 + n * 104_729) % 100_000 / 1000 for n in range(FIELDS)}
        made.append(line("benchmark", {"host": "node1", "uuid": _uuid(gpu)}, fields, 1_790_000_000_000 + tick * 1000 // HZ) or "")
    return made


def _client_alone(config: InfluxConfig, lines: Sequence[str], *, joined: bool) -> float:
    """Seconds that influxdb-client's synchronous writer takes."""
    from influxdb_client import InfluxDBClient, WritePrecision
    from influxdb_client.client.write_api import SYNCHRONOUS

    with InfluxDBClient(url=config.url, token="t", org=config.org, timeout=60_000) as client:  # noqa: S106 (of no account)
        writer = client.write_api(write_options=SYNCHRONOUS)
        begin = time.monotonic()
        for at in range(0, len(lines), BATCH):
            part = lines[at : at + BATCH]
            record = "\n".join(part).encode() if joined else part
            writer.write(bucket=config.bucket, record=record, write_precision=WritePrecision.MS)
        return time.monotonic() - begin


def _drain(config: InfluxConfig, lines: Sequence[str], folder: Path) -> float:
    """Seconds from the first request to the empty spool."""
    path = folder / "drain.sqlite"
    path.unlink(missing_ok=True)
    spool = Spool(path, 1 << 30, 1 << 62)
    second = GPUS * HZ
    for at in range(0, len(lines), second):
        spool.put(lines[at : at + second], time.time_ns())
    delivery = Delivery(config, spool, RealClock(), lambda: "t", lambda *_: None)
    begin = time.monotonic()
    delivery.start()
    while spool.stats().points:
        time.sleep(0.005)
    spent = time.monotonic() - begin
    delivery.finish(delivery.last_call(5.0))
    spool.close()
    assert delivery.lines == len(lines), delivery.errors
    return spent


def _steady(config: InfluxConfig, folder: Path, seconds: float) -> tuple[float, float]:
    """Cores in the thread that appends, and in the whole process."""
    sink = InfluxSink(config, folder / "steady.sqlite", RealClock(), "node1", HZ, lambda: "t")
    sink.start()
    pause = threading.Event()
    ticks = round(seconds * HZ)
    snapshots = [_snapshot(time.time_ns() + tick * NS // HZ, tick) for tick in range(ticks)]
    pause.wait(1.0)
    own, cpu, begin = 0.0, time.process_time(), time.monotonic()
    for tick, snapshot in enumerate(snapshots):
        before = time.thread_time()
        sink.append(snapshot)
        own += time.thread_time() - before
        pause.wait(max(0.0, begin + (tick + 1) / HZ - time.monotonic()))
    spent, used = time.monotonic() - begin, time.process_time() - cpu
    sink.close()
    stats = sink.stats()
    assert stats.lines == ticks * GPUS, stats
    return own / spent, used / spent


def _snapshot(wall_ns: int, tick: int) -> Snapshot:
    return Snapshot(
        tick, wall_ns, wall_ns,
        tuple(
            Reading(
                _uuid(gpu), wall_ns, Health.UP, 1, energy_mj=30_000 * tick, power_mw=200_000 + tick * 7919 % 100_000,
                power_average_mw=200_000 + tick, sm_clock_mhz=900 + tick % 500, memory_clock_mhz=1593,
                temperature_c=40 + tick % 40, utilization_percent=tick % 101, memory_used_bytes=tick << 20,
                memory_total_bytes=80 << 30, power_limit_requested_mw=400_000, power_limit_enforced_mw=400_000,
                clock_event_reasons=1 << tick % 8,
            )
            for gpu in range(GPUS)
        ),
    )  # fmt: skip
