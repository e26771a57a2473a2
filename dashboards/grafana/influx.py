"""The dashboard over InfluxDB, in Flux: what each panel asks.

House rules: only measurements and fields that powerd.sinks.lines writes; a query names its lines itself (column ``series``), so
that nothing hangs on how Grafana words labels; counters are read by non-negative differences, so that a reset costs one step.
"""

from __future__ import annotations

from typing import Any

from dashboards.grafana.parts import Panel, Query, Row, Source, Variable, build

SOURCE = Source("influxdb", "DS_INFLUXDB", "InfluxDB")
_DATA = "from(bucket: v.defaultBucket) |> range(start: v.timeRangeStart, stop: v.timeRangeStop)"
_HOST = "r.host =~ /^${host:regex}$/"
_UUID = "r.uuid =~ /^${uuid:regex}$/"
_JOB = "r.job =~ /^${training:regex}$/"
_POOL = "r.pool =~ /^${pool:regex}$/"
_WINDOW = "aggregateWindow(every: v.windowPeriod, fn: {}, createEmpty: false)"


def _tag_values(tag: str, measurement: str) -> str:
    return (
        'import "influxdata/influxdb/schema"\n'
        f'schema.tagValues(bucket: v.defaultBucket, tag: "{tag}", '
        f'predicate: (r) => r._measurement == "{measurement}", start: v.timeRangeStart)'
    )


VARIABLES = (
    Variable("host", "Node", _tag_values("host", "gpu")),
    Variable("uuid", "GPU", _tag_values("uuid", "gpu")),
    Variable("training", "Training job", _tag_values("job", "job")),
    Variable("pool", "Inference pool", _tag_values("pool", "inference")),
)


def _pipe(*steps: str) -> str:
    return "\n  |> ".join(steps)


def _gpu(field: str, *steps: str) -> str:
    """The named field of the chosen GPUs, and what is done with it."""
    return _pipe(_DATA, f'filter(fn: (r) => r._measurement == "gpu" and r._field == "{field}" and {_HOST} and {_UUID})', *steps)


def _each(field: str, suffix: str = "", before: tuple[str, ...] = ()) -> str:
    """A line a GPU: the mean over each window."""
    name = f'series: r.host + " " + r.uuid{f" + {chr(34)} {suffix}{chr(34)}" if suffix else ""}'
    return _gpu(
        field,
        *before,
        _WINDOW.format("mean"),
        f"map(fn: (r) => ({{_time: r._time, _value: r._value, {name}}}))",
        'group(columns: ["series"])',
    )


def _job(field: str, across: str) -> str:
    """A line a job: the mean over each window on every node, then the sum or the maximum over the nodes."""
    return _pipe(
        _DATA,
        f'filter(fn: (r) => r._measurement == "job" and r._field == "{field}" and {_HOST} and {_JOB})',
        _WINDOW.format("mean"),
        'group(columns: ["job", "_time"])',
        f"{across}()",
        "map(fn: (r) => ({_time: r._time, _value: r._value, series: r.job}))",
        'group(columns: ["series"])',
    )


def _inference(field: str, across: str, suffix: str = "", within: str = "mean") -> str:
    """A line a pool: ``within`` each window on every node, then ``across`` the nodes."""
    name = f"r.pool + {chr(34)} {suffix}{chr(34)}" if suffix else "r.pool"
    return _pipe(
        _DATA,
        f'filter(fn: (r) => r._measurement == "inference" and r._field == "{field}" and {_HOST} and {_POOL})',
        _WINDOW.format(within),
        'group(columns: ["pool", "_time"])',
        f"{across}()",
        f"map(fn: (r) => ({{_time: r._time, _value: r._value, series: {name}}}))",
        'group(columns: ["series"])',
    )


def _rows(measurement: str, where: str, *steps: str) -> str:
    """Whole points of a measurement as rows of a table."""
    return _pipe(
        _DATA,
        f'filter(fn: (r) => r._measurement == "{measurement}" and {_HOST}{where})',
        'pivot(rowKey: ["_time"], columnKey: ["_field"], valueColumn: "_value")',
        *steps,
    )


def _number(title: str, what: str, unit: str, text: str) -> Panel:
    return Panel(title, what, unit, (Query(text),), kind="number", width=6, height=4)


def _lines(title: str, what: str, unit: str, *texts: Query, **more: Any) -> Panel:
    return Panel(title, what, unit, texts, display="${__field.labels.series}", **more)


_SUM = ("group()", "sum()")

OVERVIEW = Row("Overview", (
    _number("Power now", "Sum of the newest points.", "watt", _gpu("power_watts", "last()", *_SUM)),
    _number("Energy", "In the time range shown, from the GPUs' energy counters.", "joule",
            _gpu("energy_joules", "difference(nonNegative: true)", "sum()", *_SUM)),
    _number("Power limits", "Sum of the limits that the drivers enforce.", "watt",
            _gpu("power_limit_enforced_watts", "last()", *_SUM)),
    _number("GPUs that answer", "Lost and wedged ones are not counted.", "short", _gpu("up", "last()", *_SUM)),
))  # fmt: skip

ENERGY = Row("Energy and power", (
    _lines("Power against limit", "Dashed: the limit that the driver enforces.", "watt", Query(_each("power_watts")),
           Query(_each("power_limit_enforced_watts", "limit"), dashed=True), width=12, low=0),
    _lines("Mean power", "From the energy counter: exact over each step, whatever happens in between.", "watt",
           Query(_each("energy_joules", before=("derivative(unit: 1s, nonNegative: true)",))), kind="stack", width=12, low=0),
    _lines("Energy per GPU", "In the time range shown.", "joule", Query(_gpu(
        "energy_joules", "difference(nonNegative: true)", "sum()",
        'map(fn: (r) => ({_time: v.timeRangeStop, _value: r._value, series: r.host + " " + r.uuid}))',
        'group(columns: ["series"])')), kind="bars", width=12, low=0),
    _lines("Energy per node", "Joules in each window.", "joule", Query(_gpu(
        "energy_joules", "difference(nonNegative: true)", 'group(columns: ["host"])', _WINDOW.format("sum"),
        "map(fn: (r) => ({_time: r._time, _value: r._value, series: r.host}))", 'group(columns: ["series"])')),
        kind="stack", width=12, low=0),
))  # fmt: skip

CLOCKS = Row("Clocks", (
    _lines("SM clock", "As read.", "hertz", Query(_each("sm_clock_hertz")), width=12, low=0),
    _lines("Memory clock", "As read.", "hertz", Query(_each("memory_clock_hertz")), width=12, low=0),
    _lines("Utilization", "Share of time in which a kernel ran.", "percentunit", Query(_each("utilization_ratio")),
           low=0, high=1),
    _lines("Temperature", "Of the GPU.", "celsius", Query(_each("temperature_celsius")), low=0),
    _lines("Memory in use", "Dashed: what there is.", "bytes", Query(_each("memory_used_bytes")),
           Query(_each("memory_size_bytes", "size"), dashed=True), low=0),
))  # fmt: skip

REASONS = Row("Why a clock is low", (
    _lines("Clock event reasons", "Share of samples with this reason, mean over the GPUs; there may be several at a time.",
           "percentunit", Query(_pipe(
               _DATA, f'filter(fn: (r) => r._measurement == "gpu" and r._field =~ /^event_.*_ratio$/ and {_HOST} and {_UUID})',
               'group(columns: ["_field"])', _WINDOW.format("mean"),
               "map(fn: (r) => ({_time: r._time, _value: r._value, series: r._field}))", 'group(columns: ["series"])')),
           width=12, low=0, high=1),
    _lines("Power limit as the reason, by GPU", "Share of samples in which the driver held the clock for the power limit.",
           "percentunit", Query(_each("event_sw_power_cap_ratio")), width=12, low=0, high=1),
))  # fmt: skip

LEASES = Row("Leases, and who set what", (
    Panel("Leases that last", "Granted or changed in the time range shown: who asked for what, and why.", "none", (
        Query(_rows(
            "lease", f" and {_UUID}", 'group(columns: ["host", "uuid", "lease"])', 'sort(columns: ["_time"])', "tail(n: 1)",
            "group()", "filter(fn: (r) => r.active == 1)", 'sort(columns: ["_time"], desc: true)')),
    ), kind="table", width=24, hidden=("active", "age_seconds", "class", "end", "expires_seconds", "refused", "uid", "job",
                                       "_start", "_stop", "_measurement"),
          named=(("_time", "Since"), ("host", "Node"), ("uuid", "GPU"), ("user", "User"), ("reason", "Reason"),
                 ("lease", "Lease"), ("state", "State"))),
    _lines("Events by kind", "Leases granted and ended, restores, drift, lost GPUs and more.", "short", Query(_pipe(
        _DATA, f'filter(fn: (r) => r._measurement == "event" and r._field == "kind" and {_HOST})',
        "map(fn: (r) => ({_time: r._time, _value: 1, series: r._value}))", 'group(columns: ["series"])', _WINDOW.format("sum"))),
        kind="stack", low=0, width=8, height=10),
    Panel("Newest events", "As powerctl events shows them.", "none", (
        Query(_rows("event", "", "group()", 'sort(columns: ["_time"], desc: true)', "limit(n: 100)")),
    ), kind="table", width=16, height=10, hidden=("data", "number", "_start", "_stop", "_measurement"),
          named=(("_time", "Time"), ("host", "Node"), ("kind", "Kind"), ("subject", "Subject"), ("detail", "Detail"),
                 ("uuid", "GPU"))),
))  # fmt: skip

_STEPS = f"""data = {
    _pipe(
        _DATA,
        'filter(fn: (r) => r._measurement == "job" and '
        f'(r._field == "step_energy_joules" or r._field == "step_plan") and {_HOST} and {_JOB})',
        'pivot(rowKey: ["_time"], columnKey: ["_field"], valueColumn: "_value")',
        "filter(fn: (r) => exists r.step_plan and exists r.step_energy_joules)",
        'group(columns: ["host", "job"])',
    )
}
full = data |> filter(fn: (r) => r.step_plan == "baseline") |> median(column: "step_energy_joules")
plan = data
  |> filter(fn: (r) => r.step_plan != "baseline" and r.step_plan != "profile")
  |> median(column: "step_energy_joules")
join(tables: {{full: full, plan: plan}}, on: ["host", "job"])
  |> group(columns: ["job"])
  |> reduce(
    identity: {{full: 0.0, plan: 0.0}},
    fn: (r, accumulator) => ({{
      full: accumulator.full + r.step_energy_joules_full,
      plan: accumulator.plan + r.step_energy_joules_plan,
    }}),
  )
  |> map(fn: (r) => ({{_time: v.timeRangeStop, _value: 1.0 - r.plan / r.full, series: r.job}}))
  |> group(columns: ["series"])"""

_STALE = _pipe(
    _DATA,
    'filter(fn: (r) => r._measurement == "inference" and '
    f'(r._field == "replicas" or r._field == "fresh_replicas") and {_HOST} and {_POOL})',
    'map(fn: (r) => ({r with _value: if r._field == "replicas" then r._value else -r._value}))',
    'group(columns: ["host", "pool", "_field"])',
    _WINDOW.format("last"),
    'group(columns: ["pool", "_time"])',
    "sum()",
    'map(fn: (r) => ({_time: r._time, _value: r._value, series: r.pool + " stale or starting"}))',
    'group(columns: ["series"])',
)

TRAINING = Row("Training jobs", (
    _lines("Energy per step", "Of all nodes of a job.", "joule", Query(_job("step_energy_joules", "sum")), low=0),
    _lines("Time per step", "Of the slowest node.", "s", Query(_job("step_seconds", "max")), low=0),
    _lines("Saving", "Median energy of steps under a plan against that of steps marked baseline, in the time range shown; "
           "a job without both is not listed.", "percentunit", Query(_STEPS), kind="bars"),
    _lines("Energy of jobs", "That their ranks reported, all nodes.", "joule", Query(_job("energy_joules", "sum")), low=0),
    _lines("SM clock of steps", "Mean over a step, of the node with the highest.", "hertz",
           Query(_job("step_sm_clock_hertz", "max")), low=0),
    _lines("Steps lost", "Rolled back by restores so far.", "short", Query(_job("lost_steps", "max")), low=0),
))  # fmt: skip

INFERENCE = Row("Inference pools", (
    _lines("Time to first token", "That 99 of 100 stay below, on the slowest node; dashed: the strictest SLO.", "s",
           Query(_inference("ttft_p99_seconds", "max", within="max")),
           Query(_inference("ttft_slo_seconds", "min", "SLO"), dashed=True), low=0),
    _lines("Time between tokens", "That 99 of 100 stay below, on the slowest node; dashed: the strictest SLO.", "s",
           Query(_inference("tbt_p99_seconds", "max", within="max")),
           Query(_inference("tbt_slo_seconds", "min", "SLO"), dashed=True), low=0),
    _lines("Within SLO", "Share of latencies that surely kept what is promised, of the replica with the lowest.", "percentunit",
           Query(_inference("slo_ratio", "min")), low=0, high=1),
    _lines("Replicas", "Registered on all nodes; dashed: those whose metrics are stale or not there yet, at full clock.", "short",
           Query(_inference("replicas", "sum", within="last")), Query(_STALE, dashed=True), low=0),
    _lines("Tensor parallelism", "GPUs of each replica, where all of a pool's on a node have the same.", "short",
           Query(_inference("tensor_parallel", "max", within="last")), low=0),
    _lines("Clock of pools", "Mean SM clock of a pool's GPUs, mean of the nodes.", "hertz",
           Query(_inference("sm_clock_hertz", "mean")), low=0),
    _lines("Requests running", "That the replicas compute; those with stale metrics are not counted.", "short",
           Query(_inference("running", "sum")), kind="stack", low=0),
    _lines("Requests waiting", "In the replicas' own queues.", "short", Query(_inference("queued", "sum")), kind="stack", low=0),
    _lines("Requests answered", "First tokens per second.", "reqps", Query(_inference("requests_per_second", "sum")),
           kind="stack", low=0),
    _lines("Power of pools", "Of their GPUs.", "watt", Query(_inference("power_watts", "sum")), kind="stack", width=12, low=0),
    _lines("Energy of pools", "In the time range shown: each point has what was used since the one before.", "joule", Query(_pipe(
        _DATA, f'filter(fn: (r) => r._measurement == "inference" and r._field == "energy_joules" and {_HOST} and {_POOL})',
        'group(columns: ["pool"])', "sum()",
        "map(fn: (r) => ({_time: v.timeRangeStop, _value: r._value, series: r.pool}))", 'group(columns: ["series"])')),
        kind="bars", width=12, low=0),
))  # fmt: skip

HEALTH = Row("Delivery", (
    _lines("Age of the newest point", "It grows while the spool cannot deliver; what was spooled comes later.", "s",
           Query(_pipe(
               _DATA, f'filter(fn: (r) => r._measurement == "gpu" and r._field == "up" and {_HOST})', 'group(columns: ["host"])',
               'sort(columns: ["_time"])', "tail(n: 1)",
               "map(fn: (r) => ({_time: now(), "
               "_value: float(v: int(v: now()) - int(v: r._time)) / 1000000000.0, series: r.host}))",
               'group(columns: ["series"])')), kind="bars", width=12, low=0),
    _lines("Points", "That InfluxDB has, per node and window: a dip is an outage that has not been made up for yet.", "short",
           Query(_pipe(
               _DATA, f'filter(fn: (r) => r._measurement == "gpu" and r._field == "up" and {_HOST})', 'group(columns: ["host"])',
               _WINDOW.format("count"), "map(fn: (r) => ({_time: r._time, _value: r._value, series: r.host}))",
               'group(columns: ["series"])')), width=12, low=0),
))  # fmt: skip

ROWS = (OVERVIEW, ENERGY, CLOCKS, REASONS, LEASES, TRAINING, INFERENCE, HEALTH)


def document() -> dict[str, Any]:
    """The dashboard as Grafana's JSON."""
    what = "Energy, power, clocks, leases, jobs and inference pools of GPU nodes that run powerd, from InfluxDB (Flux)."
    return build("powerd-influx", "powerd (InfluxDB)", what, SOURCE, VARIABLES, ROWS)
