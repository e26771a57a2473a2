"""One deadline, one plan: the clock of every instruction that takes the least energy in time.

House rules: pure; a plan is never later than its deadline, and says how far above the least possible energy it can be at most;
what cannot be planned is refused with the row or rank at fault.
"""

from __future__ import annotations

import math

import numpy as np

from powerd.errors import RequestError
from powerd_policies.perseus.problem import Ints, Plan, Problem
from powerd_policies.perseus.relax import Network
from powerd_policies.perseus.rounding import EFFORTS, QUICK, Effort, fastest_times, to_clocks
from powerd_policies.perseus.switching import Switching, settle

IN_TIME = 1e-9  # of the deadline: how far below the shortest time a deadline still means the shortest time


def plan(problem: Problem, deadline_s: float, switching: Switching | None = None) -> Plan:
    """The plan of least energy that ends within the deadline; with ``switching``, also when clocks take time to change.

    RequestError when the deadline is below the shortest possible time (and says that time), or when the problem is malformed.
    """
    planner = Planner(problem)
    found = planner.plan(deadline_s)
    if switching is None:
        return found
    return settle(found, switching, lambda sooner_s: planner.plan(sooner_s, QUICK) if sooner_s >= planner.shortest_s else None)


def fastest(problem: Problem) -> Plan:
    """The plan of least energy among those of the shortest possible iteration time."""
    planner = Planner(problem)
    return planner.plan(planner.shortest_s)


class Planner:
    """One problem, checked and compiled once, planned for any number of deadlines."""

    def __init__(self, problem: Problem) -> None:
        check(problem)
        self.problem = problem
        self.shortest_s = max(problem.dag.ends(fastest_times(problem)), default=0.0)
        cheapest = np.array([_cheapest(t, e) for t, e in zip(problem.columns.times_s, problem.columns.effective_j, strict=True)])
        self.cheapest: Ints = cheapest[problem.table]
        self.cheapest_s = max(problem.dag.ends(self._times(self.cheapest)), default=0.0)
        self.network = Network(problem)

    def plan(self, deadline_s: float, efforts: tuple[Effort, ...] = EFFORTS) -> Plan:
        """See ``plan`` above."""
        deadline_s = self.checked(deadline_s)
        if deadline_s >= self.cheapest_s:
            at_rest = Plan(self.problem, self.cheapest, deadline_s, -math.inf)
            return Plan(self.problem, self.cheapest, deadline_s, at_rest.energy_j)
        relaxed = self.network.solve(deadline_s)
        return Plan(
            self.problem,
            to_clocks(self.problem, relaxed, deadline_s, self.network.solve, efforts),
            deadline_s,
            relaxed.lower_bound_j,
        )

    def checked(self, deadline_s: float) -> float:
        """The deadline, which is a possible one."""
        if not math.isfinite(deadline_s) or deadline_s < self.shortest_s * (1 - IN_TIME):
            raise RequestError(
                f"a deadline of {deadline_s:.6g} s is below the shortest possible iteration time of {self.shortest_s:.9g} s"
                if math.isfinite(deadline_s)
                else f"a deadline is a number of seconds, not {deadline_s}",
                hint="ask for a later one, or for the fastest plan",
                code="bad_value",
            )
        return max(deadline_s, self.shortest_s)

    def _times(self, choice: Ints) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return Plan(self.problem, choice, 0.0, 0.0).times_s


def _cheapest(times_s: np.ndarray, effective_j: np.ndarray) -> int:
    return int(np.lexsort((times_s, effective_j))[0])


def check(problem: Problem) -> None:
    """RequestError unless every node has options, every option a time and an energy, and every edge goes forward."""
    dag = problem.dag
    nodes = len(dag.nodes)
    if not nodes:
        raise RequestError("there is nothing to plan: no instruction", code="bad_value")
    if len(problem.table) != nodes or len(dag.rank) != nodes:
        raise RequestError("every instruction needs one rank and one table of options", code="bad_value")
    if not (math.isfinite(problem.blocking_power_w) and problem.blocking_power_w >= 0):
        raise RequestError(f"blocking power is 0 W or more, not {problem.blocking_power_w}", code="bad_value")
    if int(problem.table.min()) < 0 or int(problem.table.max()) >= len(problem.tables):
        raise RequestError("an instruction names a table of options that does not exist", code="bad_value")
    for index, table in enumerate(problem.tables):
        members = np.flatnonzero(problem.table == index)
        name = f"{dag.nodes[members[0]].kind} on stage {dag.nodes[members[0]].stage}" if len(members) else f"table {index}"
        if not table:
            raise RequestError(f"{name} has no options", hint="profile it at one clock at least", code="bad_value")
        for option in table:
            at = "at any clock" if option.mhz is None else f"at {option.mhz} MHz"
            if not (math.isfinite(option.time_s) and option.time_s > 0):
                raise RequestError(f"{name} {at}: a time is above 0 s, not {option.time_s}", code="bad_value")
            if not math.isfinite(option.energy_j) or option.energy_j < 0:
                raise RequestError(f"{name} {at}: an energy is 0 J or more, not {option.energy_j}", code="bad_value")
    for before, after in dag.edges.tolist():
        if not 0 <= before < after < nodes:
            named = [str(dag.nodes[n]) if 0 <= n < nodes else f"node {n}" for n in (before, after)]
            raise RequestError(f"{named[1]} cannot wait for {named[0]}, which is not before it", code="bad_value")
