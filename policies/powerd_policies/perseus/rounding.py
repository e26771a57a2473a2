"""From times between clocks to clocks that exist, never later than the deadline and close to the bound.

House rules: pure and deterministic; what a plan takes above the lower bound is exactly the sum of its reduced costs (an option's
effective energy plus its time at the node's price, above the least such sum) and of the slack on its edges at their prices, so
that partial plans can be compared while they are built; a plan that would be late is never a candidate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from powerd_policies.perseus.problem import Floats, Ints, Problem
from powerd_policies.perseus.relax import Relaxed
from powerd_policies.perseus.search import IN_TIME, Search

TOLERANCE = 1e-12  # of the deadline: float error of a longest path
ENOUGH = 1e-4  # of the lower bound: closer to it nobody will notice
RESTARTS = (0.3, 0.6, 1.0, 1.5)
OPTIONS = 11  # per node, by reduced cost
EXACT_WIDTH = 20_000  # partial plans kept when all of them are wanted
EXACT_NODES = 12


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to look; by counts, never by a clock, so that the same problem always gets the same plan."""

    nodes: int  # for pipelines of up to so many instructions
    eager: tuple[float, ...]  # one search by partial plans for each
    width: int  # partial plans kept
    turns: int  # along chains
    passes: int  # through windows ...
    target: float  # ... until within this share of the lower bound
    longer: tuple[float, ...] = ()  # starts anew from optima of deadlines longer by these shares, until within the target


#: What a plan is worth: the more instructions, the less can be spent on each.
EFFORTS = (
    Effort(256, (0.05, 0.2, 0.6, 1.0, 1.5), 256, 24, 3, 0.0014, (0.0, 0.0003, 0.0005, 0.0007, 0.0009, 0.0011)),
    Effort(400, (0.05, 0.1, 0.2, 0.6, 1.0, 1.3), 256, 24, 8, 0.0014),
    Effort(600, (0.2, 1.0), 256, 8, 3, 0.009),
    Effort(1600, (0.05, 0.2, 0.5, 0.7, 1.0), 256, 16, 12, 0.0014),
    Effort(4000, (1.0,), 64, 2, 1, 0.0096),
    Effort(2**62, (1.0,), 64, 2, 1, 0.0096),
)
#: One of many plans, as for a frontier.
QUICK = (Effort(2000, (0.2, 1.0), 64, 4, 0, 1.0), Effort(2**62, (1.0,), 64, 2, 0, 1.0))


@dataclass(frozen=True)
class Candidates:
    """What the search may use of each node's table."""

    options: list[Ints]  # indices into the node's table
    times_s: list[Floats]
    above_j: list[Floats]  # reduced cost


@dataclass(frozen=True)
class Found:
    """A plan and whether nothing was left out on the way to it."""

    choice: Ints
    above_j: float  # above the lower bound
    complete: bool


def fastest_times(problem: Problem) -> Floats:
    """Of every node: the least time of its table."""
    return np.array([column.min() for column in problem.columns.times_s])[problem.table]


def round_down(problem: Problem, relaxed: Relaxed) -> Ints:
    """The option of least effective energy that is no slower than the relaxed time, or the fastest."""
    choice = np.zeros(len(problem.table), np.int64)
    for index, (times, energies) in enumerate(zip(problem.columns.times_s, problem.columns.effective_j, strict=True)):
        members = np.flatnonzero(problem.table == index)
        fits = times[None, :] <= relaxed.times_s[members][:, None]
        best = np.where(fits, energies[None, :], np.inf).argmin(axis=1)
        choice[members] = np.where(fits.any(axis=1), best, times.argmin())
    return choice


def candidates(problem: Problem, relaxed: Relaxed, count: int, most_j: float = np.inf) -> Candidates:
    """The cheapest ``count`` options of each node below ``most_j``, its fastest and the one below its relaxed time."""
    found = Candidates([], [], [])
    below = round_down(problem, relaxed)
    for node, table in enumerate(problem.table.tolist()):
        times, energies = problem.columns.times_s[table], problem.columns.effective_j[table]
        priced = energies + relaxed.price_w[node] * times
        priced = priced - priced.min()
        picked = np.argsort(priced, kind="stable")[:count]
        picked = picked[priced[picked] <= most_j]
        picked = np.union1d(picked, [below[node], times.argmin()])
        found.options.append(picked)
        found.times_s.append(times[picked])
        found.above_j.append(priced[picked])
    return found


def beam(
    problem: Problem, relaxed: Relaxed, deadline_s: float, options: Candidates, width: int, eager: float, most_j: float = np.inf
) -> Found | None:
    """Build plans node by node in the order of their start, keeping the ``width`` best partial ones.

    ``eager`` is the share of a node's price at which ending before the relaxed plan counts as waste already.
    """
    dag = problem.dag
    _, late, total = dag.schedule(relaxed.times_s)
    fastest = fastest_times(problem)
    _, latest, shortest = dag.schedule(fastest)
    limit = latest + fastest + (deadline_s - shortest)  # later than this nobody can make up for
    due = np.minimum(late + relaxed.times_s + (deadline_s - total), limit)
    limit = limit + deadline_s * TOLERANCE
    order = np.lexsort((np.arange(len(late)), late)).tolist()
    edge_price = relaxed.edge_prices
    waiting = [len(after) for after in dag.after]
    above = np.zeros(1)
    row: dict[int, int] = {}
    free: list[int] = []
    ends = np.zeros((0, 1))
    trail: list[tuple[int, Ints, Ints]] = []
    complete = True
    for node in order:
        before = dag.before[node]
        start = np.zeros(len(above))
        for other in before:
            start = np.maximum(start, ends[row[other]])
        so_far = above
        for other in before:
            price = edge_price[other, node]
            if price > 0:
                so_far = so_far + price * (start - ends[row[other]])
        price = float(relaxed.price_w[node])
        end = start[:, None] + options.times_s[node][None, :]
        cost = so_far[:, None] + options.above_j[node][None, :]
        if not dag.after[node]:
            cost = cost + price * np.maximum(0.0, deadline_s - end)
        early = due[node] - end
        rank = cost + np.where(early > 0, eager * price * early, -5.0 * (price + problem.blocking_power_w) * early)
        rank = np.where((end <= limit[node]) & (cost <= most_j), rank, np.inf).ravel()
        keep = int(np.isfinite(rank).sum())
        if not keep:
            return None
        if keep > width:
            keep, complete = width, False
        picked = np.argpartition(rank, keep - 1)[:keep] if keep < len(rank) else np.arange(len(rank))
        parent, option = np.divmod(picked, len(options.times_s[node]))
        above = cost.ravel()[picked]
        for other in before:
            waiting[other] -= 1
            if not waiting[other]:
                free.append(row.pop(other))
        ends = ends[:, parent]
        if free:
            row[node] = free.pop()
            ends[row[node]] = end.ravel()[picked]
        else:
            row[node] = len(ends)
            ends = np.vstack([ends, end.ravel()[picked]])
        trail.append((node, parent, options.options[node][option]))
    choice = np.zeros(len(order), np.int64)
    best = index = int(above.argmin())
    for node, parent, taken in reversed(trail):
        choice[node] = taken[index]
        index = int(parent[index])
    return Found(choice, float(above[best]), complete)


def to_clocks(
    problem: Problem,
    relaxed: Relaxed,
    deadline_s: float,
    relax: Callable[[float], Relaxed],
    efforts: tuple[Effort, ...] = EFFORTS,
) -> Ints:
    """An option of every node, in time; exact when there are few nodes. ``relax`` finds the optimum of another deadline."""
    effort = next(effort for effort in efforts if len(problem.table) <= effort.nodes)
    blocking_j = problem.blocking_j(deadline_s)
    counts = np.array([len(column) for column in problem.columns.times_s])
    first = np.cumsum([0, *counts[:-1]])[problem.table]
    effective = np.concatenate(problem.columns.effective_j)
    times = np.concatenate(problem.columns.times_s)

    def energy_j(choice: Ints) -> float:
        late = max(problem.dag.ends(times[first + choice])) > deadline_s * (1 + IN_TIME)
        return np.inf if late else float(effective[first + choice].sum()) + blocking_j

    quickest = np.array([column.argmin() for column in problem.columns.times_s])[problem.table]
    found = [quickest, round_down(problem, relaxed)]
    options = candidates(problem, relaxed, OPTIONS)
    for eager in effort.eager:
        if (plan := beam(problem, relaxed, deadline_s, options, effort.width, eager)) is not None:
            found.append(plan.choice)
    best = min(found, key=energy_j)
    if len(best) <= EXACT_NODES:
        most = energy_j(best) - relaxed.lower_bound_j + 1e-9 * abs(relaxed.lower_bound_j)
        everything = candidates(problem, relaxed, int(counts.max()), most)
        if (plan := beam(problem, relaxed, deadline_s, everything, EXACT_WIDTH, 0.0, most)) is not None:
            best = min(best, plan.choice, key=energy_j)
            if plan.complete:
                return best
    if (quickest == best).all() and not np.isfinite(energy_j(best)):
        return best

    def enough(effective_j: float) -> bool:
        return effective_j + blocking_j <= relaxed.lower_bound_j * (1 + ENOUGH)

    def acceptable(effective_j: float) -> bool:
        return effective_j + blocking_j <= relaxed.lower_bound_j * (1 + effort.target)

    def improved(choice: Ints, prices: Relaxed, options: Candidates) -> Ints:
        usable = [np.union1d(row, [chosen]) for row, chosen in zip(options.options, choice.tolist(), strict=True)]
        search = Search(problem, usable, choice, deadline_s)
        search.chains(effort.turns, enough)
        for _ in range(effort.passes):
            if not search.windows(prices, acceptable):
                break
            search.chains(2, acceptable)
        return search.result

    best = improved(best, relaxed, options)
    for share in effort.longer:
        prices = relax(deadline_s * (1 + share)) if share else relaxed
        options = candidates(problem, prices, OPTIONS + 1)
        for eager in RESTARTS:
            if acceptable(energy_j(best) - blocking_j):
                return best
            if (plan := beam(problem, prices, deadline_s, options, effort.width, eager)) is not None:
                best = min(best, improved(plan.choice, prices, options), key=energy_j)
    return best
