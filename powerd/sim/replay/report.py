"""What a policy did, in figures: report.json.

House rules: a request is within its SLO when its first token and the P99 of its own gaps were in time; rejected, late and
unfinished ones are misses; a figure that does not exist is null, never 0; GPUs that are off count 0 W in ``energy_kwh``, and what
a GPU without a context draws (72 W) in the figure beside it. ``cost_usd`` is of GPUs that are on and, where the scenario states a
price of electricity, of their energy at the price of its time. ``tbt_p50_s`` is the median over requests of their mean gap,
``tbt_p99_s`` the P99 over requests of the P99 of their own gaps, which is what the SLO is about.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from powerd.sim.replay.runner import Outcome, Setting
from powerd.sim.replay.scenario import PricesSection
from powerd.sim.replay.workload import Workload
from powerd_policies.dynamollm.classes import NAMES, Classes
from powerd_policies.dynamollm.fleet import FleetEvent

J_PER_KWH: Final = 3.6e6
MOST_EVENTS: Final = 500
#: Told in report.json before others when there are more events than fit.
_TOLD_FIRST: Final = ("infeasible", "emergency", "rollback", "reshard", "merge", "scale", "gate", "misprediction")


def within_slo(outcome: Outcome, workload: Workload, classes: Classes) -> NDArray[np.bool_]:
    """Return for each request of the workload whether it was served as promised."""
    requests, results = workload.requests, outcome.results
    ttft_s, tbt_s = (
        np.array([getattr(classes.slos[name], slo) for name in NAMES])[requests.true_class] for slo in ("ttft_s", "tbt_s")
    )
    finished = results.finished
    gaps_kept = np.where(np.isnan(results.tbt_p99_s), True, results.tbt_p99_s <= tbt_s)  # one token has no gap
    return np.asarray(finished & (results.ttft_s <= ttft_s) & gaps_kept)


def attainment(outcome: Outcome, workload: Workload, classes: Classes) -> tuple[float, dict[str, float]]:
    """Return the share within SLO of all requests, those beyond the context limit included, and of each class that occurs."""
    kept, true = within_slo(outcome, workload, classes), workload.requests.true_class
    total = float(kept.sum() / (len(kept) + workload.oversize))
    return total, {name: float(kept[true == n].mean()) for n, name in enumerate(NAMES) if (true == n).any()}


def of_policy(outcome: Outcome, workload: Workload, setting: Setting, prices: PricesSection) -> dict[str, Any]:
    """Return one entry of report.json's ``policies``."""
    results, true = outcome.results, workload.requests.true_class
    kept, gaps_s = within_slo(outcome, workload, setting.classes), _mean_gap_s(outcome, workload)
    rejected = np.asarray(results.rejected)
    # What nobody's request is to blame for (idle GPUs, starts) is shared in proportion to what requests used.
    joules = results.energy_j * (results.total_j / (results.energy_j.sum() or 1.0))
    power_w = np.asarray(results.power_w)
    times_s: NDArray[np.float64] = (np.arange(float(len(power_w))) + 0.5) * setting.config.tick_s
    energy_kwh = results.total_j / J_PER_KWH
    inside = power_w[: max(1, int(workload.length_s // setting.config.tick_s))]
    gpu_hours = results.gpu_hours
    tick_kwh = power_w * setting.config.tick_s / J_PER_KWH
    carbon_g = None if setting.carbon is None else float(np.dot(tick_kwh, setting.carbon.over(times_s)))
    energy_usd = 0.0 if setting.price is None else float(np.dot(tick_kwh, setting.price.over(times_s)))
    made = {
        "energy_kwh": energy_kwh,
        "energy_kwh_off_72w": (results.total_j + max(0.0, results.off_j)) / J_PER_KWH,
        "gpu_hours": gpu_hours,
        "carbon_kg": None if carbon_g is None else carbon_g / 1000,
        "cost_usd": gpu_hours * prices.usd_per_gpu_hour + energy_usd,
        "power_p50_w": float(np.percentile(inside, 50)),
        "power_p99_w": float(np.percentile(inside, 99)),
        "requests": len(kept) + workload.oversize,
        "rejected": int(rejected.sum()) + workload.oversize,
        "unfinished": int((~results.finished & ~rejected).sum()),
        "slo_attainment": float(kept.sum() / (len(kept) + workload.oversize)),
        "classes": {name: _of_class(outcome, kept, true == n, gaps_s, joules) for n, name in enumerate(NAMES)},
        "event_counts": dict(sorted(Counter(event.kind for event in outcome.events).items())),
        "events": _told(outcome.events),
    }
    return made


def _mean_gap_s(outcome: Outcome, workload: Workload) -> NDArray[np.float64]:
    requests, results = workload.requests, outcome.results
    gaps = np.where(requests.output_tokens > 1, requests.output_tokens - 1.0, np.nan)
    return np.asarray((results.finish_s - requests.arrival_s - results.ttft_s) / gaps)


def _of_class(
    outcome: Outcome, kept: NDArray[np.bool_], here: NDArray[np.bool_], gaps_s: NDArray[np.float64], joules: NDArray[np.float64]
) -> dict[str, Any]:
    results, count = outcome.results, int(here.sum())
    made: dict[str, Any] = {"requests": count, "slo_attainment": float(kept[here].mean()) if count else None}
    for key, q, values in (
        ("ttft_p50_s", 50, results.ttft_s), ("ttft_p99_s", 99, results.ttft_s),
        ("tbt_p50_s", 50, gaps_s), ("tbt_p99_s", 99, results.tbt_p99_s),
    ):  # fmt: skip
        known = values[here & np.isfinite(values)]
        made[key] = float(np.percentile(known, q)) if len(known) else None
    made["energy_per_request_j"] = float(joules[here].mean()) if count else None
    return made


def _told(events: tuple[FleetEvent, ...]) -> list[dict[str, Any]]:
    """At most ``MOST_EVENTS``, rare and weighty kinds first, in order of time."""
    rank = {kind: n for n, kind in enumerate(_TOLD_FIRST)}
    chosen = sorted(sorted(events, key=lambda e: rank.get(e.kind, len(rank)))[:MOST_EVENTS], key=lambda e: e.at_s)
    return [{"at_s": e.at_s, "kind": e.kind, "subject": e.subject, "detail": e.detail} for e in chosen]
