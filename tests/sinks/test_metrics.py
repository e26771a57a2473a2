"""The Prometheus page: names, units, what is absent, what is summed up."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain

from powerd.api import JobView
from powerd.clock import NS
from powerd.model import (
    Capabilities,
    Control,
    Gpu,
    Health,
    Interval,
    LeaseState,
    Reading,
    Restart,
    Setpoint,
    Snapshot,
    Support,
    Want,
    WantClass,
)
from powerd.sinks.metrics import METRICS, Metrics, documentation
from powerd.sinks.whose import show_jobs, show_setpoints

A, B = (f"GPU-00000000-0000-0000-0000-00000000000{n}" for n in (1, 2))
FULL = Reading(
    A, 100 * NS, Health.UP, 3, 5_000_000, 100 * NS, 250_000, 251_000, 1200, 1593, 61, 97, 2 << 30, 80 << 30, 400_000, 390_000, 0x4
)  # fmt: skip
OPEN = "application/openmetrics-text; version=1.0.0"


def capabilities(uuid: str, index: int) -> Capabilities:
    support = dict.fromkeys(Control, Support(True))
    gpu = Gpu(uuid, index, "Simulated", f"0000:0{index}:00.0")
    return Capabilities(gpu, "580.1", 100_000, 500_000, 450_000, (210, 1410), (1593,), True, True, False, True, support)


def page(metrics: Metrics, now_ns: int | None = None) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text, _ = metrics.render("", now_ns)
    samples = [s for family in plain(text.decode()) for s in family.samples]
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for s in samples}


def of(samples: dict[tuple[str, tuple[tuple[str, str], ...]], float], name: str, **labels: str) -> float | None:
    found = [v for (n, has), v in samples.items() if n == name and set(labels.items()) <= set(has)]
    assert len(found) <= 1, found
    return found[0] if found else None


def observed(*readings: Reading, time_ns: int = 100 * NS) -> Snapshot:
    return Snapshot(1, time_ns, time_ns, readings)


def test_readings_become_base_units() -> None:
    metrics = Metrics()
    metrics.gpus([capabilities(A, 0)])
    metrics.observe(observed(FULL))
    samples = page(metrics, now_ns=100 * NS + NS // 4)
    expected = {
        "powerd_gpu_up": 1, "powerd_gpu_energy_joules_total": 5000, "powerd_gpu_power_watts": 250,
        "powerd_gpu_power_average_watts": 251, "powerd_gpu_sm_clock_hertz": 1.2e9, "powerd_gpu_memory_clock_hertz": 1.593e9,
        "powerd_gpu_temperature_celsius": 61, "powerd_gpu_utilization_ratio": 0.97, "powerd_gpu_memory_used_bytes": 2 << 30,
        "powerd_gpu_memory_size_bytes": 80 << 30, "powerd_gpu_energy_epoch": 3, "powerd_gpu_sample_age_seconds": 0.25,
    }  # fmt: skip
    for name, value in expected.items():
        assert of(samples, name, uuid=A, gpu="0") == pytest.approx(value), name
    limits = {kind: of(samples, "powerd_gpu_power_limit_watts", kind=kind) for kind in ("requested", "enforced", "default")}
    assert limits == {"requested": 400, "enforced": 390, "default": 450}


def test_what_is_not_known_is_absent_and_up_stays_at_zero_for_a_lost_gpu() -> None:
    metrics = Metrics()
    lost = Reading(B, 100 * NS, Health.LOST, 1)
    bare = Reading(A, 100 * NS, Health.UP, 1, power_mw=1000)
    metrics.observe(observed(bare, lost))
    samples = page(metrics)
    assert of(samples, "powerd_gpu_up", uuid=B) == 0
    assert [name for (name, labels) in samples if ("uuid", B) in labels] == ["powerd_gpu_up"]
    assert of(samples, "powerd_gpu_energy_joules_total", uuid=A) is None
    assert of(samples, "powerd_gpu_temperature_celsius", uuid=A) is None
    assert of(samples, "powerd_gpu_power_watts", uuid=A) == 1


def test_clock_event_time_is_summed_up_by_reason_and_holes_count_for_nobody() -> None:
    metrics = Metrics()
    for tick in range(11):
        metrics.observe(observed(replace(FULL, time_ns=tick * NS // 10 + NS, clock_event_reasons=0x4 if tick < 6 else 0x24)))
    metrics.observe(observed(replace(FULL, time_ns=900 * NS, clock_event_reasons=0x8)))
    samples = page(metrics)
    assert of(samples, "powerd_gpu_clock_event_seconds_total", reason="sw_power_cap") == pytest.approx(1.0)
    assert of(samples, "powerd_gpu_clock_event_seconds_total", reason="sw_thermal_slowdown") == pytest.approx(0.5)
    assert of(samples, "powerd_gpu_clock_event_seconds_total", reason="hw_slowdown") is None


def test_the_energy_counter_never_goes_backwards() -> None:
    metrics = Metrics()
    seen = []
    for energy, epoch, health in ((5000, 1, Health.UP), (9000, 1, Health.UP), (100, 2, Health.UP), (None, 2, Health.LOST),
                                  (50, 3, Health.UP), (2000, 3, Health.UP)):  # fmt: skip
        metrics.observe(observed(replace(FULL, energy_mj=energy, epoch=epoch, health=health)))
        seen.append(of(page(metrics), "powerd_gpu_energy_joules_total"))
    assert seen == [5, 9, 9.1, 9.1, 9.15, 11.1]


def test_what_the_daemon_tells_is_on_the_page() -> None:
    metrics = Metrics()
    metrics.build("1.2.3", simulated=True)
    metrics.restored(Restart.LEASE_END)
    metrics.restored(Restart.LEASE_END)
    metrics.restored(Restart.PANIC)
    metrics.drift(Control.SM_CLOCK)
    metrics.leases({LeaseState.ACTIVE: 3, LeaseState.DETACHED: 1})
    metrics.store(rows=10, dropped=2, errors=1, size_bytes=4096)
    metrics.was_set(Control.SM_CLOCK, 0.005)
    metrics.was_set(Control.SM_CLOCK, 0.25)
    metrics.set("powerd_hw_connected", 1)
    samples = page(metrics)
    assert of(samples, "powerd_build_info", version="1.2.3", simulated="true") == 1
    assert of(samples, "powerd_restore_total", cause="lease_end") == 2
    assert of(samples, "powerd_restore_total", cause="panic") == 1
    assert of(samples, "powerd_drift_total", control="sm_clock") == 1
    assert of(samples, "powerd_lease_active") == 3
    assert of(samples, "powerd_leases", state="detached") == 1
    assert of(samples, "powerd_leases", state="suspended") == 0
    assert of(samples, "powerd_store_dropped_total") == 2
    assert of(samples, "powerd_set_seconds_count", control="sm_clock") == 2
    assert of(samples, "powerd_set_seconds_sum", control="sm_clock") == 0.255


def test_openmetrics_is_served_when_asked_for_and_parses() -> None:
    metrics = Metrics()
    metrics.gpus([capabilities(A, 0)])
    metrics.observe(observed(FULL))
    metrics.was_set(Control.SM_CLOCK, 0.1)
    text, content_type = metrics.render(OPEN)
    assert content_type.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")
    families = {family.name: family for family in openmetrics(text.decode())}
    assert families["powerd_gpu_energy_joules"].type == "counter"
    assert b"_created" not in text
    assert metrics.render("text/plain")[1].startswith("text/plain")


def test_names_or_labels_outside_the_table_are_refused() -> None:
    metrics = Metrics()
    with pytest.raises(KeyError):
        metrics.set("powerd_nonsense", 1)
    with pytest.raises(ValueError, match="labels"):
        metrics.add("powerd_restore", 1)


def test_the_table_keeps_to_prometheus_rules() -> None:
    units = ("joules", "watts", "hertz", "celsius", "bytes", "seconds", "ratio")
    assert len({m.name for m in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"powerd_[a-z0-9_]+", metric.name)
        assert not metric.name.endswith(("_total", "_created", "_count", "_sum"))
        assert metric.help
        assert not metric.help.endswith(".")
        if metric.unit:
            assert metric.unit in units
            assert metric.name.endswith(metric.unit)


def test_docs_metrics_md_is_what_the_table_says() -> None:
    page_file = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert page_file.read_text() == documentation(), "run: python -m powerd.sinks.metrics > docs/metrics.md"


def test_a_counter_of_events_is_there_before_the_first_one() -> None:
    samples = page(Metrics())
    assert {labels[0][1] for (name, labels) in samples if name == "powerd_drift_total"} == {str(c) for c in Control}
    assert of(samples, "powerd_restore_total", cause="panic") == 0


def test_who_set_what_is_named_by_user_or_policy_and_baseline_by_nobody() -> None:
    metrics = Metrics()
    metrics.gpus([capabilities(A, 0), capabilities(B, 1)])
    lease = Want("l1", A, Control.SM_CLOCK, Interval(210, 1200), WantClass.LEASE, "tests")
    cap = Want("budget", B, Control.POWER_LIMIT, Interval(300_000, 300_000), WantClass.BUDGET, "tests")
    setpoints = [
        Setpoint(A, Control.SM_CLOCK, Interval(210, 1200), "l1", "tests", (lease,)),
        Setpoint(A, Control.POWER_LIMIT, None),
        Setpoint(B, Control.POWER_LIMIT, Interval(300_000, 300_000), "budget", "tests", (cap,)),
    ]
    show_setpoints(metrics, setpoints, {"l1": "ann", "l2": "ann", "l3": "bob"})
    samples = page(metrics)
    assert of(samples, "powerd_gpu_set_by", gpu="0", control="sm_clock", holder="ann") == 1
    assert of(samples, "powerd_gpu_set_by", gpu="1", control="power_limit", holder="budget") == 1
    assert [dict(labels)["class"] for (name, labels) in samples if name == "powerd_gpu_set_by"] == ["lease", "budget"]
    assert of(samples, "powerd_gpu_sm_clock_lock_hertz", gpu="0", bound="maximum") == 1.2e9
    assert of(samples, "powerd_user_leases", user="ann") == 2
    show_setpoints(metrics, [], {})
    assert not [name for (name, _) in page(metrics) if name in ("powerd_gpu_set_by", "powerd_user_leases")]


def test_a_named_job_is_shown_while_it_is_told_and_its_energy_never_falls() -> None:
    metrics = Metrics()
    job = JobView("tiny", "running", 0, None, 9, 1, 2.5, 4000.0, 400.0, 0.2, "p1", (A,))
    show_jobs(metrics, [job])
    samples = page(metrics)
    told = {name: of(samples, f"powerd_training_{name}", job_name="tiny") for name in ("energy_joules_total", "steps_total")}
    assert told == {"energy_joules_total": 4000, "steps_total": 10}
    assert of(samples, "powerd_training_step_energy_joules", job_name="tiny") == 400
    assert of(samples, "powerd_training_step_seconds", job_name="tiny") == 2.5
    assert of(samples, "powerd_training_saving_ratio", job_name="tiny") == 0.2
    show_jobs(metrics, [replace(job, energy_j=3900.0, saving_fraction=None)])
    assert of(page(metrics), "powerd_training_energy_joules_total", job_name="tiny") == 4000
    assert of(page(metrics), "powerd_training_saving_ratio", job_name="tiny") is None, "not measured any more"
    show_jobs(metrics, [replace(job, energy_j=4100.0, energy_per_retained_step_j=300.0)])
    assert of(page(metrics), "powerd_training_energy_joules_total", job_name="tiny") == 4100
    assert of(page(metrics), "powerd_training_step_energy_joules", job_name="tiny") == 300, "a gauge may fall"
    show_jobs(metrics, [])
    assert not [name for (name, _) in page(metrics) if name.startswith("powerd_training_")]
