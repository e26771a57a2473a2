"""Puts a report together: what the nodes told, the ledger's verdict on the job's steps, cost and carbon.

House rules: pure; the energy of a job is what its GPUs' counters say from its begin to its end, and what the job reported only
where no counter is stored; a figure of the whole needs every part.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from powerd import __version__
from powerd.cli.reports import model
from powerd.cli.reports.counters import GpuSeries, counted, summed, times
from powerd.cli.reports.model import Amount, Factors, Gap, Report
from powerd.cli.reports.nodes import NodeData
from powerd.energy import SensorErrors
from powerd.errors import RequestError
from powerd.jobs import BASELINE, PROFILE
from powerd_policies import ledger

J_PER_KWH = 3.6e6
SHOWN_STEPS = 2000
_POINTS = 500
_NONE = Amount(None, None, None, None)
_PRICE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([^\s/0-9]{0,8})\s*/\s*kwh\s*", re.I)
_FULL = "full clock"


@dataclass(frozen=True, slots=True)
class MergedStep:
    """One step of the job over all nodes."""

    step: int
    begin_ns: int
    end_ns: int
    time_s: float
    energy_j: float | None
    plan: str | None


def price(text: str | None) -> tuple[float | None, str]:
    """``0.12/kWh`` or ``0.12 EUR/kWh`` -> price and currency; RequestError for anything else."""
    if text is None:
        return None, ""
    if (match := _PRICE.fullmatch(text)) is None:
        raise RequestError(f"{text!r} is not a price", hint="write it like 0.12/kWh or 0.12EUR/kWh", code="bad_value")
    return float(match[1]), match[2]


def carbon(text: str | None) -> float | None:
    """``400g/kWh`` or ``0.4kg/kWh`` -> grams; RequestError for anything else."""
    if text is None:
        return None
    match = _PRICE.fullmatch(text)
    factors = {"g": 1.0, "kg": 1000.0}
    if match is None or match[2].lower() not in factors:
        raise RequestError(f"{text!r} is not a carbon factor", hint="write it like 400g/kWh", code="bad_value")
    return float(match[1]) * factors[match[2].lower()]


def build(
    nodes: Sequence[NodeData],
    *,
    job: str | None,
    begin_s: float,
    end_s: float,
    made_s: float,
    source: str,
    factors: Factors,
) -> Report:
    """The report of these nodes between two Unix times."""
    gaps: list[Gap] = []
    parts = tuple(_node(n, job, begin_s, end_s, gaps) for n in nodes if _belongs(n, job))
    others = [n.name for n in nodes if not _belongs(n, job)]
    if others and source == "nodes":
        gaps.append(Gap("report", f"job not known on {', '.join(others)}: counted as not taking part"))
    energy = summed([p.energy_j for p in parts])
    methods = sorted({p.method for p in parts if p.method != "none"})
    simulated = [n.simulated for n in nodes if n.simulated is not None]
    steps: list[MergedStep] = []
    job_part = saving = None
    if job is not None:
        taking = [n for n in nodes if n.job is not None]
        steps = merge(taking)
        if any(n.error for n in nodes):
            gaps.append(Gap("report", "steps and saving are those of the nodes that answered"))
        if taking:
            job_part = _job(taking, steps, begin_s, end_s, gaps, unreachable=any(n.error for n in nodes))
        else:
            gaps.append(Gap("report", "steps, goodput and saving are in the nodes' own stores: ask with --nodes"))
        saving = verdict(steps, job_part.plan if job_part else None, factors)
    return Report(
        schema=model.SCHEMA, powerd_version=__version__, title=f"Job {job}" if job is not None else "All GPUs", job_name=job,
        begin_s=begin_s, end_s=end_s, made_s=made_s, source=source, simulated=any(simulated) if simulated else None,
        energy_j=energy, method="+".join(methods) or "none", contains=("gpu",), lacks=("cpu", "dram", "other"),
        cost=None if factors.price_per_kwh is None else times(energy, factors.price_per_kwh / J_PER_KWH),
        carbon_g=None if factors.carbon_g_per_kwh is None else times(energy, factors.carbon_g_per_kwh / J_PER_KWH),
        factors=factors, job=job_part, saving=saving, nodes=parts, host_energy_j=_host(parts),
        steps=_thinned(steps), gaps=tuple(gaps),
    )  # fmt: skip


def _belongs(node: NodeData, job: str | None) -> bool:
    """An unreachable node might take part: it stays, as a part that is not known."""
    return job is None or node.error is not None or node.job is not None or bool(node.gpus)


def _node(node: NodeData, job: str | None, begin_s: float, end_s: float, gaps: list[Gap]) -> model.NodePart:
    if node.error is not None:
        gaps.append(Gap(node.name, f"unreachable: {node.error}"))
        return model.NodePart(node.name, node.error, _NONE, "none")
    gaps += [Gap(node.name, note) for note in node.notes]
    gpus = []
    for series in node.gpus:
        amount, notes = counted(series, begin_s, end_s)
        where = f"{node.name} GPU {series.uuid if series.index is None else series.index}"
        gaps += [Gap(where, note) for note in notes]
        method = "none" if amount.known is None else "counter"
        gpus.append(model.GpuPart(series.uuid, series.index, series.name, amount, method, "; ".join(notes)))
    reported = None if node.job is None else node.job.energy_j
    energy, method = summed([g.energy_j for g in gpus]), "counter"
    expected = len(node.job.gpus) if node.job is not None else len(gpus)
    if len(gpus) < expected:
        energy = Amount(None, None, None, energy.known)
    if energy.value is None and reported is not None and node.job is not None:
        whole = node.job.unmeasured_steps == 0
        gain = SensorErrors().counter_gain * reported
        if energy.known is None or whole:
            low, high = reported - gain, reported + gain
            energy = Amount(reported, low, high, reported) if whole else Amount(None, None, None, reported)
            method = "steps"
            gaps.append(Gap(node.name, "energy is of the job's own steps and checkpoints: what lay between them is not in it"))
    if energy.known is None:
        method = "none"
        gaps.append(Gap(node.name, "energy not measured"))
    host: dict[str, Amount] = {}
    for name, series in node.host.items():
        host[name], notes = counted(series, begin_s, end_s)
        gaps += [Gap(f"{node.name} {name.upper()}", note) for note in notes]
    power = _power(node.gpus, begin_s, end_s)
    return model.NodePart(node.name, None, energy, method, tuple(gpus), reported, power, host.get("cpu"), host.get("dram"))


def _host(parts: Sequence[model.NodePart]) -> Amount | None:
    """CPUs and DRAM of all nodes together; DRAM is a zone of its own on some machines only, CPUs are needed of each."""
    if all(p.cpu_energy_j is None for p in parts):
        return None
    return summed([a for p in parts for a in (p.cpu_energy_j or _NONE, p.dram_energy_j) if a is not None])


def _power(gpus: Sequence[GpuSeries], begin_s: float, end_s: float) -> model.PowerSeries | None:
    """The GPUs of a node together, where each of them was read."""
    by_time: dict[float, list[float | None]] = {}
    for series in gpus:
        for at_s, watts in zip(series.time_s, series.power_w, strict=True):
            if begin_s <= at_s <= end_s:
                by_time.setdefault(round(at_s), []).append(watts)
    if not by_time:
        return None
    ordered = sorted(by_time)
    thin = ordered[:: max(1, -(-len(ordered) // _POINTS))]
    sums = [None if len(by_time[t]) < len(gpus) or None in by_time[t] else sum(w or 0.0 for w in by_time[t]) for t in thin]
    return model.PowerSeries(tuple(float(t) for t in thin), tuple(sums))


def merge(nodes: Sequence[NodeData]) -> list[MergedStep]:
    """Steps of these nodes by their number: the slowest node's time, the sum of the energies; None where a node tells none."""
    rows = [{row.step: row for row in n.steps} for n in nodes]
    merged = []
    for number in sorted(set().union(*rows)) if rows else ():
        of = [r[number] for r in rows if number in r]
        energies = [row.energy_j for row in of]
        known = [e for e in energies if e is not None]
        energy = sum(known) if len(known) == len(nodes) else None
        plan = next((row.plan for row in of if row.plan is not None), None)
        merged.append(MergedStep(number, of[0].begin_ns, of[0].end_ns, max(row.time_s for row in of), energy, plan))
    return merged


def _thinned(steps: Sequence[MergedStep]) -> tuple[model.StepPoint, ...]:
    chosen = steps[:: max(1, -(-len(steps) // SHOWN_STEPS))]
    return tuple(model.StepPoint(s.step, s.time_s, s.energy_j, s.plan) for s in chosen)


def _plus(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) if known and len(known) == len(values) else None


def _job(
    nodes: Sequence[NodeData], steps: Sequence[MergedStep], begin_s: float, end_s: float, gaps: list[Gap], *, unreachable: bool
) -> model.JobPart:
    views = [n.job for n in nodes if n.job is not None]
    unmeasured = sum(v.unmeasured_steps for v in views)
    kept = max(v.steps for v in views)
    if len({v.steps for v in views}) > 1:
        gaps.append(Gap("report", "the nodes do not tell the same number of steps: some reports are under way or were lost"))
    if len(steps) < kept:
        gaps.append(Gap("report", f"{kept - len(steps)} of {kept} kept steps are no longer stored one by one"))
    whole = len(steps) >= kept and kept > 0
    energies = [s.energy_j for s in steps]
    useful = _plus(energies) if whole else None
    reported = None if unreachable else _plus([v.energy_j for v in views])
    checkpoints = _plus([v.checkpoint_energy_j for v in views if v.checkpoints])
    lost = None
    if max(v.lost_steps for v in views) == 0:
        lost = 0.0
    elif useful is not None and reported is not None and not unmeasured:
        lost = max(0.0, reported - useful - (checkpoints or 0.0))
    return model.JobPart(
        state=Counter(v.state for v in views).most_common(1)[0][0], steps=kept, lost_steps=max(v.lost_steps for v in views),
        unmeasured_steps=unmeasured,
        step_time_s=statistics.median(s.time_s for s in steps) if steps else None,
        energy_per_kept_step_j=None if reported is None or not kept or unmeasured else reported / kept,
        goodput_ratio=min(1.0, sum(s.time_s for s in steps) / (end_s - begin_s)) if whole and end_s > begin_s else None,
        lost_energy_j=lost, checkpoints=max(v.checkpoints for v in views),
        checkpoint_time_s=max(v.checkpoint_time_s for v in views), checkpoint_energy_j=checkpoints,
        exceptions=sum(v.exceptions for v in views), plan=next((v.plan for v in views if v.plan is not None), None),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Armed:
    """A step whose plan is its arm."""

    plan: str
    begin_ns: int
    end_ns: int
    time_s: float
    energy_j: float | None


def verdict(steps: Sequence[MergedStep], plan: str | None, factors: Factors) -> model.Saving:
    """What the job's own steps prove of its plan (else of the one with most steps) against its steps at full clock."""
    counts = Counter(s.plan for s in steps)
    marked = BASELINE if counts[BASELINE] else _FULL
    plans = [(n, p) for p, n in counts.items() if p not in (None, BASELINE, PROFILE)]
    chosen = plan if counts[plan] and plan not in (None, BASELINE, PROFILE) else max(plans)[1] if plans else None
    armed = [_Armed(s.plan or _FULL, s.begin_ns, s.end_ns, s.time_s, s.energy_j) for s in steps]
    blocks = ledger.blocks_of_steps(armed)
    found = ledger.assess(blocks, marked, chosen or "any plan")
    why = found.why
    if chosen is None:
        why = "no step ran under a plan"
    elif not counts[BASELINE] + counts[None]:
        why = f"no step at {_FULL} to compare with"
    text = f"not proven: {why}" if found.saving is None else str(found)
    saved = _saved(steps, chosen, found) if found.proven else None
    price_j = None if factors.price_per_kwh is None else factors.price_per_kwh / J_PER_KWH
    carbon_j = None if factors.carbon_g_per_kwh is None else factors.carbon_g_per_kwh / J_PER_KWH
    against = "steps marked baseline" if marked == BASELINE else "steps without a plan"
    return model.Saving(
        found.outcome, text, against, chosen or "", found.method,
        found.confidence, found.pairs, found.blocks, found.unmeasured, _share(found.saving), _share(found.slowdown), saved,
        None if saved is None or price_j is None else times(saved, price_j),
        None if saved is None or carbon_j is None else times(saved, carbon_j), why,
    )  # fmt: skip


def _share(found: ledger.Share | None) -> model.ShareWithInterval | None:
    return None if found is None else model.ShareWithInterval(found.value, found.low, found.high)


def _saved(steps: Sequence[MergedStep], plan: str | None, found: ledger.Verdict) -> Amount | None:
    """What the steps under the plan would have used more at full clock."""
    used = _plus([s.energy_j for s in steps if s.plan == plan])
    if used is None or found.saving is None:
        return None
    value, low, high = (used * s / (1 - s) for s in (found.saving.value, found.saving.low, found.saving.high))
    return Amount(value, low, high, value)
