"""`python -m benchmarks.dynamollm.parts`: how good forecasts are, what changes cost, when split phases pay, how long calls take.

House rules: forecasts are judged on what they were not made from; costs and watts are modelled and say so; a duration is the mean
of many calls on this machine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import numpy as np

from benchmarks.dynamollm import budgets
from benchmarks.report import Progress, Report, Table, run
from powerd.sim import enginemodels
from powerd.sim.replay import generate, session, trace, workload
from powerd.sim.replay.trace import WEEK_S, Trace
from powerd_policies.dynamollm.classes import NAMES, Classes
from powerd_policies.dynamollm.fleet import ClassLoad, FleetPlan, InstanceState, InstanceWant
from powerd_policies.dynamollm.lengths import Accuracy, LengthTable, accuracy, sizes_of
from powerd_policies.dynamollm.overheads import Fixes, Overheads
from powerd_policies.dynamollm.phases import Phases, mixed, split
from powerd_policies.dynamollm.predictor import DAY_S, LoadPredictor, Observed
from powerd_policies.dynamollm.reshard import plan_reshard
from powerd_policies.dynamollm.router import Router
from powerd_policies.dynamollm.steady import Lengths, Work

CLASSES = Classes()
EPOCH_S, BIN_S = 300.0, 60.0
HISTORY_SEED, DAY_SEED = 101, 102
CHANGES = (
    ((8,), (4, 4)),
    ((4, 4), (8,)),
    ((4,), (2, 2)),
    ((2, 2), (4,)),
    ((8,), (2, 2, 2, 2)),
    ((8,), (4, 2, 2)),
    ((4, 2, 2), (8,)),
)
LOADS = (
    (1.0, 600, 200, "MM"),
    (10.0, 600, 200, "MM"),
    (40.0, 600, 200, "MM"),
    (2.0, 3000, 50, "LS"),
    (10.0, 3000, 50, "LS"),
    (10.0, 150, 500, "SL"),
)
OBSERVE_US, ROUTE_US = 200.0, 20.0


def lengths(hour: Trace) -> Table:
    """Return how often sizes are said right on the second half of the trace by what the first half taught."""
    half = len(hour) // 2
    prompts, outputs = hour.prompt_tokens, hour.output_tokens
    commonest = int(np.bincount(sizes_of(outputs[:half], CLASSES)).argmax())

    def judged(caution: float) -> Accuracy:
        table = LengthTable.train(prompts[:half], outputs[:half], caution=caution)
        return accuracy(table, prompts[half:], outputs[half:], commonest)

    plain, cautious = judged(1.0), judged(3.0)
    rows = [("always the commonest size of the first half", f"{100 * plain.commonest:.1f}", "")]
    for name, found in (("table", plain), ("table, caution 3", cautious)):
        rows.append((name, f"{100 * found.right:.1f}", f"{100 * found.too_small:.1f}"))
    return Table(("answer's size on the second half", "right %", "said too small %"), tuple(rows))


def forecasts(hour: Trace) -> Table:
    """Return how far the forecast of the next minutes is from what came, in requests of all classes."""
    history = generate.generate(hour, WEEK_S, HISTORY_SEED)
    day = generate.generate(hour, DAY_S, DAY_SEED)
    past = list(workload.observations(history, CLASSES))
    rows = []
    for name, served, known in (
        ("trace of one hour, no history", hour, []),
        ("day, no history", day, []),
        ("day, a week known", day, past),
    ):
        for ahead_s in (EPOCH_S, 6 * EPOCH_S):
            said, mean, top = _forecast(served, known, ahead_s)
            cells = (
                f"{ahead_s / 60:.0f}",
                f"{(said / mean).mean():.2f}",
                f"{100 * (said < mean).mean():.0f}",
                f"{100 * (said < top).mean():.0f}",
            )
            rows.append((name, *cells))
    return Table(
        ("forecast of", "ahead min", "forecast / mean of the time", "below its mean % of times", "below its busiest minute %"),
        tuple(rows),
    )


def _forecast(served: Trace, known: Sequence[Observed], ahead_s: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    predictor = LoadPredictor()
    predictor.learn(known, shift_s=-WEEK_S)
    minutes = np.bincount((served.arrival_s // BIN_S).astype(int)) / BIN_S
    rows = []
    for now_s, window_s, arrivals in workload.observations(served, CLASSES, BIN_S):
        predictor.observe(now_s, window_s, arrivals)
        if now_s % EPOCH_S == 0 and now_s >= 2 * EPOCH_S and now_s + ahead_s <= served.length_s:
            came = minutes[int(now_s / BIN_S) : int((now_s + ahead_s) / BIN_S)]
            said = sum(rate.requests_per_s for rate in predictor.peak(now_s, now_s + ahead_s).values())
            rows.append((said, came.mean(), came.max()))
    said, mean, top = np.array(rows).T
    return said, mean, top


def reshards() -> Table:
    """Return what moves when parallelism changes, and what that takes, with the published fixes and without (modelled)."""
    fixed, raw = Overheads(), Overheads(Fixes.none())
    rows = []
    for old_tps, new_tps in CHANGES:
        names = iter(range(sum(old_tps)))
        old = tuple(tuple(f"gpu{next(names)}" for _ in range(tp)) for tp in old_tps)
        plan = plan_reshard(old, new_tps, weights_bytes=fixed.weights_bytes)
        seconds = (f"{o.reshard_s(old_tps[0], new_tps[0], plan.busiest_bytes):.2f}" for o in (fixed, raw))
        shares = (f"{100 * moved / plan.loaded_bytes:.0f}" for moved in (plan.moved_bytes, plan.naive_bytes))
        rows.append((f"{'+'.join(map(str, old_tps))} -> {'+'.join(map(str, new_tps))}", *shares, f"{plan.t_units:.1f}", *seconds))
    return Table(("TP", "moved %", "without matching %", "T", "s", "s, no fixes"), tuple(rows))


def starts() -> Table:
    """Return what a start and a clock take, with all fixes and with each taken away (modelled)."""
    rows = []
    cases = [
        ("all fixes", Fixes()),
        *((f"without {f.name}", replace(Fixes(), **{f.name: False})) for f in fields(Fixes)),
        ("none", Fixes.none()),
    ]
    for name, fixes in cases:
        cost = Overheads(fixes)
        moved = cost.reshard(8, 4, cost.weights_bytes // 8)
        rows.append(
            (
                name,
                f"{cost.start_s():.0f}",
                f"{cost.start_s() - cost.lead_s():.0f}",
                f"{moved.total_s:.2f}",
                f"{moved.blocked_s:.2f}",
                f"{1000 * cost.clock_set_s:.1f}",
            )
        )
    return Table(("fixes", "start s", "of it late s", "8 -> 4+4 s", "of it nobody serves s", "clock set ms"), tuple(rows))


def phases() -> Table:
    """Return the watts of the cheapest mixed and split fleets of 96 GPUs (modelled)."""
    model = enginemodels.load()

    def told(found: Phases | None) -> tuple[str, str]:
        if found is None:
            return "-", "none keeps the SLOs"
        return f"{found.power_w:.0f}", ", ".join(f"{s.instances} x TP{s.tp} at {s.clock_mhz}" for s in found.sides)

    rows = []
    for rate, prompt, output, name in LOADS:
        load = {name: Work(rate, Lengths.fixed(prompt, output))}
        rows.append((f"{rate:g}/s of {prompt}+{output}", *told(mixed(model, load, 96)), *told(split(model, load, 96))))
    return Table(("load", "mixed W", "mixed", "split W", "split: prefill, decode"), tuple(rows))


def speeds(report: Report) -> bool:
    """Add what one call takes; False when one takes longer than promised."""
    predictor = LoadPredictor()
    loads = {name: ClassLoad(3, 1500, 600) for name in NAMES}
    calls = iter(range(1, 10**9))
    observe_us = _mean_us(lambda: predictor.observe(5.0 * next(calls), 5.0, loads), 17_280)
    peak_us = _mean_us(lambda: predictor.peak(86_400.0, 88_200.0), 2000)
    model = enginemodels.load()
    clock_mhz = model.clocks_mhz(8)[0]
    states = tuple(InstanceState(f"i{n}", "one", 8, clock_mhz) for n in range(12))
    router = Router(model)
    router.update(
        FleetPlan(tuple(InstanceWant(s.id, s.pool, s.tp, s.clock_mhz) for s in states), dict.fromkeys(NAMES, ("one",))), states
    )

    def serve() -> None:
        instance = router.route(400, 1) or ""
        router.first_token(instance, 400)
        router.finished(instance)

    route_us = _mean_us(serve, 20_000)
    report.add("LoadPredictor.observe, nine classes", observe_us, "us", f"< {OBSERVE_US:g}")
    report.add("LoadPredictor.peak, nine classes", peak_us, "us")
    report.add("Router, a request from route to finished, 12 instances", route_us, "us", f"< {ROUTE_US:g}")
    return observe_us < OBSERVE_US and route_us < ROUTE_US


def _mean_us(call: Callable[[], object], times: int) -> float:
    begun_s = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begun_s) / times * 1e6


def measure(report: Report, progress: Progress) -> bool:
    """The parts of DynamoLLM by themselves."""
    report.title = "forecasts, changes and phases by themselves (costs and watts modelled)"
    hour = trace.read(session.shipped_hour())
    kept = speeds(report)
    for n, make in enumerate((lambda: lengths(hour), lambda: forecasts(hour), reshards, starts, phases)):
        report.tables.append(make())
        progress(0.5 * (n + 1) / 5)
    report.tables.append(budgets.table(lambda share: progress(0.5 + 0.5 * share)))
    report.notes += [
        "Last table: DynamoLLM on the hour, budgets as shares of the most it draws without one; a budget for the mean reckons"
        " with what the load makes likely, one for every moment with the most that its clocks can draw.",
        "Lengths: the shipped conversation trace. The day and the week before it are generated from its lengths"
        f" (seeds {DAY_SEED} and {HISTORY_SEED}).",
        "T is the time to move an eighth of the model, 50 ms over NVLink as published; what a fix leaves over is assumed.",
    ]
    return kept


if __name__ == "__main__":
    sys.exit(run("dynamollm-parts", "python -m benchmarks.dynamollm.parts", measure))
