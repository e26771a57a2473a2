"""The dashboard over Prometheus: what each panel asks.

House rules: only metrics that powerd.sinks.metrics.METRICS has, and the fleet planner's own page; it works without the recording
rules; a training job's name is the label ``job_name``, because Prometheus keeps ``job`` for itself.
"""

from __future__ import annotations

from typing import Any

from dashboards.grafana.parts import Panel, Query, Row, Source, Variable, build

SOURCE = Source("prometheus", "DS_PROMETHEUS", "Prometheus")
_NODE = 'instance=~"$node"'
_GPU = f'{_NODE}, gpu=~"$gpu"'
_JOB = f'{_NODE}, job_name=~"$training"'
_EACH = "{{instance}} GPU {{gpu}}"
_WANTED = 'pool=~"$pool"'  # what the planner says is of no node
_POOL = f"{_NODE}, {_WANTED}"
_POOL_TP = "{{pool}} TP{{tp}}"

VARIABLES = (
    Variable("node", "Node", "label_values(powerd_build_info, instance)"),
    Variable("gpu", "GPU", 'label_values(powerd_gpu_up{instance=~"$node"}, gpu)'),
    Variable("training", "Training job", 'label_values(powerd_training_steps_total{instance=~"$node"}, job_name)'),
    Variable("pool", "Inference pool", 'label_values(powerd_pool_replicas{instance=~"$node"}, pool)'),
)


def _number(title: str, what: str, unit: str, query: str, **more: Any) -> Panel:
    return Panel(title, what, unit, (Query(query, instant=True),), kind="number", width=4, height=4, **more)


OVERVIEW = Row("Overview", (
    _number("Power now", "Sum of the newest readings.", "watt", f"sum(powerd_gpu_power_watts{{{_GPU}}})"),
    _number("Energy", "In the time range shown, from the GPUs' energy counters.", "joule",
            f"sum(increase(powerd_gpu_energy_joules_total{{{_GPU}}}[$__range]))"),
    _number("Power limits", "Sum of the limits that the drivers enforce.", "watt",
            f'sum(powerd_gpu_power_limit_watts{{{_GPU}, kind="enforced"}})'),
    _number("GPUs that answer", "Lost and wedged ones are not counted.", "short", f"sum(powerd_gpu_up{{{_GPU}}})"),
    _number("Active leases", "Somebody asks for a setting.", "short", f"sum(powerd_lease_active{{{_NODE}}})"),
    _number("Nodes under control", "Nodes on which powerd may set clocks and limits.", "short",
            f"sum(powerd_control_enabled{{{_NODE}}})"),
))  # fmt: skip

ENERGY = Row("Energy and power", (
    Panel("Power against limit", "Power as last read; dashed: the limit that the driver enforces.", "watt", (
        Query(f"powerd_gpu_power_watts{{{_GPU}}}", _EACH),
        Query(f'powerd_gpu_power_limit_watts{{{_GPU}, kind="enforced"}}', f"{_EACH} limit", dashed=True),
    ), width=12, low=0),
    Panel("Mean power", "From the energy counter: exact over each step, whatever happens between two scrapes.", "watt", (
        Query(f"rate(powerd_gpu_energy_joules_total{{{_GPU}}}[$__rate_interval])", _EACH),
    ), kind="stack", width=12, low=0),
    Panel("Energy per GPU", "In the time range shown.", "joule", (
        Query(f"increase(powerd_gpu_energy_joules_total{{{_GPU}}}[$__range])", _EACH),
    ), kind="bars", width=12, low=0),
    Panel("Limit in force and range", "Requested and enforced limit; dashed: what the device allows.", "watt", (
        Query(f'powerd_gpu_power_limit_watts{{{_GPU}, kind=~"requested|enforced"}}', f"{_EACH} {{{{kind}}}}"),
        Query(f'powerd_gpu_power_limit_watts{{{_GPU}, kind=~"minimum|maximum"}}', f"{_EACH} {{{{kind}}}}", dashed=True),
    ), width=12, low=0),
))  # fmt: skip

CLOCKS = Row("Clocks", (
    Panel("SM clock", "Dashed: the upper end of the lock that powerd holds.", "hertz", (
        Query(f"powerd_gpu_sm_clock_hertz{{{_GPU}}}", _EACH),
        Query(f'powerd_gpu_sm_clock_lock_hertz{{{_GPU}, bound="maximum"}}', f"{_EACH} lock", dashed=True),
    ), width=12, low=0),
    Panel("Memory clock", "As last read.", "hertz", (Query(f"powerd_gpu_memory_clock_hertz{{{_GPU}}}", _EACH),), width=12, low=0),
    Panel("Utilization", "Share of time in which a kernel ran.", "percentunit",
          (Query(f"powerd_gpu_utilization_ratio{{{_GPU}}}", _EACH),), low=0, high=1),
    Panel("Temperature", "Of the GPU.", "celsius", (Query(f"powerd_gpu_temperature_celsius{{{_GPU}}}", _EACH),), low=0),
    Panel("Memory in use", "Dashed: what there is.", "bytes", (
        Query(f"powerd_gpu_memory_used_bytes{{{_GPU}}}", _EACH),
        Query(f"powerd_gpu_memory_size_bytes{{{_GPU}}}", f"{_EACH} size", dashed=True),
    ), low=0),
))  # fmt: skip

REASONS = Row("Why a clock is low", (
    Panel("Clock event reasons", "Share of time in which the driver gave this reason; one GPU may have several at a time.",
          "percentunit", (
              Query(f"avg by (reason) (rate(powerd_gpu_clock_event_seconds_total{{{_GPU}}}[$__rate_interval]))", "{{reason}}"),
          ), width=12, low=0, high=1),
    Panel("Slowed down, by GPU", "Share of time with heat, power brake or power limit as the reason.", "percentunit", (
        Query(f'sum by (instance, gpu) (rate(powerd_gpu_clock_event_seconds_total{{{_GPU}, '
              'reason=~"sw_power_cap|hw_slowdown|.*thermal.*|hw_power_brake"}[$__rate_interval]))', _EACH),
    ), width=12, low=0),
))  # fmt: skip

LEASES = Row("Leases, and who set what", (
    Panel("Set now, by whom", "Everything that is not at baseline. powerctl explain says more of one GPU.", "none", (
        Query(f"powerd_gpu_set_by{{{_GPU}}}"),
    ), kind="table", width=12, hidden=("Time", "Value", "__name__", "job", "uuid"),
          named=(("instance", "Node"), ("gpu", "GPU"), ("control", "Control"), ("class", "Class"), ("holder", "Holder"))),
    Panel("Leases by user", "Those that have not ended.", "short", (
        Query(f"sum by (user) (powerd_user_leases{{{_NODE}}})", "{{user}}"),
    ), kind="stack", width=12, low=0),
    Panel("Leases by state", "Suspended: a GPU is lost; detached: bound to its TTL only.", "short", (
        Query(f"sum by (state) (powerd_leases{{{_NODE}}})", "{{state}}"),
    ), kind="stack", low=0),
    Panel("Restores", "Settings put back to baseline, by cause.", "short", (
        Query(f"sum by (cause) (increase(powerd_restore_total{{{_NODE}}}[$__rate_interval]))", "{{cause}}"),
    ), kind="stack", low=0),
    Panel("Drift", "Settings that somebody else changed.", "short", (
        Query(f"sum by (instance, control) (increase(powerd_drift_total{{{_NODE}}}[$__rate_interval]))",
              "{{instance}} {{control}}"),
    ), kind="stack", low=0),
    Panel("Time to set", "Mean time that the driver took to change a setting.", "s", (
        Query(f"sum by (control) (rate(powerd_set_seconds_sum{{{_NODE}}}[$__range]))"
              f" / sum by (control) (rate(powerd_set_seconds_count{{{_NODE}}}[$__range]))", "{{control}}"),
    ), low=0),
    Panel("Clock plans", "Armed plans and what became of their beats per second.", "short", (
        Query(f"sum(powerd_plans_armed{{{_NODE}}})", "armed"),
        Query(f"sum by (verdict) (rate(powerd_plan_beats_total{{{_NODE}}}[$__rate_interval]))", "{{verdict}} beats/s"),
    ), low=0),
    Panel("Clock switches", "Clocks that plans have set, per second.", "short", (
        Query(f"sum by (instance) (rate(powerd_plan_switches_total{{{_NODE}}}[$__rate_interval]))", "{{instance}}"),
    ), low=0),
))  # fmt: skip

TRAINING = Row("Training jobs", (
    Panel("Energy per step", "Of all nodes of a job; what a restore threw away is a cost of the steps that stayed.", "joule", (
        Query(f"sum by (job_name) (powerd_training_step_energy_joules{{{_JOB}}})", "{{job_name}}"),
    ), low=0),
    Panel("Time per step", "Median of the newest steps, of the slowest node.", "s", (
        Query(f"max by (job_name) (powerd_training_step_seconds{{{_JOB}}})", "{{job_name}}"),
    ), low=0),
    Panel("Saving", "Energy per step under the plan against the job's own baseline steps; absent when it was not measured.",
          "percentunit", (
              Query(f"1 - sum by (job_name) (powerd_training_step_energy_joules{{{_JOB}}}"
                    f" and powerd_training_saving_ratio{{{_JOB}}})"
                    f" / sum by (job_name) (powerd_training_step_energy_joules{{{_JOB}}}"
                    f" / (1 - (powerd_training_saving_ratio{{{_JOB}}} < 1)))", "{{job_name}}"),
          )),
    Panel("Energy of jobs", "That their ranks reported.", "joule", (
        Query(f"sum by (job_name) (powerd_training_energy_joules_total{{{_JOB}}})", "{{job_name}}"),
    ), low=0),
    Panel("Jobs by state", "Silent: nothing was said for ten minutes.", "short", (
        Query(f"sum by (state) (powerd_jobs{{{_NODE}}})", "{{state}}"),
    ), kind="stack", low=0),
    Panel("Steps", "Per second, of all jobs; lost: rolled back by a restore.", "short", (
        Query(f"sum(rate(powerd_job_steps_total{{{_NODE}}}[$__rate_interval]))", "steps"),
        Query(f"sum(rate(powerd_job_lost_steps_total{{{_NODE}}}[$__rate_interval]))", "lost"),
    ), low=0),
))  # fmt: skip


def _latency(title: str, what: str, name: str) -> Panel:
    return Panel(title, f"Time {what} that 99 of 100 stay below, on the slowest node; dashed: the strictest SLO.", "s", (
        Query(f"max by (pool, tp) (powerd_pool_{name}_p99_seconds{{{_POOL}}})", _POOL_TP),
        Query(f"min by (pool, tp) (powerd_pool_{name}_slo_seconds{{{_POOL}}})", f"{_POOL_TP} SLO", dashed=True),
    ), low=0)  # fmt: skip


INFERENCE = Row("Inference pools", (
    _latency("Time to first token", "to the first token", "ttft"),
    _latency("Time between tokens", "between two tokens", "tbt"),
    Panel("Within SLO", "Share of looks at which a replica's newest requests kept what is promised.", "percentunit", (
        Query(f"avg by (pool) (avg_over_time(powerd_replica_within_slo{{{_POOL}}}[$__rate_interval]))", "{{pool}}"),
    ), low=0, high=1),
    Panel("Replicas and what is wanted", "Registered on all nodes; dashed: what the fleet's planner wants.", "short", (
        Query(f"sum by (pool, tp) (powerd_pool_replicas{{{_POOL}}})", _POOL_TP),
        Query(f"max by (pool, tp) (powerd_desired_replicas{{{_WANTED}}})", f"{_POOL_TP} wanted", dashed=True),
    ), low=0),
    Panel("Tensor parallelism", "Replicas by the number of GPUs that each is spread over.", "short", (
        Query(f"sum by (tp) (powerd_pool_replicas{{{_POOL}}})", "TP{{tp}}"),
    ), kind="stack", low=0),
    Panel("Fresh and stale replicas", "Stale or starting: their metrics are not believed; full clock.", "short", (
        Query(f"sum by (pool) (powerd_pool_fresh_replicas{{{_POOL}}})", "{{pool}} fresh"),
        Query(f"sum by (pool) (powerd_pool_replicas{{{_POOL}}}) - sum by (pool) (powerd_pool_fresh_replicas{{{_POOL}}})",
              "{{pool}} stale or starting", dashed=True),
    ), low=0),
    Panel("Clock of pools", "Mean SM clock of a pool's GPUs; dashed: what the fleet's planner counted with.", "hertz", (
        Query(f"sum by (pool, tp) (powerd_pool_clock_hertz{{{_POOL}}} * powerd_pool_replicas{{{_POOL}}})"
              f" / sum by (pool, tp) (powerd_pool_replicas{{{_POOL}}} and powerd_pool_clock_hertz{{{_POOL}}})", _POOL_TP),
        Query(f"max by (pool, tp) (powerd_desired_clock_hertz{{{_WANTED}}})", f"{_POOL_TP} planned", dashed=True),
    ), low=0),
    Panel("Requests running", "That the replicas compute; those with stale metrics are not counted.", "short", (
        Query(f"sum by (pool, tp) (powerd_pool_requests_running{{{_POOL}}})", _POOL_TP),
    ), kind="stack", low=0),
    Panel("Requests waiting", "In the replicas' own queues.", "short", (
        Query(f"sum by (pool, tp) (powerd_pool_requests_waiting{{{_POOL}}})", _POOL_TP),
    ), kind="stack", low=0),
    Panel("Power of pools", "Of their GPUs, from the GPUs' own energy counters.", "watt", (
        Query(f"sum by (pool, tp) (rate(powerd_pool_energy_joules_total{{{_POOL}}}[$__rate_interval]))", _POOL_TP),
    ), kind="stack", low=0),
    Panel("Energy of pools", "In the time range shown, while their GPUs were registered.", "joule", (
        Query(f"sum by (pool) (increase(powerd_pool_energy_joules_total{{{_POOL}}}[$__range]))", "{{pool}}"),
    ), kind="bars", low=0),
    Panel("Metrics of each replica", "1: believed; 0: starting or stale, at full clock.", "short", (
        Query(f"powerd_replica_fresh{{{_POOL}}}", "{{pool}} {{replica}} on {{instance}}"),
    ), kind="states", low=0, high=1),
))  # fmt: skip

HOST = Row("The host", (
    Panel("CPU and memory power", "From the processors' own energy counters (RAPL), where powerd-hw may read them.", "watt", (
        Query(f"sum by (instance) (rate(powerd_cpu_energy_joules_total{{{_NODE}}}[$__rate_interval]))", "{{instance}} CPU"),
        Query(f"sum by (instance) (rate(powerd_dram_energy_joules_total{{{_NODE}}}[$__rate_interval]))", "{{instance}} DRAM"),
    ), low=0),
    Panel("Energy of GPUs, CPUs and memory", "In the time range shown: what the GPUs' own energy leaves out.", "joule", (
        Query(f"sum(increase(powerd_gpu_energy_joules_total{{{_NODE}}}[$__range]))", "GPUs", instant=True),
        Query(f"sum(increase(powerd_cpu_energy_joules_total{{{_NODE}}}[$__range]))", "CPUs", instant=True),
        Query(f"sum(increase(powerd_dram_energy_joules_total{{{_NODE}}}[$__range]))", "DRAM", instant=True),
    ), kind="bars"),
    Panel("Host CPU in use", "Share of the host's CPU time.", "percentunit", (
        Query(f"powerd_node_cpu_utilization_ratio{{{_NODE}}}", "{{instance}}"),
    ), low=0, high=1),
    Panel("Host memory in use", "Dashed: what there is.", "bytes", (
        Query(f"powerd_node_memory_used_bytes{{{_NODE}}}", "{{instance}}"),
        Query(f"powerd_node_memory_size_bytes{{{_NODE}}}", "{{instance}} size", dashed=True),
    ), low=0),
))  # fmt: skip

HEALTH = Row("Spool, store and powerd itself", (
    Panel("Spool", "Bytes that wait for InfluxDB.", "bytes", (
        Query(f"powerd_spool_bytes{{{_NODE}}}", "{{instance}}"),
    ), low=0),
    Panel("InfluxDB takes points", "1: the newest batch was taken.", "short", (
        Query(f"powerd_influx_up{{{_NODE}}}", "{{instance}}"),
    ), kind="states", low=0, high=1),
    Panel("Points lost and refused", "Dropped by the spool's bound; refused by InfluxDB and kept as dead letters.", "short", (
        Query(f"sum by (instance, why) (increase(powerd_influx_dropped_points_total{{{_NODE}}}[$__rate_interval]))",
              "{{instance}} dropped: {{why}}"),
        Query(f"increase(powerd_influx_dead_letters_total{{{_NODE}}}[$__rate_interval])", "{{instance}} dead letters"),
    ), low=0),
    Panel("Delivery", "Points per second that InfluxDB took, and the age of the oldest that it has not.", "short", (
        Query(f"rate(powerd_influx_lines_total{{{_NODE}}}[$__rate_interval])", "{{instance}} points/s"),
        Query(f"powerd_influx_lag_seconds{{{_NODE}}}", "{{instance}} lag in seconds"),
    ), width=6, low=0),
    Panel("Age of samples", "Of each GPU's newest reading.", "s", (
        Query(f"powerd_gpu_sample_age_seconds{{{_GPU}}}", _EACH),
    ), width=6, low=0),
    Panel("Embedded store", "Its size.", "bytes", (
        Query(f"powerd_store_size_bytes{{{_NODE}}}", "{{instance}}"),
    ), width=6, low=0),
    Panel("Store rows", "Written and lost per second.", "short", (
        Query(f"rate(powerd_store_rows_total{{{_NODE}}}[$__rate_interval])", "{{instance}} written"),
        Query(f"rate(powerd_store_dropped_total{{{_NODE}}}[$__rate_interval])", "{{instance}} dropped"),
    ), width=6, low=0),
    Panel("Connected to powerd-hw", "0: nothing is measured or set.", "short", (
        Query(f"powerd_hw_connected{{{_NODE}}}", "{{instance}}"),
    ), kind="states", width=12, height=6, low=0, high=1),
    Panel("GPU answers", "0: lost or wedged.", "short", (
        Query(f"powerd_gpu_up{{{_GPU}}}", _EACH),
    ), kind="states", width=12, height=6, low=0, high=1),
))  # fmt: skip

ROWS = (OVERVIEW, ENERGY, CLOCKS, REASONS, LEASES, TRAINING, INFERENCE, HOST, HEALTH)


def document() -> dict[str, Any]:
    """The dashboard as Grafana's JSON."""
    what = "Energy, power, clocks, leases, jobs and inference pools of GPU nodes that run powerd, from Prometheus."
    return build("powerd-prometheus", "powerd (Prometheus)", what, SOURCE, VARIABLES, ROWS)
