"""Better clocks from good ones: every step keeps the plan in time and takes no more energy than before.

House rules: pure and deterministic (its random numbers have a fixed seed); two neighbourhoods: whole chains of instructions at
once, each solved exactly between fixed hand-over moments, and short windows of time over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from powerd_policies.perseus.problem import Dag, Floats, Ints, Problem
from powerd_policies.perseus.relax import Relaxed

IN_TIME = 1e-10  # of the deadline: float error that is not lateness
LABELS = 48  # partial plans kept per chain
ROUND = 8  # turns
WORTHWHILE = 5e-5  # of the energy, per round or pass
WINDOW = 32  # instructions
WIDTH = 300  # partial plans kept of a window
EAGER = (0.0, 0.1, 0.3, 0.6, 1.0)  # share of a node's price at which ending early counts as waste


class Search:
    """One plan being improved; ``choice`` counts within the options it was given, fastest first, padded with infinity."""

    def __init__(self, problem: Problem, options: list[Ints], choice: Ints, deadline_s: float) -> None:
        self.problem, self.deadline_s = problem, deadline_s
        nodes = len(options)
        widest = max(len(row) for row in options)
        self.options = np.full((nodes, widest), -1)
        self.times = np.full((nodes + 1, widest), np.inf)  # the last row pads chains: no time, no energy
        self.energies = np.full((nodes + 1, widest), np.inf)
        self.times[nodes, 0] = self.energies[nodes, 0] = 0.0
        for node, (row, table) in enumerate(zip(options, problem.table.tolist(), strict=True)):
            times = problem.columns.times_s[table][row]
            order = np.argsort(times, kind="stable")
            self.options[node, : len(row)] = row[order]
            self.times[node, : len(row)] = times[order]
            self.energies[node, : len(row)] = problem.columns.effective_j[table][row][order]
        self.every = np.arange(nodes)
        self.choice = np.asarray((self.options == choice[:, None]).argmax(axis=1))
        self.energy_j = self._energy(self.choice)
        self.covers = [_cover(problem.dag, along_rank=True), _cover(problem.dag, along_rank=False)]
        self.random = np.random.default_rng(0)

    @property
    def result(self) -> Ints:
        """The plan as indices into the problem's tables."""
        return np.asarray(self.options[self.every, self.choice])

    def _energy(self, choice: Ints) -> float:
        return float(self.energies[self.every, choice].sum())

    def _accept(self, choice: Ints) -> bool:
        """Take a plan that is in time and not worse; whether it is better."""
        energy = self._energy(choice)
        if energy > self.energy_j:
            return False
        if max(self.problem.dag.ends(self.times[self.every, choice])) > self.deadline_s * (1 + IN_TIME):
            return False
        better = energy < self.energy_j - 1e-12 * abs(self.energy_j)
        self.choice, self.energy_j = choice, energy
        return better

    def chains(self, most: int, enough: Callable[[float], bool]) -> None:
        """Improve along ranks and along microbatches in turn, until a round of turns gains next to nothing."""
        before = self.energy_j
        for turn in range(most):
            chains, across = self.covers[turn % 2]
            if (found := self._along(chains, across)) is not None:
                self._accept(found)
            if enough(self.energy_j):
                return
            if turn % ROUND == ROUND - 1:
                if before - self.energy_j < WORTHWHILE * abs(before):
                    return
                before = self.energy_j

    def _along(self, chains: Ints, across: Ints) -> Ints | None:
        """Every chain's best options while each edge between chains hands over at one fixed moment."""
        nodes, deadline_s = len(self.every), self.deadline_s
        times = self.times[self.every, self.choice]
        early, late, total = self.problem.dag.schedule(times)
        # Any mix of the earliest and the latest schedule is one too; hand over anywhere in what it leaves free.
        start = early + self._share(0.3) * (late + (deadline_s - total) - early)
        share = self._share(0.3) if self.random.random() < 0.3 else self.random.random(len(across))
        moment = (start + times)[across[:, 0]] * (1 - share) + share * start[across[:, 1]]
        release = np.zeros(nodes + 1)
        due = np.full(nodes + 1, deadline_s)
        due[nodes] = np.inf
        np.maximum.at(release, across[:, 1], moment)
        np.minimum.at(due, across[:, 0], moment)
        due = due + deadline_s * 1e-13
        count = len(chains)
        end, cost = np.zeros((count, 1)), np.zeros((count, 1))
        trail: list[Ints] = []
        for nodes_now in chains.T:
            ends = np.maximum(end, release[nodes_now][:, None])[:, :, None] + self.times[nodes_now][:, None, :]
            costs = np.where(
                ends <= due[nodes_now][:, None, None], cost[:, :, None] + self.energies[nodes_now][:, None, :], np.inf
            ).reshape(count, -1)
            ends = ends.reshape(count, -1)
            order = np.argsort(ends, axis=1)
            ends, costs = np.take_along_axis(ends, order, 1), np.take_along_axis(costs, order, 1)
            # Only what is cheaper than everything that ends before it is worth keeping.
            least = np.minimum.accumulate(costs, axis=1)
            keep = np.isfinite(costs)
            keep[:, 1:] &= costs[:, 1:] < least[:, :-1]
            kept = keep.sum(axis=1)
            if not kept.all():
                return None
            most = int(kept.max())
            place = np.argsort(~keep, axis=1, kind="stable")[:, :most]
            if most > LABELS:
                thinned = np.linspace(0, 1, LABELS)[None, :] * (kept[:, None] - 1)
                place = np.take_along_axis(place, np.rint(thinned).astype(np.int64), 1)
                real = np.ones(place.shape, bool)
            else:
                real = np.arange(most)[None, :] < kept[:, None]
            end = np.where(real, np.take_along_axis(ends, place, 1), np.inf)
            cost = np.where(real, np.take_along_axis(costs, place, 1), np.inf)
            trail.append(np.take_along_axis(order, place, 1))
        best = cost.argmin(axis=1)
        found = np.zeros(nodes + 1, np.int64)
        for nodes_now, step in zip(chains.T[::-1], reversed(trail), strict=True):
            best, option = np.divmod(step[np.arange(count), best], self.times.shape[1])
            found[nodes_now] = option
        return found[:nodes]

    def _share(self, whole: float) -> float:
        """A random number from 0 to 1, often one of its ends."""
        share = float(self.random.random())
        return float(round(share)) if self.random.random() < whole else share

    def windows(self, prices: Relaxed, enough: Callable[[float], bool]) -> bool:
        """Improve what starts within a short time over all ranks, in overlapping windows from start to end.

        Whether that was worth it, so that more of it may be.
        """
        before = self.energy_j
        first = -int(self.random.integers(0, WINDOW // 2))
        while first < len(self.every) and not enough(self.energy_j):
            start, late, total = self.problem.dag.schedule(self.times[self.every, self.choice])
            order = np.lexsort((self.every, start))
            free = order[max(0, first) : first + WINDOW].tolist()
            late = late + (self.deadline_s - total)
            if free and (found := self._window(free, start, late, prices, float(self.random.choice(EAGER)))) is not None:
                self._accept(found)
            first += WINDOW // 2
        return before - self.energy_j > 0.2 * WORTHWHILE * abs(before)

    def _window(self, free: list[int], early: Floats, late: Floats, prices: Relaxed, eager: float) -> Ints | None:
        """The best options found for these nodes while all others keep theirs: nothing outside lies between two of them.

        Plans of the window are built node by node, the ``WIDTH`` best partial ones by these prices kept.
        """
        dag, price, edge_price = self.problem.dag, prices.price_w, prices.edge_prices
        ends_now = early + self.times[self.every, self.choice]
        row = {node: index for index, node in enumerate(free)}
        due = [min((late[n] for n in dag.after[node] if n not in row), default=self.deadline_s) for node in free]
        limit = list(due)  # later than this the others cannot make up for it
        for index in range(len(free) - 1, -1, -1):
            inside = [row[n] for n in dag.after[free[index]] if n in row]
            limit[index] = min([due[index], *(limit[n] - self.times[free[n], 0] for n in inside)])
        cap = prices.cap_w
        priced, energy = np.zeros(1), np.zeros(1)
        ends = np.zeros((len(free), 1))
        trail: list[tuple[Ints, Ints]] = []
        for index, node in enumerate(free):
            before = [ends[row[n]] if n in row else np.full(len(priced), ends_now[n]) for n in dag.before[node]]
            start = np.max(before, axis=0) if before else np.zeros(len(priced))
            for other, end_before in zip(dag.before[node], before, strict=True):
                if edge_price[other, node] > 0:
                    priced = priced + min(edge_price[other, node], cap) * (start - end_before)
            own = min(float(price[node]), cap)
            count = int(np.isfinite(self.times[node]).sum())
            times, joules = self.times[node, :count], self.energies[node, :count]
            end = start[:, None] + times
            cost = priced[:, None] + (joules + own * times)
            for other in dag.after[node]:
                if other not in row and edge_price[node, other] > 0:
                    cost = cost + min(edge_price[node, other], cap) * (due[index] - end)
            rank = cost + eager * own * (limit[index] - end)
            rank = np.where(end <= limit[index] + self.deadline_s * 1e-13, rank, np.inf).ravel()
            keep = min(WIDTH, int(np.isfinite(rank).sum()))
            if not keep:
                return None
            picked = np.argpartition(rank, keep - 1)[:keep] if keep < len(rank) else np.arange(len(rank))
            parent, option = np.divmod(picked, count)
            priced, energy = cost.ravel()[picked], (energy[:, None] + joules).ravel()[picked]
            ends = ends[:, parent]
            ends[index] = end.ravel()[picked]
            trail.append((parent, option))
        best = int(energy.argmin())
        choice = self.choice.copy()
        for node, (parent, option) in zip(reversed(free), reversed(trail), strict=True):
            choice[node], best = option[best], int(parent[best])
        return choice


def _cover(dag: Dag, *, along_rank: bool) -> tuple[Ints, Ints]:
    """Chains of edges that hold every node once, padded with the number of nodes, and the edges between chains.

    A chain goes on along its rank, or from rank to rank as a microbatch does, where it can choose.
    """
    nodes = len(dag.nodes)
    rank = dag.rank.tolist()
    chains: list[list[int]] = []
    chain_of = [-1] * nodes
    for node in range(nodes):
        open_ends = [other for other in dag.before[node] if chains[chain_of[other]][-1] == other]
        liked = [other for other in open_ends if (rank[other] == rank[node]) == along_rank] or open_ends
        if liked:
            chain_of[node] = chain_of[max(liked)]
            chains[chain_of[node]].append(node)
        else:
            chain_of[node] = len(chains)
            chains.append([node])
    padded = np.full((len(chains), max(len(chain) for chain in chains)), nodes)
    follower = np.full(nodes, -1)
    for index, chain in enumerate(chains):
        padded[index, : len(chain)] = chain
        follower[chain[:-1]] = chain[1:]
    across: NDArray[np.bool_] = follower[dag.edges[:, 0]] != dag.edges[:, 1]
    return padded, dag.edges[across]
