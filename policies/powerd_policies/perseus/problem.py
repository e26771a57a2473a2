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

    def schedule(self, times_s: Floats) -> tuple[Floats, Floats, float]:
        """Earliest start and latest start of every node and the iteration time, in seconds."""
        early = [0.0] * len(self.nodes)
        times = times_s.tolist()
        edges = self.edges.tolist()
        for before, after in edges:
            early[after] = max(early[after], early[before] + times[before])
        total = max((e + t for e, t in zip(early, times, strict=True)), default=0.0)
        late = [total - t for t in times]
        for before, after in reversed(edges):  # sorted by after: every later node is final before it is used
            late[before] = min(late[before], late[after] - times[before])
        return np.array(early), np.array(late), total


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


@dataclass(frozen=True)
class Plan:
    """One option per node: ``choice[n]`` is an index into the node's table."""

    problem: Problem
    choice: Ints
    deadline_s: float
    lower_bound_j: float  # no plan in time needs less (LP relaxation on the convex hull)

    @cached_property
    def times_s(self) -> Floats:
        """The duration of every node."""
        return self._column([[option.time_s for option in table] for table in self.problem.tables])

    @cached_property
    def iteration_time_s(self) -> float:
        """From the first start to the last end."""
        return self.problem.dag.schedule(self.times_s)[2]

    @cached_property
    def energy_j(self) -> float:
        """Of all ranks, blocking until the deadline included."""
        busy_j = float(self._column([[option.energy_j for option in table] for table in self.problem.tables]).sum())
        blocked_s = self.problem.dag.ranks * self.deadline_s - float(self.times_s.sum())
        return busy_j + self.problem.blocking_power_w * blocked_s

    def _column(self, values: list[list[float]]) -> Floats:
        flat = np.array([value for row in values for value in row])
        first = np.cumsum([0, *(len(row) for row in values[:-1])])
        return flat[first[self.problem.table] + self.choice]
