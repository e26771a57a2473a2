"""`python -m benchmarks.dynamollm` (`make bench-dynamollm`): DynamoLLM beside its baselines, the published figures and its parts.

House rules: each part is a section of results.md of its own; all of them run, whatever one of them says; everything is modelled.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.dynamollm import ablation, accuracy, apart, parts, sensitivity, speed, study, traces
from benchmarks.dynamollm.study import BASE, FULL, STATIC, saving
from benchmarks.report import Progress, Report, Table, bar, write
from powerd.sim.replay import session
from powerd.sim.replay.compare import compare

#: What was published, against SinglePool (DynamoLLM, HPCA'25): a week's energy, cost and carbon, a day's power.
PUBLISHED = {"energy_kwh": -0.53, "power_p50_w": -0.43, "power_p99_w": -0.09, "cost_usd": -0.61, "carbon_kg": -0.38}
WORDS = {
    "energy_kwh": "energy",
    "power_p50_w": "power, p50",
    "power_p99_w": "power, p99",
    "cost_usd": "cost",
    "carbon_kg": "carbon",
}


@dataclass(frozen=True, slots=True)
class Options:
    """How much is run."""

    quick: bool
    jobs: int
    policies: tuple[str, ...]


def _study(case: Callable[[], traces.Case], loads: tuple[float, ...]) -> Callable[..., bool]:
    def measure(report: Report, progress: Progress, options: Options) -> bool:
        scenario = session.scenario(None)
        wanted = (1.0, 0.7) if options.quick else loads
        done = study.run(case(), scenario, wanted, options.policies, options.jobs, progress)
        report.title = (
            f"the {done.case.name}, modelled: {len(done.case.trace)} requests at their own load, at most {scenario.gpus} GPUs"
        )
        kept = study.tell(report, done)
        if done.case.name != "hour":
            report.tables.append(_published(done))
        elif not options.quick:
            report.tables.append(_second_half(done.load))
            report.notes.append(
                "Last table: the second half alone, from a cold start at the same load; lengths are of the first half."
                " Knobs were fixed on this hour under other jitter seeds and half a day of another seed: not quite held out."
            )
        return kept

    return measure


def _second_half(load: float) -> Table:
    whole = traces.hour().trace
    half = traces.Case("second half", whole.between(whole.length_s / 2, whole.length_s), None)
    comparison = traces.prepared(half, load, session.scenario(None))
    rows = {summary.policy: summary.entry for summary in compare((BASE, STATIC, FULL), comparison)}
    cells = [(name, f"{entry['energy_kwh']:.4g}", f"{saving(rows, name):.1%}", f"{entry['slo_attainment']:.2%}")
             for name, entry in rows.items()]  # fmt: skip
    return Table(("second half", "energy (kWh)", "saving", "in SLO"), tuple(cells))


def _published(done: study.Study) -> Table:
    rows = done.rows[1.0]
    ours = [name for name in (FULL, STATIC) if name in rows]
    cells = [(WORDS[key], f"{value:+.0%}", *(f"{-saving(rows, name, key):+.0%}" for name in ours))
             for key, value in PUBLISHED.items()]  # fmt: skip
    return Table(("against SinglePool", "published", *(f"{name} here" for name in ours)), tuple(cells))


def _ablation(report: Report, progress: Progress, options: Options) -> bool:
    cases = [traces.hour()] if options.quick else [traces.hour(), traces.day()]
    report.title = "where the saving comes from, at load 1.0, modelled"
    report.tables.append(ablation.table(cases, session.scenario(None), progress))
    return True


def _sensitivity(report: Report, progress: Progress, options: Options) -> bool:
    report.title = "the saving over the assumed clock dimension, the hour at load 1.0, modelled"
    scenario, hour = session.scenario(None), traces.hour()
    report.tables.append(sensitivity.table(hour, scenario, lambda share: progress(0.8 * share)))
    report.tables.append(sensitivity.by_chunk(hour, scenario, lambda share: progress(0.8 + 0.2 * share)))
    report.notes.append(
        "Sensitivity 0: decode slows with the clock as prefill does; 1: as suggested. Knee: share of the highest clock."
    )
    return True


def _speed(report: Report, progress: Progress, options: Options) -> bool:
    report.title = "speed of replays and decisions, one core"
    week = None if options.quick else traces.week()
    return speed.measure(report, traces.hour(), week, session.scenario(None), progress)


def _phases(report: Report, progress: Progress, options: Options) -> bool:
    report.title = "prefill and decode apart, the hour, modelled"
    loads = (1.0,) if options.quick else study.LOADS
    return apart.measure(report, traces.hour(), session.scenario(None), loads, progress)


PARTS: dict[str, Callable[[Report, Progress, Options], bool]] = {
    "hour": _study(traces.hour, study.LOADS),
    "day": _study(traces.day, study.LOADS),
    "week": _study(traces.week, study.LOADS),
    "ablation": _ablation,
    "sensitivity": _sensitivity,
    "phases": _phases,
    "speed": _speed,
    "parts": lambda report, progress, options: parts.measure(report, progress),
    "accuracy": lambda report, progress, options: accuracy.measure(report, progress),
}


def main(argv: list[str] | None = None) -> int:
    """Run the parts; 0 when every promise is kept."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dynamollm", description=(__doc__ or "").partition(":")[2].strip())
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--quick", action="store_true", help="the hour alone, three policies: a minute")
    parser.add_argument("--policies", help=f"of hour, day and week; comma separated, {BASE} and {FULL} among them; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="policies that run at a time")
    parser.add_argument("--json", action="store_true", help="one JSON object per part")
    parser.add_argument("--write", action="store_true", help="rewrite their sections in benchmarks/results.md")
    given = parser.parse_args(argv)
    policies = tuple(given.policies.split(",")) if given.policies else (BASE, STATIC, FULL) if given.quick else study.ALL
    names = given.parts or [name for name in PARTS if not (given.quick and name in ("day", "week"))]
    failed = []
    for name in names:
        report = Report(f"dynamollm-{name}", name, simulated=False, command=f"python -m benchmarks.dynamollm {name}")
        try:
            if not PARTS[name](report, bar(name), Options(given.quick, given.jobs, policies)):
                failed.append(name)
        except Exception as error:  # the others still run
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            failed.append(name)
            continue
        print(json.dumps(report.as_dict()) if given.json else report.markdown(), flush=True)
        if given.write and not given.quick:
            write([report])
    for name in failed:
        print(f"dynamollm {name}: failed, or a promise is not kept", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
