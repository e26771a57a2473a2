"""The planner's Prometheus page: one table of metrics, read out when somebody scrapes.

House rules: a series that is not in METRICS does not exist; base units; what is unknown is an absent series, never 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from powerd_integrations.fleet.planner import PlannerFigures
from powerd_integrations.fleet.published import Group, PublishedPlan

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table, with the name as it is exposed."""

    name: str
    kind: str  # counter, gauge
    labels: tuple[str, ...]
    help: str


METRICS: Final = (
    Metric("powerd_desired_replicas", "gauge", ("pool", "tp"), "Replicas that the plan wants of a pool at a tensor parallelism"),
    Metric("powerd_serving_replicas", "gauge", ("pool", "tp"), "Replicas that reported lately that they serve"),
    Metric("powerd_desired_clock_hertz", "gauge", ("pool", "tp"), "SM clock that the plan counted with"),
    Metric("powerd_fleet_plan_version", "gauge", (), "Rises when the plan changes"),
    Metric("powerd_fleet_plan_held", "gauge", (), "1 while input is stale or the controller failed: nothing shrinks"),
    Metric("powerd_fleet_decided_timestamp_seconds", "gauge", (), "When a controller last decided; absent before the first time"),
    Metric("powerd_fleet_published_timestamp_seconds", "gauge", (), "When the planner last said that the plan holds"),
    Metric("powerd_fleet_decisions_total", "counter", (), "Times that the controller was asked"),
    Metric("powerd_fleet_decide_seconds_total", "counter", (), "Time that the controller took"),
    Metric("powerd_fleet_failures_total", "counter", (), "Times that the controller failed"),
    Metric("powerd_fleet_held_ticks_total", "counter", (), "Rounds in which the last plan was held"),
    Metric("powerd_fleet_requests_total", "counter", ("request_class",), "Requests that routers reported, by class"),
    Metric("powerd_fleet_resteered_total", "counter", (), "Waiting requests that routers sent elsewhere in an emergency"),
    Metric("powerd_fleet_rejected_total", "counter", (), "Waiting requests that routers rejected in an emergency"),
)

_Sample = tuple[tuple[str, ...], float]


def samples(plan: PublishedPlan, figures: PlannerFigures) -> dict[str, list[_Sample]]:
    """Return label values and value of every series, by the metric's name."""

    def groups(counts: Iterable[tuple[Group, float]]) -> list[_Sample]:
        return [((group.pool, str(group.tp)), float(n)) for group, n in sorted(counts)]

    def one(value: float | None) -> list[_Sample]:
        return [] if value is None else [((), float(value))]

    return {
        "powerd_desired_replicas": groups(plan.desired.items()),
        "powerd_serving_replicas": groups(figures.serving.items()),
        "powerd_desired_clock_hertz": groups((group, 1e6 * mhz) for group, mhz in plan.clocks_mhz.items()),
        "powerd_fleet_plan_version": one(plan.version),
        "powerd_fleet_plan_held": one(bool(plan.held)),
        "powerd_fleet_decided_timestamp_seconds": one(plan.decided_unix_s),
        "powerd_fleet_published_timestamp_seconds": one(plan.published_unix_s),
        "powerd_fleet_decisions_total": one(figures.decisions),
        "powerd_fleet_decide_seconds_total": one(figures.decide_seconds),
        "powerd_fleet_failures_total": one(figures.failures),
        "powerd_fleet_held_ticks_total": one(figures.held_ticks),
        "powerd_fleet_requests_total": [((name,), float(n)) for name, n in sorted(figures.requests.items())],
        "powerd_fleet_resteered_total": one(figures.resteered),
        "powerd_fleet_rejected_total": one(figures.rejected),
    }


def page(plan: PublishedPlan, figures: PlannerFigures) -> str:
    """Return the page in Prometheus' text format."""
    found = samples(plan, figures)
    lines = []
    for metric in METRICS:
        lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
        for values, number in found[metric.name]:
            labels = ",".join(f'{label}="{_escaped(value)}"' for label, value in zip(metric.labels, values, strict=True))
            lines.append(f"{metric.name}{{{labels}}} {number!r}" if labels else f"{metric.name} {number!r}")
    return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
