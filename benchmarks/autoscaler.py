"""What following the plan costs: Serve's controller waits for the policy, so its call must be short.

House rules: real objects of the integration, no Ray; a plan of 1,000 GPUs that is replaced as a planner does it.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.report import Progress, Report, percentile
from powerd_integrations.fleet.published import Group, PublishedPlan, Serving, to_json, write_plan
from powerd_integrations.ray_serve.policy import PowerdPolicy
from powerd_policies.dynamollm.classes import NAMES

CALLS = 30_000
CHANGES = 200


@dataclass
class Context:
    """What the policy reads of Serve's ``AutoscalingContext``."""

    target_num_replicas: int = 3
    total_queued_requests: float = 0.0


def plan() -> PublishedPlan:
    """Nine pools at two parallelisms, 1,000 GPUs."""
    groups = [Group(name, tp) for name in NAMES for tp in (4, 8)]
    desired = {group: 1000 // 18 // group.tp + 1 for group in groups}
    serving = tuple(Serving(f"{group}-{n}", group, 1410) for group, count in desired.items() for n in range(count))
    routes = {name: tuple(group for group in groups if group.pool == name) for name in NAMES}
    return PublishedPlan(1, time.time(), time.time(), "dynamollm", desired=desired, routes=routes, serving=serving)


def autoscaler(report: Report, progress: Progress) -> None:
    """Calls of the autoscaling policy while a planner replaces the plan twenty times a second."""
    report.title = "Ray Serve's policy call, a plan of 1,000 GPUs"
    with tempfile.TemporaryDirectory() as folder:
        path, now = Path(folder) / "plan.json", plan()
        write_plan(now, path)
        policy, context = PowerdPolicy(str(path), "LL", 8), Context()
        calls, begun = [], time.monotonic()
        for number in range(CHANGES):
            write_plan(replace(now, version=number + 2), path)
            calls += [_call(policy, context) for _ in range(CALLS // CHANGES)]
            threading.Event().wait(max(0.0, begun + 0.05 * number - time.monotonic()))
            progress(number / CHANGES)
        size = len(json.dumps(to_json(now)))
    report.add("call, p50", 1e6 * percentile(calls, 0.5), "us")
    report.add("call, p99", 1e6 * percentile(calls, 0.99), "us", "< 1000")
    report.add("call, longest", 1e6 * max(calls), "us")
    report.add("plan file", size / 1e3, "kB")


def _call(policy: PowerdPolicy, context: Context) -> float:
    begun = time.perf_counter()
    policy(context)  # type: ignore[arg-type]
    return time.perf_counter() - begun
