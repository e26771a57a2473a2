"""Clocks that take time to change: what a plan becomes then, and how to keep it in time with few changes.

House rules: pure; the clock for an instruction is announced when the one before it on its rank ends; the driver takes
``latency_s`` per change, one at a time on a node, and the old clock holds meanwhile, so that an instruction may run its first
part at the old clock; energy includes blocking until the deadline.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from powerd.errors import RequestError
from powerd_policies.perseus.problem import Floats, Ints, Option, Plan, Problem, Realised

LATE = 1e-9  # of the deadline
ROUNDS = 60  # of repairs
TIGHTER = (0.5, 1.0, 1.5)  # of what the plan was late: by how much to plan for an earlier deadline
RECLAIMED = 20_000  # instructions run while taking repairs back
CALM = 0.1  # of what blocking for its latency takes: what a change counts beside its energy
SHY = (0.0, 1.0, 4.0, 16.0, 64.0)  # how dearly a change is counted; the least energy in time wins


@dataclass(frozen=True, slots=True)
class Switching:
    """How clocks change."""

    latency_s: float = 0.005
    serialised: bool = True  # one change at a time per node
    min_dwell_s: float = 0.0  # a clock is held at least so long before the next change is begun
    ranks_per_node: int = 8

    def __post_init__(self) -> None:
        for name in ("latency_s", "min_dwell_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise RequestError(f"{name} is 0 s or more, not {value}", code="bad_value")
        if self.ranks_per_node < 1:
            raise RequestError(f"a node has one rank or more, not {self.ranks_per_node}", code="bad_value")


def realise(plan: Plan, switching: Switching) -> Realised:
    """Run the plan in this model, every rank starting at the clock of its first instruction."""
    return _Pipeline(plan.problem, switching).run(plan.choice, plan.deadline_s)


class _Pipeline:
    """One problem's ranks and their clocks; built once, run with many plans."""

    def __init__(self, problem: Problem, switching: Switching) -> None:
        self.problem, self.switching = problem, switching
        dag = problem.dag
        self.orders: list[list[int]] = [[] for _ in range(dag.ranks)]
        for node, rank in enumerate(dag.rank.tolist()):
            self.orders[rank].append(node)
        self.previous = np.full(len(dag.nodes), -1)
        self.next = np.full(len(dag.nodes), -1)
        for order in self.orders:
            self.previous[order[1:]] = order[:-1]
            self.next[order[:-1]] = order[1:]
        self.table = problem.table.tolist()
        self.rank = dag.rank.tolist()
        self.at_clock: dict[tuple[int, int], tuple[float, float]] = {}

    def clocks(self, choice: Ints) -> list[int | None]:
        """Of every node: its clock in MHz, None where it does not matter."""
        return [self.problem.tables[table][option].mhz for table, option in zip(self.table, choice.tolist(), strict=True)]

    def _cost(self, table: int, mhz: int) -> tuple[float, float]:
        """Time and energy of an instruction at a clock, between the options measured next to it where it has none."""
        key = (table, mhz)
        if key not in self.at_clock:
            measured = (self.problem.measured or self.problem.tables)[table]
            rows = sorted((o.mhz, o.time_s, o.energy_j) for o in measured if o.mhz is not None)
            known, times, energies = (np.array(column, float) for column in zip(*rows, strict=True))
            self.at_clock[key] = (float(np.interp(mhz, known, times)), float(np.interp(mhz, known, energies)))
        return self.at_clock[key]

    def run(self, choice: Ints, deadline_s: float) -> Realised:
        """See ``realise``."""
        dag, how = self.problem.dag, self.switching
        nodes = len(dag.nodes)
        wanted = self.clocks(choice)
        waiting = [len(set(before) | ({previous} if previous >= 0 else set())) for before, previous in
                   zip(dag.before, self.previous.tolist(), strict=True)]  # fmt: skip
        start, times = np.zeros(nodes), np.zeros(nodes)
        clock: list[int | None] = [None] * dag.ranks  # what was last asked for
        pending: list[list[tuple[float, int]]] = [[] for _ in range(dag.ranks)]  # (holds from, clock), in order
        driver: dict[int, float] = {}
        held = [-math.inf] * dag.ranks
        switches = 0
        busy_j = 0.0
        for rank, order in enumerate(self.orders):
            asked = [wanted[node] for node in order if wanted[node] is not None]
            if asked:
                clock[rank] = asked[0]
                pending[rank].append((-math.inf, int(asked[0] or 0)))
                switches += asked[0] != asked[-1]  # back again between iterations, when nobody waits
        running: list[tuple[float, int]] = []
        for node in range(nodes):
            if not waiting[node]:
                start[node], times[node], energy = 0.0, *self._spend(node, choice, wanted, pending, 0.0)
                busy_j += energy
                heapq.heappush(running, (times[node], node))
        total = 0.0
        while running:
            now, node = heapq.heappop(running)
            total = max(total, now)
            rank, follower = self.rank[node], int(self.next[node])
            if follower >= 0 and (mhz := wanted[follower]) is not None and mhz != clock[rank]:
                place = rank // how.ranks_per_node if how.serialised else -1 - rank
                begin = max(now, driver.get(place, 0.0), held[rank] + how.min_dwell_s)
                driver[place] = held[rank] = begin + how.latency_s
                pending[rank].append((held[rank], mhz))
                clock[rank] = mhz
                switches += 1
            for after in {*dag.after[node], follower} - {-1}:
                waiting[after] -= 1
                if not waiting[after]:
                    start[after], times[after], energy = now, *self._spend(after, choice, wanted, pending, now)
                    busy_j += energy
                    heapq.heappush(running, (now + times[after], after))
        blocked_s = dag.ranks * deadline_s - float(times.sum())
        return Realised(start, times, float(total), float(busy_j + self.problem.blocking_power_w * blocked_s), switches)

    def _spend(
        self, node: int, choice: Ints, wanted: list[int | None], pending: list[list[tuple[float, int]]], now: float
    ) -> tuple[float, float]:
        """Seconds and joules of an instruction that begins now, at whatever clock holds and those about to."""
        table = self.table[node]
        option: Option = self.problem.tables[table][int(choice[node])]
        steps = pending[self.rank[node]]
        while len(steps) > 1 and steps[1][0] <= now:
            steps.pop(0)
        if wanted[node] is None or len(steps) == 1:
            return option.time_s, option.energy_j
        done, at, energy = 0.0, now, 0.0
        for index, (_, mhz) in enumerate(steps):
            time_s, energy_j = (option.time_s, option.energy_j) if mhz == option.mhz else self._cost(table, mhz)
            until = steps[index + 1][0] if index + 1 < len(steps) else math.inf
            share = min(1.0 - done, (until - at) / time_s)
            done, at, energy = done + share, at + share * time_s, energy + share * energy_j
            if done >= 1.0 or math.isinf(until):
                break
            at = until
        return at - now, energy


def settle(plan: Plan, switching: Switching, tighter: Callable[[float], Plan | None] | None = None) -> Plan:
    """The plan made to keep its deadline with clocks that take time to change, at the least energy found.

    ``tighter`` plans for an earlier deadline, or says that there is none: room for the changes. RequestError when nothing keeps
    the deadline: the message says what would.
    """
    pipeline = _Pipeline(plan.problem, switching)
    best: Plan | None = None
    soonest = math.inf
    late_s = pipeline.run(plan.choice, plan.deadline_s).iteration_time_s - plan.deadline_s
    plans = [plan]
    if late_s > LATE * plan.deadline_s and tighter is not None:
        plans += [found for share in TIGHTER if (found := tighter(plan.deadline_s - share * late_s)) is not None]
    for start, origin in [(start, source.choice) for source in plans for start in _starts(source, pipeline)]:
        choice = start
        for _ in range(ROUNDS):
            realised = pipeline.run(choice, plan.deadline_s)
            soonest = min(soonest, realised.iteration_time_s)
            if realised.iteration_time_s <= plan.deadline_s * (1 + LATE):
                found = _reclaimed(pipeline, replace(plan, choice=choice, realised=realised), origin)
                if best is None or _worth(found, switching.latency_s) < _worth(best, switching.latency_s):
                    best = found
                break
            faster = _repaired(pipeline, choice, realised, plan.deadline_s)
            if faster is None:
                break
            choice = faster
    if best is None:
        raise RequestError(
            f"no plan found ends within {plan.deadline_s:.6g} s when a clock takes {switching.latency_s:g} s to change: "
            f"the shortest takes {soonest:.9g} s",
            hint="ask for a later deadline",
            code="bad_value",
        )
    return best


def _reclaimed(pipeline: _Pipeline, plan: Plan, origin: Ints) -> Plan:
    """Repairs taken back, half of them at a time, where the run stays in time and takes less without them."""
    best, latency_s = plan, pipeline.switching.latency_s
    parts = [np.flatnonzero(plan.choice != origin)]
    for _ in range(max(8, RECLAIMED // len(origin))):
        if not parts:
            break
        part = parts.pop(0)
        if not len(part):
            continue
        choice = best.choice.copy()
        choice[part] = origin[part]
        realised = pipeline.run(choice, plan.deadline_s)
        tried = replace(best, choice=choice, realised=realised)
        if realised.iteration_time_s <= plan.deadline_s * (1 + LATE) and _worth(tried, latency_s) < _worth(best, latency_s):
            best = tried
        elif len(part) > 1:
            parts += [part[: len(part) // 2], part[len(part) // 2 :]]
    return best


def _worth(plan: Plan, latency_s: float) -> float:
    """What is minimised: energy, and a little for every change, so that of two like plans the calmer one is taken."""
    if plan.realised is None:
        return math.inf
    return plan.realised.energy_j + CALM * latency_s * plan.problem.blocking_power_w * plan.realised.switches


def _starts(plan: Plan, pipeline: _Pipeline) -> list[Ints]:
    """The plan with fewer and fewer changes, and at last every rank at one clock: its highest, the one it needs, its fastest."""
    starts = [_merged(plan, pipeline, shy) for shy in SHY]
    highest = plan.choice.copy()
    for node, table in enumerate(pipeline.table):
        highest[node] = max(range(len(options := plan.problem.tables[table])), key=lambda index: options[index].mhz or 0)
    quickest = [int(np.argmin(times)) for times in plan.problem.columns.times_s]
    return [*starts, highest, np.array(quickest)[plan.problem.table]]


def _option_at(problem: Problem, table: int, mhz: int | None) -> int | None:
    """The option of a table at this clock."""
    return next((index for index, option in enumerate(problem.tables[table]) if option.mhz == mhz), None)


def _merged(plan: Plan, pipeline: _Pipeline, shy: float) -> Ints:
    """Neighbours on a rank put on one clock, never to a slower one, where that costs less than the changes it saves."""
    problem, how = plan.problem, pipeline.switching
    choice = plan.choice.copy()
    clock = pipeline.clocks(choice)
    columns = problem.columns
    for order in pipeline.orders:
        chain = [node for node in order if clock[node] is not None]
        changed = True
        while changed and shy:
            changed = False
            for place, node in enumerate(chain):
                around = [clock[chain[other]] for other in (place - 1, place + 1) if 0 <= other < len(chain)]
                table, now = pipeline.table[node], clock[node]
                for mhz in {other for other in around if other != now}:
                    option = _option_at(problem, table, mhz)
                    if option is None:
                        continue
                    slower_s = float(columns.times_s[table][option] - columns.times_s[table][choice[node]])
                    dearer_j = float(columns.effective_j[table][option] - columns.effective_j[table][choice[node]])
                    saved = sum(other != now for other in around) - sum(other != mhz for other in around)
                    if saved > 0 and slower_s <= 0 and dearer_j < shy * saved * _price(problem, table, how.latency_s):
                        choice[node], clock[node], changed = option, mhz, True
                        break
    return choice


def _price(problem: Problem, table: int, latency_s: float) -> float:
    """What a change costs about: its latency at the power that the instruction's range of clocks spans, in joules."""
    times, effective = problem.columns.times_s[table], problem.columns.effective_j[table]
    if len(times) < 2:
        return 0.0
    spread = float(np.ptp(effective)) / float(times.mean())
    return latency_s * (spread + problem.blocking_power_w)


def _repaired(pipeline: _Pipeline, choice: Ints, realised: Realised, deadline_s: float) -> Ints | None:
    """Faster options where the run was late: first where changes took time, else anywhere on what was late."""
    problem = pipeline.problem
    planned = Plan(problem, choice, deadline_s, 0.0).times_s
    slack = _slack(pipeline, realised, deadline_s)
    late = slack < -LATE * deadline_s
    clock = pipeline.clocks(choice)
    found = choice.copy()
    for lost_only in (True, False):
        for node in np.flatnonzero(late & ((realised.times_s > planned * (1 + 1e-9)) | (not lost_only))).tolist():
            table, times = pipeline.table[node], problem.columns.times_s[pipeline.table[node]]
            quicker = np.flatnonzero(times < times[choice[node]])
            neighbours = [clock[other] for other in (pipeline.previous[node], pipeline.next[node]) if other >= 0]
            same = [index for index in quicker.tolist() if problem.tables[table][index].mhz in neighbours]
            if same:
                found[node] = same[0]
            elif len(quicker):
                found[node] = int(quicker[problem.columns.effective_j[table][quicker].argmin()])
            before = int(pipeline.previous[node])
            if lost_only and not len(quicker) and before >= 0 and clock[before] != clock[node]:
                # It is as fast as can be, but began too slowly: let the one before it have its clock already.
                option = _option_at(problem, pipeline.table[before], clock[node])
                if option is not None and option != choice[before]:
                    found[before] = option
        if (found != choice).any():
            return found
    return None


def _slack(pipeline: _Pipeline, realised: Realised, deadline_s: float) -> Floats:
    """By how much every node could end later, as it was run."""
    dag = pipeline.problem.dag
    latest = [deadline_s] * len(dag.nodes)  # end
    times = realised.times_s.tolist()
    order = np.lexsort((np.arange(len(dag.nodes)), realised.start_s)).tolist()
    for node in reversed(order):
        for after in {*dag.after[node], int(pipeline.next[node])} - {-1}:
            latest[node] = min(latest[node], latest[after] - times[after])
    return np.array(latest) - realised.start_s - realised.times_s
