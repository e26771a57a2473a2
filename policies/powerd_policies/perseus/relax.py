"""The least energy for one deadline when times may lie between clocks: a linear program, solved as its dual, a min-cost flow.

House rules: pure; the events of the network are the starts and ends of instructions, those that must coincide made one; an
instruction is one arc per hull corner, with the corner's time as length and the change of slope there as capacity, so that the
flow through it is the price of its time in watts. Lengths are rounded up to the integers that the solver wants; the lower bound
is computed from the flow with the real times and energies, which makes it one for any flow that is conserved (weak duality).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse
from scipy.optimize import linprog

from powerd.errors import PowerdError
from powerd_policies.perseus.problem import Dag, Floats, Ints, Problem

try:
    from ortools.graph.python import min_cost_flow
except ImportError:  # slower, the same optimum: see highs()
    min_cost_flow = None

# Fine enough to lose less than a millionth of the energy; finer ones cost the solver time.
TIME_STEPS = {2000: 2**25, 2**62: 2**23}  # of the deadline, by number of instructions
SLOPE_STEPS = 2**14  # of the steepest hull
UNLIMITED = 2**26  # capacity of what cannot be made faster


@dataclass(frozen=True)
class Relaxed:
    """One optimum between clocks, with its prices."""

    times_s: Floats  # of each node
    price_w: Floats  # of each node: what one second less of it would cost, in joules
    edges: Ints
    edge_price_w: Floats  # of each edge of the dag: what one second of slack on it costs
    deadline_price_w: float
    lower_bound_j: float

    @cached_property
    def edge_prices(self) -> dict[tuple[int, int], float]:
        """The same by edge."""
        return {(a, b): w for (a, b), w in zip(self.edges.tolist(), self.edge_price_w.tolist(), strict=True)}

    @cached_property
    def cap_w(self) -> float:
        """More than any usual price: what cannot be made faster at all may have one without bounds."""
        paid = self.price_w[self.price_w > 0]
        return 10.0 * float(np.median(paid)) if len(paid) else 0.0


@dataclass(frozen=True)
class Hull:
    """Lower convex hull of a table in time and effective energy (energy less blocking power times time)."""

    times_s: Floats  # rising
    slopes_w: Floats  # joules saved per second between neighbours, falling, above zero


def hull(times_s: Floats, effective_j: Floats) -> Hull:
    """Corners from the fastest option to the one of least effective energy."""
    corners: list[tuple[float, float]] = []
    for time, energy in sorted(zip(times_s.tolist(), effective_j.tolist(), strict=True)):
        if corners and energy >= corners[-1][1]:
            continue
        while len(corners) > 1 and _turns_up(corners[-2], corners[-1], (time, energy)):
            corners.pop()
        corners.append((time, energy))
    points = np.array(corners)
    return Hull(points[:, 0].copy(), -np.diff(points[:, 1]) / np.diff(points[:, 0]))


def _turns_up(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


class Network:
    """The events and arcs of one problem, built once and solved for any number of deadlines."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.nodes = len(problem.dag.nodes)
        self.hulls = [hull(t, e) for t, e in zip(problem.columns.times_s, problem.columns.effective_j, strict=True)]
        start, end, kept = _events(problem.dag)
        self.kept = kept
        names, events = np.unique(np.concatenate([start, end, [_SOURCE, _SINK]]), return_inverse=True)
        self.events = len(names)
        self.start, self.end = events[: self.nodes], events[self.nodes : 2 * self.nodes]
        self.source, self.sink = int(events[-2]), int(events[-1])
        edges = problem.dag.edges[kept]
        tail, head = self.end[edges[:, 0]], self.start[edges[:, 1]]
        apart = tail != head
        self.between = np.stack([tail[apart], head[apart]], axis=1)  # arcs without length
        self.between_edge = kept[apart]

    @cached_property
    def corners(self) -> tuple[Ints, Floats, Floats, Floats]:
        """Of every arc with length: node, time, slope to its left, slope to its right (watts)."""
        node: list[Ints] = []
        columns: list[Floats] = []
        for index, shape in enumerate(self.hulls):
            members = np.flatnonzero(self.problem.table == index)
            left = np.concatenate([[np.inf], shape.slopes_w])
            right = np.concatenate([shape.slopes_w, [0.0]])
            rows = np.stack([shape.times_s, left, right], axis=1)
            node.append(np.repeat(members, len(rows)))
            columns.append(np.tile(rows, (len(members), 1)))
        table = np.concatenate(columns)
        return np.concatenate(node), table[:, 0], table[:, 1], table[:, 2]

    def solve(self, deadline_s: float) -> Relaxed:
        """The optimum for one deadline, which must not be below the problem's shortest time."""
        return self.flow(deadline_s) if min_cost_flow is not None else self.highs(deadline_s)

    def flow(self, deadline_s: float) -> Relaxed:
        """By OR-tools' min-cost flow."""
        node, time, left, right = self.corners
        unit_s = deadline_s / next(steps for most, steps in TIME_STEPS.items() if self.nodes <= most)
        unit_w = max((float(h.slopes_w[0]) for h in self.hulls if len(h.slopes_w)), default=1.0) / SLOPE_STEPS
        length = np.ceil(time / unit_s).astype(np.int64)
        high = np.where(np.isinf(left), UNLIMITED, np.round(np.minimum(left, 1e300) / unit_w)).astype(np.int64)
        low = np.round(right / unit_w).astype(np.int64)
        fastest = np.zeros(self.nodes)
        first = np.isinf(left)
        fastest[node[first]] = length[first]
        # Lengths are rounded up, so that times between them are in time, but the fastest plan must remain possible.
        total = max(int(deadline_s / unit_s), round(self.problem.dag.schedule(fastest)[2]))
        arcs, gaps = len(node), len(self.between)
        tail = np.concatenate([self.start[node], self.between[:, 0], [self.sink]])
        head = np.concatenate([self.end[node], self.between[:, 1], [self.source]])
        capacity = np.concatenate([high - low, np.full(gaps + 1, UNLIMITED)])
        cost = np.concatenate([-length, np.zeros(gaps, np.int64), [total]])
        # Costs less the distance between two guessed moments: the same optimum, with smaller numbers to search through.
        guess = self._guess(deadline_s) / unit_s
        guess = np.clip(np.rint(guess), 0, total).astype(np.int64)
        guess[self.sink] = total
        cost = cost + guess[head] - guess[tail]
        solver = min_cost_flow.SimpleMinCostFlow()
        index = solver.add_arcs_with_capacity_and_unit_cost(tail, head, capacity, cost)
        status = solver.solve()
        if status != solver.OPTIMAL:
            raise PowerdError(f"the min-cost flow solver ended with {status.name}; this is an error of the planner")
        flow = solver.flows(index)
        through = np.bincount(node, flow[:arcs], self.nodes).astype(np.int64)
        # Where the flow fills a corner's arc exactly, the optimum may lie anywhere between it and the next one.
        fits = (through[node] >= low) & (through[node] <= high)
        shortest = np.full(self.nodes, np.iinfo(np.int64).max)
        longest = np.zeros(self.nodes, np.int64)
        np.minimum.at(shortest, node[fits], length[fits])
        np.maximum.at(longest, node[fits], length[fits])
        gap_flow = flow[arcs : arcs + gaps]
        moment = self._moments(shortest, np.where(through > 0, longest, -1), gap_flow, total if flow[-1] else 0)
        units = np.clip(moment[self.end] - moment[self.start], shortest, longest)
        times: Floats = units * unit_s
        exact = fits & (length == units[node])
        times[node[exact]] = time[exact]  # at a corner: its own time, not the rounded one
        return self._relaxed(
            times,
            np.asarray(through * unit_w, np.float64),
            np.asarray(gap_flow * unit_w, np.float64),
            float(flow[-1]) * unit_w,
            deadline_s,
        )

    def _guess(self, deadline_s: float) -> Floats:
        """About when events may happen: every time as far between its fastest and its slowest as the deadline is."""
        schedule, table = self.problem.dag.schedule, self.problem.table
        fastest = np.array([h.times_s[0] for h in self.hulls])[table]
        spread = np.array([h.times_s[-1] for h in self.hulls])[table] - fastest
        shortest, longest = schedule(fastest)[2], schedule(fastest + spread)[2]
        times = fastest + min(1.0, max(0.0, (deadline_s - shortest) / max(longest - shortest, 1e-300))) * spread
        early, late, total = schedule(times)
        middle = (early + late) / 2 * (deadline_s / total)
        moment = np.zeros(self.events)
        moment[self.end] = middle + times
        moment[self.start] = middle
        moment[self.source] = 0.0
        return moment

    def _moments(self, shortest: Ints, longest: Ints, gap_flow: Ints, total: int) -> Ints:
        """Earliest moments of the events in an optimum: the solver's potentials, which its interface does not give.

        Every arc asks for at least its shortest length, and for at most its longest one where there is flow (-1: any).
        Passes forward and backward through the events in order converge in a few rounds.
        """
        low = [(u, v, a) for u, v, a in zip(self.start.tolist(), self.end.tolist(), shortest.tolist(), strict=True)]
        low += [(u, v, 0) for u, v in self.between.tolist()]
        low.sort()
        bound = longest >= 0
        high = list(zip(self.end[bound].tolist(), self.start[bound].tolist(), longest[bound].tolist(), strict=True))
        tight = self.between[gap_flow > 0]
        high += [(v, u, 0) for u, v in tight.tolist()]
        high.sort(reverse=True)
        moment = [0] * self.events
        moment[self.sink] = total
        for _ in range(2 * self.events):
            for u, v, length in low:
                if moment[v] < moment[u] + length:
                    moment[v] = moment[u] + length
            changed = False
            for v, u, length in high:
                if moment[u] < moment[v] - length:
                    moment[u] = moment[v] - length
                    changed = True
            if not changed:
                break
        return np.array(moment)

    def highs(self, deadline_s: float) -> Relaxed:
        """By scipy's HiGHS, as a linear program over moments, times and energies; slower, the same optimum."""
        nodes, events, gaps = self.nodes, self.events, len(self.between)
        rows: list[tuple[Ints, Ints, Floats]] = []  # of A in A x <= b, x = moments, times, savings below the fastest option
        every = np.arange(nodes)
        rows.append((every, self.start, np.ones(nodes)))
        rows.append((every, self.end, -np.ones(nodes)))
        rows.append((every, events + every, np.ones(nodes)))
        gap = nodes + np.arange(gaps)
        rows.append((gap, self.between[:, 0], np.ones(gaps)))
        rows.append((gap, self.between[:, 1], -np.ones(gaps)))
        limit = [np.zeros(nodes + gaps)]
        count = nodes + gaps
        for index, shape in enumerate(self.hulls):
            members = np.flatnonzero(self.problem.table == index)
            at_s = shape.times_s[:-1]
            saved_j = np.concatenate([[0.0], np.cumsum(shape.slopes_w * np.diff(shape.times_s))])[:-1]
            for slope, time, saved in zip(shape.slopes_w, at_s, saved_j, strict=True):  # saving <= saved + slope (t - time)
                row = count + np.arange(len(members))
                rows.append((row, events + nodes + members, np.ones(len(members))))
                rows.append((row, events + members, np.full(len(members), -slope)))
                limit.append(np.full(len(members), saved - slope * time))
                count += len(members)
        i, j, a = (np.concatenate(column) for column in zip(*rows, strict=True))
        fastest = np.array([h.times_s[0] for h in self.hulls])[self.problem.table]
        slowest = np.array([h.times_s[-1] for h in self.hulls])[self.problem.table]
        most = np.array([float((h.slopes_w * np.diff(h.times_s)).sum()) for h in self.hulls])[self.problem.table]
        low = np.concatenate([np.zeros(events), fastest, np.zeros(nodes)])
        high = np.concatenate([np.full(events, deadline_s * (1 + 1e-12)), slowest, most])
        low[self.source] = high[self.source] = 0.0
        cost = np.concatenate([np.zeros(events + nodes), -np.ones(nodes)])
        found = linprog(
            cost,
            A_ub=sparse.csr_matrix((a, (i, j)), (count, len(cost))),
            b_ub=np.concatenate(limit),
            bounds=np.stack([low, high], axis=1),
            method="highs",
        )
        if found.status != 0:
            raise PowerdError(f"the linear program ended with: {found.message}; this is an error of the planner")
        flow = -found.ineqlin.marginals
        at_sink = np.bincount(self.end, flow[:nodes], events) + np.bincount(
            self.between[:, 1], flow[nodes : nodes + gaps], events
        )
        times = found.x[events : events + nodes]
        return self._relaxed(times, flow[:nodes], flow[nodes : nodes + gaps], float(at_sink[self.sink]), deadline_s)

    def _relaxed(self, times_s: Floats, price_w: Floats, gap_w: Floats, deadline_w: float, deadline_s: float) -> Relaxed:
        problem = self.problem
        edge_w = np.zeros(len(problem.dag.edges))
        edge_w[self.between_edge] = gap_w
        before, after = problem.dag.edges[self.kept].T
        edge_w[self.kept] += np.where(
            np.bincount(after, minlength=self.nodes)[after] == 1,
            price_w[after],
            np.where(np.bincount(before, minlength=self.nodes)[before] == 1, price_w[before], 0.0),
        ) * (self.end[before] == self.start[after])
        return Relaxed(times_s, price_w, problem.dag.edges, edge_w, deadline_w, bound_j(problem, price_w, deadline_w, deadline_s))


def bound_j(problem: Problem, price_w: Floats, deadline_w: float, deadline_s: float) -> float:
    """What every plan needs at least, by these prices; joules of all ranks, blocking until the deadline included."""
    least = 0.0
    for index, (times, energies) in enumerate(zip(problem.columns.times_s, problem.columns.effective_j, strict=True)):
        prices = price_w[problem.table == index]
        least += float((energies[:, None] + times[:, None] * prices[None, :]).min(axis=0).sum())
    return least - deadline_w * deadline_s + problem.blocking_power_w * problem.dag.ranks * deadline_s


_SOURCE = -1
_SINK = np.iinfo(np.int64).max


def _events(dag: Dag) -> tuple[Ints, Ints, Ints]:
    """Start and end event of every node, numbered so that arcs go upward, and the edges that say something of their own."""
    nodes = len(dag.nodes)
    kept = _telling_edges(dag)
    edges = dag.edges[kept]
    before = np.bincount(edges[:, 1], minlength=nodes)
    after = np.bincount(edges[:, 0], minlength=nodes)
    start = 2 * np.arange(nodes)
    end = start + 1
    # The only one before: nothing is lost by starting when it ends. The only one after: nothing by ending when it starts.
    late = edges[(after[edges[:, 0]] == 1) & (before[edges[:, 1]] > 1)]
    end[late[:, 0]] = 2 * late[:, 1]
    end[after == 0] = _SINK
    early = edges[before[edges[:, 1]] == 1]
    start[early[:, 1]] = end[early[:, 0]]
    start[before == 0] = _SOURCE
    return start, end, kept


def _telling_edges(dag: Dag) -> Ints:
    """Without those between nodes of one rank that its own order implies already."""
    edges = dag.edges
    if not len(edges):
        return np.zeros(0, np.int64)
    order = np.lexsort((np.arange(len(dag.nodes)), dag.rank))
    follower = np.full(len(dag.nodes), -1)
    same = dag.rank[order[1:]] == dag.rank[order[:-1]]
    follower[order[:-1][same]] = order[1:][same]
    inside = dag.rank[edges[:, 0]] == dag.rank[edges[:, 1]]
    direct = follower[edges[:, 0]] == edges[:, 1]
    if len(np.unique(edges[direct], axis=0)) < int(same.sum()):  # some rank is not in order of its own accord
        return np.arange(len(edges))
    candidates = np.flatnonzero(~inside | direct)
    _, first = np.unique(edges[candidates], axis=0, return_index=True)
    return candidates[np.sort(first)]
