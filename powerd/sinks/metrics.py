"""The Prometheus page: one table of metrics, one collector that reads it out.

House rules: a series that is not in METRICS does not exist; base units only (joule, watt, hertz, celsius, byte, second, ratio);
unknown is an absent series, only ``powerd_gpu_up`` stays, with 0; nothing is computed before somebody scrapes, except sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from powerd.clock import NS
from powerd.hw.plan import Beat
from powerd.model import (
    Capabilities,
    Control,
    Health,
    LeaseState,
    Reading,
    Restart,
    Snapshot,
    reason_names,
)
from powerd.records import HostLoad
from powerd.sinks import dcgm

if TYPE_CHECKING:
    from powerd.sinks.influx import InfluxStats

_LONGEST_STEP_NS = 5 * NS  # between two samples; more is a hole that counts for nobody


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table; counters are named without ``_total``, which the text format adds."""

    name: str
    kind: str  # counter, gauge, summary
    unit: str  # "" for ratios of things and for info
    labels: tuple[str, ...]
    help: str


_GPU = ("uuid", "gpu")
_POOL = ("pool", "tp")

METRICS: tuple[Metric, ...] = (
    Metric("powerd_build_info", "gauge", "", ("version", "simulated"), "Always 1; version, and whether the driver is simulated"),
    Metric("powerd_gpu_info", "gauge", "", (*_GPU, "name", "pci_bus_id", "driver_version"), "Always 1; who a GPU is"),
    Metric("powerd_gpu_up", "gauge", "", _GPU, "1 while the GPU answers, 0 when it is lost or wedged"),
    Metric("powerd_gpu_energy_joules", "counter", "joules", _GPU, "Energy since the driver was loaded; goes on across resets"),
    Metric("powerd_gpu_energy_epoch", "gauge", "", _GPU, "Rises when the GPU's own energy counter restarts"),
    Metric("powerd_gpu_power_watts", "gauge", "watts", _GPU, "Power as last read"),
    Metric("powerd_gpu_power_average_watts", "gauge", "watts", _GPU, "Power as the driver's own one-second average"),
    Metric("powerd_gpu_power_limit_watts", "gauge", "watts", (*_GPU, "kind"), "requested, enforced, default, minimum or maximum"),
    Metric("powerd_gpu_sm_clock_hertz", "gauge", "hertz", _GPU, "SM clock"),
    Metric("powerd_gpu_memory_clock_hertz", "gauge", "hertz", _GPU, "Memory clock"),
    Metric("powerd_gpu_temperature_celsius", "gauge", "celsius", _GPU, "GPU temperature"),
    Metric("powerd_gpu_utilization_ratio", "gauge", "ratio", _GPU, "Share of time in which a kernel ran"),
    Metric("powerd_gpu_memory_used_bytes", "gauge", "bytes", _GPU, "Memory in use"),
    Metric("powerd_gpu_memory_size_bytes", "gauge", "bytes", _GPU, "Memory of the GPU"),
    Metric("powerd_gpu_sm_clock_lock_hertz", "gauge", "hertz", (*_GPU, "bound"), "SM clock lock in force: minimum, maximum"),
    Metric("powerd_gpu_set_by", "gauge", "", (*_GPU, "control", "class", "holder"), "1 for what is not at baseline: who set it"),
    Metric("powerd_gpu_clock_event_seconds", "counter", "seconds", (*_GPU, "reason"), "Time with this clock event reason set"),
    Metric("powerd_gpu_sample_age_seconds", "gauge", "seconds", _GPU, "Age of the newest reading"),
    Metric("powerd_snapshots", "counter", "", (), "Snapshots received from powerd-hw"),
    Metric("powerd_hw_connected", "gauge", "", (), "1 while powerd-hw is connected"),
    Metric("powerd_control_enabled", "gauge", "", (), "1 when powerd may set anything"),
    Metric("powerd_panic", "gauge", "", (), "1 while panic keeps every GPU at baseline"),
    Metric("powerd_config_last_reload_successful", "gauge", "", (), "1 when the configuration file as it stands is in force"),
    Metric("powerd_lease_active", "gauge", "", (), "Leases that are active now"),
    Metric("powerd_leases", "gauge", "", ("state",), "Leases by state"),
    Metric("powerd_user_leases", "gauge", "", ("user",), "Leases that have not ended, by user"),
    Metric("powerd_plans_armed", "gauge", "", (), "Clock plans that are armed"),
    Metric("powerd_plan_beats", "counter", "", ("verdict",), "Beats: begin, next, asked, wrong, ignored, late, closed"),
    Metric("powerd_plan_switches", "counter", "", (), "Clocks that clock plans have set"),
    Metric("powerd_restore", "counter", "", ("cause",), "Settings put back to baseline, by cause"),
    Metric("powerd_drift", "counter", "", ("control",), "Settings that somebody else changed, by control"),
    Metric("powerd_energy_windows_open", "gauge", "", (), "Open energy windows"),
    Metric("powerd_jobs", "gauge", "", ("state",), "Training jobs that report themselves, by state"),
    Metric("powerd_job_steps", "counter", "", (), "Training steps that jobs reported since powerd started"),
    Metric("powerd_job_lost_steps", "counter", "", (), "Steps among them that a restore rolled back"),
    Metric("powerd_job_energy_joules", "counter", "joules", (), "Energy that jobs reported for their steps and checkpoints"),
    Metric("powerd_training_energy_joules", "counter", "joules", ("job_name",), "Energy that a job reported to this node"),
    Metric("powerd_training_steps", "counter", "", ("job_name",), "Steps that a job reported to this node, lost ones too"),
    Metric("powerd_training_step_energy_joules", "gauge", "joules", ("job_name",), "Energy per step that was not lost"),
    Metric("powerd_training_step_seconds", "gauge", "seconds", ("job_name",), "Median time of a job's newest steps"),
    Metric("powerd_training_saving_ratio", "gauge", "ratio", ("job_name",), "Energy saved against its own baseline steps"),
    Metric("powerd_job_gpu", "gauge", "", ("job", "uuid"), "Always 1; a GPU of a running job, to join with the GPU's energy"),
    Metric("powerd_pool_replicas", "gauge", "", _POOL, "Inference replicas on this node, by pool and tensor parallelism"),
    Metric("powerd_pool_requests_running", "gauge", "", _POOL, "Requests that they compute, of those whose metrics are fresh"),
    Metric("powerd_pool_requests_waiting", "gauge", "", _POOL, "Requests that wait at them, likewise"),
    Metric("powerd_pool_ttft_p99_seconds", "gauge", "seconds", _POOL, "Newest p99 to the first token: a bucket edge"),
    Metric("powerd_pool_tbt_p99_seconds", "gauge", "seconds", _POOL, "Newest p99 between tokens: a bucket edge"),
    Metric("powerd_pool_clock_hertz", "gauge", "hertz", _POOL, "Mean SM clock of their GPUs"),
    Metric("powerd_pool_power_watts", "gauge", "watts", _POOL, "Power of their GPUs"),
    Metric("powerd_pool_energy_joules", "counter", "joules", _POOL, "Energy of their GPUs while they were registered"),
    Metric("powerd_replica_fresh", "gauge", "", ("pool", "replica"), "1 while its metrics are believed; 0: full clock"),
    Metric("powerd_replica_within_slo", "gauge", "", ("pool", "replica"), "1 while its newest requests keep the SLO"),
    Metric("powerd_node_cpu_utilization_ratio", "gauge", "ratio", (), "Share of the host's CPU time in use over the last second"),
    Metric("powerd_node_load1", "gauge", "", (), "Processes that run or wait, the system's one-minute mean"),
    Metric("powerd_node_memory_used_bytes", "gauge", "bytes", (), "Memory of the host in use"),
    Metric("powerd_node_memory_size_bytes", "gauge", "bytes", (), "Memory of the host"),
    Metric("powerd_cpu_energy_joules", "counter", "joules", ("package",), "Energy of a CPU package (RAPL); absent if unreadable"),
    Metric("powerd_dram_energy_joules", "counter", "joules", ("package",), "Energy of its DRAM (RAPL); absent if unreadable"),
    Metric("powerd_set_seconds", "summary", "seconds", ("control",), "Time that the driver took to change a setting"),
    Metric("powerd_store_rows", "counter", "", (), "Rows written to the embedded store"),
    Metric("powerd_store_dropped", "counter", "", (), "Rows, events and leases that the embedded store lost to a full queue"),
    Metric("powerd_store_errors", "counter", "", (), "Failed rounds of writing to the embedded store"),
    Metric("powerd_store_size_bytes", "gauge", "bytes", (), "Size of the embedded store"),
    Metric("powerd_spool_bytes", "gauge", "bytes", (), "Unsent points for InfluxDB on disk, compressed"),
    Metric("powerd_spool_points", "gauge", "", (), "Unsent points for InfluxDB"),
    Metric("powerd_influx_up", "gauge", "", (), "1 while the InfluxDB server takes points; absent without [influx]"),
    Metric("powerd_influx_lag_seconds", "gauge", "seconds", (), "Age of the oldest point that has not arrived"),
    Metric("powerd_influx_lines", "counter", "", (), "Points that the InfluxDB server took"),
    Metric("powerd_influx_dropped_points", "counter", "", ("why",), "Points given up: bounds of the spool, queue, disk or row"),
    Metric("powerd_influx_dead_letters", "counter", "", (), "Points that the server refused for good, put aside"),
    Metric("powerd_influx_other_tags", "counter", "", (), "Rows tagged other because a day had too many jobs or pools"),
    Metric("powerd_influx_errors", "counter", "", ("status",), "Failed requests by HTTP status, or network or timeout"),
)  # fmt: skip

#: Fields of a reading that are exposed as they are, times a factor into base units.
_READING_GAUGES: tuple[tuple[str, str, float], ...] = (
    ("powerd_gpu_power_watts", "power_mw", 1e-3),
    ("powerd_gpu_power_average_watts", "power_average_mw", 1e-3),
    ("powerd_gpu_sm_clock_hertz", "sm_clock_mhz", 1e6),
    ("powerd_gpu_memory_clock_hertz", "memory_clock_mhz", 1e6),
    ("powerd_gpu_temperature_celsius", "temperature_c", 1.0),
    ("powerd_gpu_utilization_ratio", "utilization_percent", 1e-2),
    ("powerd_gpu_memory_used_bytes", "memory_used_bytes", 1.0),
    ("powerd_gpu_memory_size_bytes", "memory_total_bytes", 1.0),
)
_FAMILIES = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}


class _GpuSums:
    """What is summed up for one GPU between scrapes."""

    __slots__ = ("base_mj", "epoch", "last_mj", "reasons_ns", "time_ns")

    def __init__(self) -> None:
        self.base_mj = 0  # counters of earlier epochs
        self.last_mj: int | None = None
        self.epoch = 0
        self.reasons_ns: dict[int, int] = {}  # by the whole bit set: taken apart only when scraped
        self.time_ns = 0

    def add(self, reading: Reading) -> None:
        step_ns = reading.time_ns - self.time_ns if self.time_ns else 0
        if step_ns < 0:
            return
        self.time_ns = reading.time_ns
        if step_ns <= _LONGEST_STEP_NS:
            bits = reading.clock_event_reasons
            if bits:
                self.reasons_ns[bits] = self.reasons_ns.get(bits, 0) + step_ns
        if reading.energy_mj is not None:
            if self.last_mj is not None and (reading.epoch != self.epoch or reading.energy_mj < self.last_mj):
                self.base_mj += self.last_mj  # never backwards; what the gap cost is not known here
            self.last_mj, self.epoch = reading.energy_mj, reading.epoch

    def energy_mj(self) -> float | None:
        return None if self.last_mj is None else float(self.base_mj + self.last_mj)


class Metrics(Collector):
    """The node's metrics; use it from one thread."""

    def __init__(self, table: Iterable[Metric] = METRICS) -> None:
        self._table = {metric.name: metric for metric in table}
        self._values: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in self._table}
        self._sets: dict[tuple[str, ...], tuple[int, float]] = {}
        self._sums: dict[str, _GpuSums] = {}
        self._gpus: dict[str, Capabilities] = {}
        self._snapshot: Snapshot | None = None
        self._now_ns = 0
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        for name, label in (("powerd_restore", Restart), ("powerd_drift", Control), ("powerd_plan_beats", Beat)):
            if name in self._table:  # a counter that begins at 1 shows no increase
                self._values[name] = {(str(one),): 0.0 for one in label}

    # ---- what the daemon tells

    def observe(self, snapshot: Snapshot) -> None:
        """Take one snapshot: sums up clock event time and keeps the counters going forward."""
        self._snapshot = snapshot
        sums = self._sums
        for reading in snapshot.readings:
            own = sums.get(reading.uuid)
            if own is None:
                own = sums[reading.uuid] = _GpuSums()
            own.add(reading)
        self.add("powerd_snapshots", 1)

    def gpus(self, capabilities: Iterable[Capabilities]) -> None:
        """Who the GPUs are; replaces what was known."""
        self._gpus = {c.gpu.uuid: c for c in capabilities}

    def build(self, version: str, simulated: bool) -> None:
        """What runs here."""
        self._values["powerd_build_info"] = {(version, str(simulated).lower()): 1.0}

    def restored(self, cause: Restart | str) -> None:
        """A setting went back to baseline."""
        self.add("powerd_restore", 1, str(cause))

    def drift(self, control: Control | str) -> None:
        """Somebody else changed a setting."""
        self.add("powerd_drift", 1, str(control))

    def leases(self, counts: Mapping[LeaseState, int]) -> None:
        """How many leases are in which state."""
        self.set("powerd_lease_active", counts.get(LeaseState.ACTIVE, 0))
        for state in LeaseState:
            if state is not LeaseState.ENDED:
                self.set("powerd_leases", counts.get(state, 0), str(state))

    def jobs(self, states: Mapping[str, int], counters: Iterable[float], gpus: Iterable[tuple[str, str]] = ()) -> None:
        """Jobs by state; steps, lost steps and joules that they reported; (job, GPU) of those that run."""
        self._values["powerd_job_gpu"] = dict.fromkeys(gpus, 1.0)
        for state, count in states.items():
            self.set("powerd_jobs", count, state)
        for name, value in zip(("steps", "lost_steps", "energy_joules"), counters, strict=True):
            self.set(f"powerd_job_{name}", value)

    def host(self, load: HostLoad) -> None:
        """The load of the host; what is not known has no series."""
        values = {
            "cpu_utilization_ratio": load.cpu_ratio, "load1": load.load_1min, "memory_used_bytes": load.memory_used_bytes,
            "memory_size_bytes": load.memory_size_bytes,
        }  # fmt: skip
        for name, value in values.items():
            if value is None:
                self._values[f"powerd_node_{name}"].clear()
            else:
                self.set(f"powerd_node_{name}", value)

    def host_energy(self, sums_uj: Mapping[tuple[str, int], int]) -> None:
        """CPU and DRAM energy by package."""
        for (domain, package), value in sums_uj.items():
            self.set(f"powerd_{'dram' if domain == 'dram' else 'cpu'}_energy_joules", value / 1e6, str(package))

    def plans(self, armed: int, beats: Mapping[str, int], switches: int) -> None:
        """The clock plans, and their sums since powerd started."""
        self.set("powerd_plans_armed", armed)
        self.set("powerd_plan_switches", switches)
        for verdict, count in beats.items():
            self.set("powerd_plan_beats", count, verdict)

    def store(self, rows: int, dropped: int, errors: int, size_bytes: int) -> None:
        """The embedded store's own counters."""
        for name, value in (("rows", rows), ("dropped", dropped), ("errors", errors), ("size_bytes", size_bytes)):
            self.set(f"powerd_store_{name}", value)

    def influx(self, stats: InfluxStats) -> None:
        """How the InfluxDB sink stands."""
        for name, value in (
            ("spool_bytes", stats.spool_bytes), ("spool_points", stats.spool_points), ("influx_up", stats.up),
            ("influx_lag_seconds", stats.lag_s), ("influx_lines", stats.lines), ("influx_dead_letters", stats.dead_letters),
            ("influx_other_tags", stats.other_tags),
        ):  # fmt: skip
            self.set(f"powerd_{name}", value)
        for why, points in stats.dropped.items():
            self.set("powerd_influx_dropped_points", points, why)
        for status, count in stats.errors.items():
            self.set("powerd_influx_errors", count, status)

    def was_set(self, control: Control | str, took_s: float) -> None:
        """The driver was told a new value of a control and took so long to return."""
        count, total_s = self._sets.get((str(control),), (0, 0.0))
        self._sets[(str(control),)] = (count + 1, total_s + took_s)

    def index(self, uuid: str) -> str:
        """The label ``gpu`` of a GPU; empty while it is not known."""
        known = self._gpus.get(uuid)
        return str(known.gpu.index) if known else ""

    def replace(self, name: str, series: Mapping[tuple[str, ...], float]) -> None:
        """All series of a metric at once; those that are not named leave the page. A counter never falls."""
        for labels in series:
            self._checked(name, labels)
        floor = self._values[name] if self._table[name].kind == "counter" else {}
        self._values[name] = {labels: max(value, floor.get(labels, value)) for labels, value in series.items()}

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge, or a counter that is counted elsewhere; KeyError or ValueError when the table has it not so."""
        self._values[name][self._checked(name, labels)] = float(value)

    def add(self, name: str, value: float, *labels: str) -> None:
        """Raise a counter."""
        series = self._values[name]
        series[labels] = series.get(self._checked(name, labels), 0.0) + value

    def _checked(self, name: str, labels: tuple[str, ...]) -> tuple[str, ...]:
        if len(labels) != len(self._table[name].labels):
            raise ValueError(f"{name} has the labels {self._table[name].labels}, got {labels}")
        return labels

    # ---- what Prometheus asks

    def render(self, accept: str = "", now_ns: int | None = None) -> tuple[bytes, str]:
        """The page and its content type for an Accept header: Prometheus text, or OpenMetrics when asked for."""
        self._now_ns = now_ns or 0
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def collect(self) -> Iterator[Family]:
        """All series that are known now, for prometheus_client."""
        values = {name: dict(series) for name, series in self._values.items()}
        if self._snapshot is not None:
            for reading in self._snapshot.readings:
                self._collect_gpu(values, reading)
        for name, metric in self._table.items():
            if metric.kind == "summary":
                summary = SummaryMetricFamily(name, metric.help, labels=metric.labels)
                for labels, (count, total) in sorted(self._sets.items()):
                    summary.add_metric(labels, count, total)
                family: Family = summary
            else:
                plain = _FAMILIES[metric.kind](name, metric.help, labels=metric.labels)
                for labels, value in sorted(values[name].items()):
                    plain.add_metric(labels, value)
                family = plain
            if family.samples:
                yield family

    def _collect_gpu(self, values: dict[str, dict[tuple[str, ...], float]], reading: Reading) -> None:
        known = self._gpus.get(reading.uuid)
        gpu = (reading.uuid, str(known.gpu.index) if known else "")
        up = reading.health in (Health.UP, Health.SUSPECT)
        values["powerd_gpu_up"][gpu] = float(up)
        sums = self._sums[reading.uuid]
        if (energy_mj := sums.energy_mj()) is not None:
            values["powerd_gpu_energy_joules"][gpu] = energy_mj / 1000
        for bits, spent_ns in sums.reasons_ns.items():
            for reason in reason_names(bits):
                series = values["powerd_gpu_clock_event_seconds"]
                series[(*gpu, reason)] = series.get((*gpu, reason), 0.0) + spent_ns / NS
        if known:
            facts = (known.gpu.name, known.gpu.pci_bus_id, known.driver_version)
            values["powerd_gpu_info"][(*gpu, *facts)] = 1.0
        if not up:
            return
        values["powerd_gpu_energy_epoch"][gpu] = reading.epoch
        for name, field, factor in _READING_GAUGES:
            if (value := getattr(reading, field)) is not None:
                values[name][gpu] = value * factor
        limits = {"requested": reading.power_limit_requested_mw, "enforced": reading.power_limit_enforced_mw}
        if known:
            limits["default"] = known.power_limit_default_mw
            limits["minimum"] = known.power_limit_min_mw
            limits["maximum"] = known.power_limit_max_mw
        for kind, limit_mw in limits.items():
            if limit_mw is not None:
                values["powerd_gpu_power_limit_watts"][(*gpu, kind)] = limit_mw / 1000
        if self._now_ns:
            values["powerd_gpu_sample_age_seconds"][gpu] = max(0, self._now_ns - reading.time_ns) / NS


def documentation() -> str:
    """docs/metrics.md, made from the table."""
    lines = [
        "# Metrics",
        "",
        "<!-- made by: python -m powerd.sinks.metrics > docs/metrics.md -->",
        "",
        "What `GET /metrics` serves, as Prometheus text or OpenMetrics, in base units. A series whose value is not known",
        "is absent; of a lost GPU only its sums and `powerd_gpu_up` stay, the latter with 0.",
        "`rate(powerd_gpu_energy_joules_total[5m])` is the mean power in watts.",
        "",
        "| name | type | unit | labels | what |",
        "|---|---|---|---|---|",
    ]
    for metric in METRICS:
        name = f"{metric.name}_total" if metric.kind == "counter" else metric.name
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{name}` | {metric.kind} | {metric.unit} | {labels} | {metric.help} |")
    return "\n".join([*lines, "", *dcgm.documentation()]) + "\n"


if __name__ == "__main__":
    print(documentation(), end="")
