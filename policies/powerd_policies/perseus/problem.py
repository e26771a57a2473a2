"""What there is to plan: the instructions of one iteration, what may follow what, and what each costs at each clock.

House rules: pure and immutable, numpy inside; seconds, joules and MHz; nodes are numbered in topological order, so that one pass
over the edges in order is a longest path; energy always includes blocking until the deadline (facts: Perseus, section 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Kind(StrEnum):
    """An instruction's kind, as profiles spell it; F, B, I, W of the zero-bubble papers and recomputation."""

    FORWARD = "forward"
    BACKWARD = "backward"  # whole: gradients of inputs and weights
    INPUT = "input"  # the part of backward that the previous stage waits for
    WEIGHT = "weight"  # the rest of it, which nobody waits for
    RECOMPUTE = "recompute"  # forward again, before backward


@dataclass(frozen=True, slots=True, order=True)
class Instruction:
    """One computation of one microbatch on one (virtual) stage."""

    stage: int
    kind: str  # a Kind, or a constant-time operation's own name
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind} of microbatch {self.microbatch} on stage {self.stage}"


#: What each pipeline rank runs, in order.
Order = Sequence[Sequence[Instruction]]


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run an instruction; ``mhz`` None: a constant-time operation, whose clock does not matter."""

    mhz: int | None
    time_s: float
    energy_j: float


#: (stage, instruction kind) -> options, fastest first; no option is both slower and dearer in effective energy than another.
Profile = Mapping[tuple[int, str], tuple[Option, ...]]


@dataclass(frozen=True)
class Dag:
    """The instructions of one iteration; ``edges[k] = (before, after)`` with before < after, sorted by ``after``."""

    nodes: tuple[Instruction, ...]
    rank: Ints  # of each node: the pipeline rank that runs it
    edges: Ints  # [edges, 2]
    ranks: int

    @cached_property
    def before(self) -> tuple[tuple[int, ...], ...]:
        """The nodes that each node waits for."""
        return self._neighbours(1, 0)

    @cached_property
    def after(self) -> tuple[tuple[int, ...], ...]:
        """The nodes that wait for each node."""
        return self._neighbours(0, 1)

    def _neighbours(self, key: int, value: int) -> tuple[tuple[int, ...], ...]:
        found: list[list[int]] = [[] for _ in self.nodes]
        for edge in self.edges.tolist():
            found[edge[key]].append(edge[value])
        return tuple(tuple(neighbours) for neighbours in found)

    def ends(self, times_s: Floats) -> list[float]:
        """When every node ends if each starts as early as it can, in seconds."""
        # Plain lists: for a few thousand nodes with two neighbours each they beat numpy, level by level.
        end: list[float] = []
        for time, before in zip(times_s.tolist(), self.before, strict=True):
            start = 0.0
            for node in before:
                if end[node] > start:
                    start = end[node]
            end.append(start + time)
        return end

    def schedule(self, times_s: Floats) -> tuple[Floats, Floats, float]:
        """Earliest start and latest start of every node and the iteration time, in seconds."""
        end = self.ends(times_s)
        total = max(end, default=0.0)
        times = times_s.tolist()
        late = [0.0] * len(times)
        for node in range(len(times) - 1, -1, -1):
            until = total
            for after in self.after[node]:
                if late[after] < until:
                    until = late[after]
            late[node] = until - times[node]
        return np.array(end) - times_s, np.array(late), total


@dataclass(frozen=True, slots=True)
class Columns:
    """The options of every table as arrays, in the tables' own order."""

    times_s: tuple[Floats, ...]
    energies_j: tuple[Floats, ...]
    effective_j: tuple[Floats, ...]  # energy less what blocking for the same time would take: what a plan minimises


@dataclass(frozen=True)
class Problem:
    """One pipeline's iteration: ``tables[table[n]]`` are the options of node n."""

    dag: Dag
    tables: tuple[tuple[Option, ...], ...]
    table: Ints
    blocking_power_w: float  # of one rank that waits for another
    measured: tuple[
        tuple[Option, ...], ...
    ] = ()  # like tables, before the Pareto filter: the highest clock need not be on the front

    @cached_property
    def columns(self) -> Columns:
        """Times and energies for arithmetic."""
        times = tuple(np.array([option.time_s for option in table]) for table in self.tables)
        energies = tuple(np.array([option.energy_j for option in table]) for table in self.tables)
        effective = tuple(e - self.blocking_power_w * t for t, e in zip(times, energies, strict=True))
        return Columns(times, energies, effective)

    def blocking_j(self, time_s: float) -> float:
        """What all ranks would take if they did nothing but wait for so long."""
        return self.blocking_power_w * self.dag.ranks * time_s


@dataclass(frozen=True, slots=True)
class Realised:
    """What becomes of a plan when clocks take time to change."""

    start_s: Floats  # of each node
    times_s: Floats  # of each node
    iteration_time_s: float
    energy_j: float  # of all ranks, blocking until the plan's deadline included
    switches: int  # clock changes of all ranks in one iteration, back to its first clock included


@dataclass(frozen=True)
class Plan:
    """One option per node: ``choice[n]`` is an index into the node's table."""

    problem: Problem
    choice: Ints
    deadline_s: float
    lower_bound_j: float  # no plan in time needs less (LP relaxation on the convex hull)
    realised: Realised | None = None  # with the time that clock changes take, where that was asked for

    @cached_property
    def times_s(self) -> Floats:
        """The duration of every node."""
        return self._chosen(self.problem.columns.times_s)

    @cached_property
    def iteration_time_s(self) -> float:
        """From the first start to the last end."""
        return self.problem.dag.schedule(self.times_s)[2]

    @cached_property
    def energy_j(self) -> float:
        """Of all ranks, blocking until the deadline included."""
        return float(self._chosen(self.problem.columns.effective_j).sum()) + self.problem.blocking_j(self.deadline_s)

    def _chosen(self, columns: Sequence[Floats]) -> Floats:
        first = np.cumsum([0, *(len(column) for column in columns[:-1])])
        return np.concatenate(columns)[first[self.problem.table] + self.choice]
