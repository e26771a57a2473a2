"""The benchmarks themselves; each is a function that fills a report and tells its progress."""

from __future__ import annotations

import sqlite3
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks import energy as energy_windows
from benchmarks import spans as energy_spans
from benchmarks.autoscaler import autoscaler
from benchmarks.beats import beats
from benchmarks.clock_search import search_clocks
from benchmarks.cluster import cluster
from benchmarks.daemon import Client, running
from benchmarks.host import host, savings
from benchmarks.influx import influx
from benchmarks.instructions import instructions
from benchmarks.report import Progress, Report, percentile
from powerd.clock import NS, RealClock
from powerd.config import StoreConfig
from powerd.model import Health, Reading, Snapshot
from powerd.sinks.columns import COLUMNS
from powerd.sinks.metrics import Metrics
from powerd.sinks.store import Store
from powerd.windows import EnergyWindows

GPUS = 8
_UUIDS = tuple(f"GPU-00000000-0000-0000-0000-{n:012d}" for n in range(GPUS))


def energy(report: Report, progress: Progress) -> None:
    """1,000 windows of 2-30 s against the truth, on two models."""
    report.title, report.simulated = "1,000 energy windows of 2-30 s at random phase and load, stepped", True
    for number, model in enumerate(("a100-sxm-500w", "h100-sxm")):
        setup = energy_windows.Setup(model, 500, seed=number + 1)
        scored = energy_windows.campaign(setup, lambda share, n=number: progress((n + share) / 2))  # type: ignore[misc]
        figures = energy_windows.summary(scored)
        promised = {"covered_percent": ">= 95", "mean_abs_error_from_10_s_percent": "<= 1"}
        for key, value in figures.items():
            words = key.removesuffix("_percent").replace("_", " ")
            report.add(f"{model}: {words}", value, "%" if key.endswith("percent") else "", promised.get(key, ""))
    report.notes.append("The interval holds an allowance of 1 % for the counter's calibration, which a simulator cannot show.")


def spans(report: Report, progress: Progress) -> None:
    """Labels of a pipeline stage's instructions against the truth."""
    report.title, report.simulated = "energy spans: three labels and the bubbles between them, stepped", True
    for number, (title, setup) in enumerate(energy_spans.SETUPS.items()):
        figures = energy_spans.summary(energy_spans.campaign(setup))
        promised = {"covered_percent": ">= 93"}
        if number == 0:
            promised["worst_error_percent"] = "<= 1.5"
        for key, value in figures.items():
            words = key.removesuffix("_percent").replace("_", " ")
            report.add(f"{title}: {words}", value, "%" if key.endswith("percent") else "", promised.get(key, ""))
        progress((number + 1) / len(energy_spans.SETUPS))
    report.notes.append("The interval holds an allowance of 1 % for the counter's calibration, which a simulator cannot show.")


def _median_ms(values: list[float]) -> float:
    return 1000 * statistics.median(values)


def overhead(report: Report, progress: Progress, seconds: float = 40.0) -> None:
    """CPU and memory of all processes of both units."""
    report.title, report.simulated = f"{GPUS} GPUs at 10 Hz with store and /metrics", True
    with running(gpus=GPUS) as daemon:
        client = daemon.client()
        warm_up = 8.0
        time.sleep(warm_up)
        before = {p.pid: p.cpu_times() for p in daemon.processes()}
        begin = time.monotonic()
        while (spent := time.monotonic() - begin) < seconds:
            client.raw("GET", "/metrics")
            progress(spent / seconds)
            time.sleep(min(5.0, max(0.1, seconds - spent)))
        spent = time.monotonic() - begin
        processes = daemon.processes()
        rss = pss = total = 0.0
        names: list[str] = []
        for process in processes:
            used, old = process.cpu_times(), before.get(process.pid)
            cpu = used.user + used.system - ((old.user + old.system) if old else 0.0)
            memory = process.memory_full_info()
            total, rss, pss = total + cpu, rss + memory.rss, pss + memory.pss
            role = _role(process)
            names.append(role)
            report.add(f"{role}: CPU", 100 * cpu / spent, "% of one core")
            report.add(f"{role}: RSS", memory.rss / 2**20, "MiB")
        report.add("all processes: CPU", 100 * total / spent, "% of one core", "< 2")
        report.add("all processes: RSS", rss / 1e6, "MB", "< 120")
        report.add("all processes: PSS (shared pages counted once)", pss / 1e6, "MB")
    report.notes.append(f"{spent:.0f} s after {warm_up:.0f} s of warm-up; every GPU busy; /metrics scraped every 5 s; no Influx.")
    report.notes.append("The simulated driver's own physics runs inside powerd-hw and is counted.")


def _role(process: psutil.Process) -> str:
    words = process.cmdline()
    if "powerd.main" in words:
        return "powerd"
    return f"powerd-hw {'worker' if any('worker' in w for w in words) else 'supervisor'} ({process.pid})"


def snapshot(report: Report, progress: Progress, requests: int = 3000) -> None:
    """GET /v1/snapshot over the Unix socket with keep-alive."""
    report.title, report.simulated = f"GET /v1/snapshot of {GPUS} GPUs over the Unix socket, one connection kept alive", True
    with running(gpus=GPUS) as daemon:
        client = daemon.client()
        for _ in range(200):
            client.raw("GET", "/v1/snapshot")
        took = []
        size = 0
        for number in range(requests):
            begin = time.perf_counter()
            size = len(client.raw("GET", "/v1/snapshot"))
            took.append(time.perf_counter() - begin)
            progress(number / requests)
        progress(1.0)
    report.add("p50", _median_ms(took), "ms", "< 1")
    report.add("p99", 1000 * percentile(took, 0.99), "ms")
    report.add("answer", size, "bytes")
    report.notes.append(f"{requests} requests by the standard library's http.client, its time included, while sampling goes on.")


def set_latency(report: Report, progress: Progress, rounds: int = 60) -> None:
    """From a request to the driver and back."""
    report.title, report.simulated = "one setting of one GPU changed through its lease, the daemon otherwise idle,", True
    with running(gpus=GPUS) as daemon:
        client = daemon.client()
        limits = _changes(client, daemon, "power_limit", (450_000, 600_000), rounds, lambda s: progress(s / 2))
        clocks = _changes(client, daemon, "sm_clock", (1200, 1500), rounds, lambda s: progress(0.5 + s / 2))
    progress(1.0)
    for name, found, end in (
        ("limits: request -> read back", limits, "verified"),
        ("clocks: request -> driver call returned", clocks, "returned"),
    ):
        driver = [f["driver"] for f in found]
        total = [f[end] for f in found]
        report.add(f"{name}, p50", _median_ms(total), "ms", "< driver + 5")
        report.add(f"{name}, p99", 1000 * percentile(total, 0.99), "ms")
        report.add(f"{name.split(':')[0]}: driver call itself, p50", _median_ms(driver), "ms")
        own = [t - d for t, d in zip(total, driver, strict=True)]
        report.add(f"{name.split(':')[0]}: powerd's own part, p50", _median_ms(own), "ms", "< 5")
        report.add(f"{name.split(':')[0]}: answer at the client, p50", _median_ms([f["client"] for f in found]), "ms")
    confirmed = [f["verified"] for f in clocks if f["verified"] > 0]
    if confirmed:
        report.add("clocks: request -> first confirming sample, p50", _median_ms(confirmed), "ms")
        report.add("clocks: request -> first confirming sample, p99", 1000 * percentile(confirmed, 0.99), "ms")
    report.notes.append(f"{rounds} changes each, up and down in turn, GPU under load, driver latency injected by the simulator.")
    report.notes.append(
        "The driver call is from entering NVML to its return, stamped by powerd-hw; the limit's read back comes on top."
    )


def _changes(
    client: Client, daemon: Any, control: str, values: tuple[int, int], rounds: int, progress: Progress
) -> list[dict[str, float]]:
    uuid = daemon.uuids[0]

    def want(value: int) -> dict[str, object]:
        return {"wants": [{"control": control, "low": value, "high": value}], "wait_s": 2.0}

    request = {"gpus": [uuid], "reason": "benchmark", "detached": True, "ttl_s": 600.0, "min_dwell_s": 0.0, **want(values[1])}
    lease = client.call("POST", "/v1/leases", request)
    found = []
    for number in range(rounds):
        value = values[number % 2]
        asked_ns, begin = daemon.node.now_ns(), time.perf_counter()
        answer = client.call("PATCH", f"/v1/leases/{lease['id']}", want(value), lease["token"])
        took = time.perf_counter() - begin
        outcome = _outcome(client, uuid, control, asked_ns) or next(o for o in answer["outcomes"] if o["control"] == control)
        found.append(
            {
                "client": took,
                "driver": (outcome["returned_ns"] - outcome["called_ns"]) / NS,
                "returned": (outcome["returned_ns"] - asked_ns) / NS,
                "verified": (outcome["verified_ns"] - asked_ns) / NS,
            }
        )
        progress(number / rounds)
        time.sleep(0.03 + 0.01 * (number % 7))  # at every phase of the sampling
    client.call("DELETE", f"/v1/leases/{lease['id']}", token=lease["token"])
    return found


def _outcome(client: Client, uuid: str, control: str, asked_ns: int) -> Any:
    """The final outcome of a change: verified, or none within a second."""
    for _ in range(40):
        explain = client.call("GET", f"/v1/explain/{uuid}")
        outcome = next(c["outcome"] for c in explain["controls"] if c["control"] == control)
        if outcome and outcome["called_ns"] >= asked_ns and outcome["verified_ns"] >= asked_ns:
            return outcome
        time.sleep(0.025)
    return None


def _snapshots(count: int, begin_ns: int = 1_800_000_000 * NS) -> list[Snapshot]:
    made = []
    for number in range(count):
        at = begin_ns + number * NS // 10
        readings = tuple(
            Reading(
                uuid, at, Health.UP, 1, number * 40_000 + gpu, at, 400_000 + number % 977, 399_000, 1410 - number % 5, 1593, 60,
                97, 2 << 30, 80 << 30, 500_000, 500_000, 4,
            )
            for gpu, uuid in enumerate(_UUIDS)
        )  # fmt: skip
        made.append(Snapshot(number, at, at, readings))
    return made


def store(report: Report, progress: Progress) -> None:
    """Rows in, history out."""
    report.title = f"the embedded store with {GPUS} GPUs"
    with tempfile.TemporaryDirectory(prefix="pb-") as folder:
        path = Path(folder) / "history.sqlite"
        snapshots = _snapshots(36_000)  # an hour at 10 Hz
        one = Store(path, StoreConfig(), RealClock())
        begin, cpu = time.perf_counter(), time.process_time()
        for number, item in enumerate(snapshots):
            one.append(item)
            while one.stats().backlog > 2000:
                time.sleep(0.001)
            if number % 1000 == 0:
                progress(0.5 * number / len(snapshots))
        one.close()
        took, cpu, rows = time.perf_counter() - begin, time.process_time() - cpu, one.stats().rows
        report.add("rows in (8 GPUs, 10 Hz folded to 1 Hz)", rows / took, "rows/s")
        report.add("CPU a row, all threads", 1e6 * cpu / rows, "us")
        report.add("file", one.stats().size_bytes / rows, "bytes/row")
        report.add("dropped", one.stats().dropped, "snapshots")
        minutes = _month(path)
        one = Store(path, StoreConfig(), RealClock())
        now = snapshots[-1].wall_ns / NS
        for name, hours, points in (("1 h", 1.0, 500), ("24 h", 24.0, 500), ("7 d", 168.0, 1000), ("30 d", 720.0, 1000)):
            times = []
            for _ in range(5):
                begin = time.perf_counter()
                view = one.history(_UUIDS, now - hours * 3600, now, points, ["power_mw", "energy_mj", "sm_clock_mhz"])
                times.append(time.perf_counter() - begin)
            found = sum(len(s.time_s) for s in view.series)
            report.add(f"history of {name}, 8 GPUs, 3 columns: {found} values from {view.table}", _median_ms(times), "ms")
        one.close()
        progress(1.0)
    report.notes.append(f"The file holds an hour of 1 Hz rows and {minutes} roll-up rows (30 days of minutes).")


def _month(path: Path) -> int:
    """30 days of minutes, and their hours, written straight into the file."""
    columns = [name for column in COLUMNS for name in column.stored()]
    values = [4_000 if name.endswith(("sum", "min", "max")) else 1 for name in columns]
    end = 1_800_000_000
    written = 0
    with sqlite3.connect(path) as connection:
        for table, step in (("r60", 60), ("r3600", 3600)):
            rows = [
                (gpu, ts, *values) for gpu in range(1, GPUS + 1) for ts in range(end - 30 * 86_400, end, step)
            ]  # fmt: skip
            connection.executemany(f"INSERT OR IGNORE INTO {table} VALUES (?, ?{', ?' * len(columns)})", rows)  # noqa: S608
            written += len(rows)
    return written


def sinks(report: Report, progress: Progress, seconds: float = 30.0) -> None:
    """What listening to samples costs the daemon."""
    report.title = f"windows, store and metrics listening to {GPUS} GPUs at 10 Hz"
    snapshots = _snapshots(round(10 * seconds))
    with tempfile.TemporaryDirectory(prefix="pb-") as folder:
        clock = RealClock()
        windows, metrics, one = EnergyWindows(clock, NS // 10), Metrics(), Store(Path(folder) / "s.sqlite", StoreConfig(), clock)
        windows.observe(snapshots[0])
        open_windows = [windows.begin(_UUIDS) for _ in range(20)]
        pause = threading.Event()
        cpu, begin = time.process_time(), time.monotonic()
        own = 0.0
        for number, item in enumerate(snapshots):
            thread = time.thread_time()
            windows.observe(item)
            metrics.observe(item)
            one.append(item)
            own += time.thread_time() - thread
            pause.wait(max(0.0, begin + (number + 1) / 10 - time.monotonic()))
            progress(number / len(snapshots))
        spent, total = time.monotonic() - begin, time.process_time() - cpu
        one.close()
        progress(1.0)
    report.add("in the daemon's loop (observe, observe, append)", 100 * own / spent, "% of one core")
    report.add("with the store's thread, and this benchmark's own loop", 100 * total / spent, "% of one core", "< 0.25")
    report.notes.append(f"{spent:.0f} s in real time with {len(open_windows)} open energy windows over all GPUs.")


CASES = {
    "overhead": overhead,
    "snapshot": snapshot,
    "set": set_latency,
    "store": store,
    "sinks": sinks,
    "influx": influx,
    "energy": energy,
    "spans": spans,
    "search": search_clocks,
    "beats": beats,
    "instructions": instructions,
    "host": host,
    "savings": savings,
    "autoscaler": autoscaler,
    "cluster": cluster,
}
