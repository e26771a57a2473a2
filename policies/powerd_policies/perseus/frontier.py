"""All plans worth having, from the fastest to the one of least energy, found once and looked up ever after.

House rules: text comes and goes by ``loads`` and ``dumps``, files by ``load`` and ``save``; a frontier belongs to one problem,
told by a fingerprint, and refuses another; a lookup solves nothing.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from powerd.errors import RequestError
from powerd_policies.perseus.planner import Planner
from powerd_policies.perseus.problem import Plan, Problem
from powerd_policies.perseus.rounding import QUICK

FORMAT = 1
DENSER = 1.5  # 1: evenly spaced deadlines; above: closer together near the fastest, where the frontier is steep


@dataclass(frozen=True)
class Frontier:
    """Plans of one problem, fastest first: each takes longer and, without waiting, less energy than the one before."""

    problem: Problem
    plans: tuple[Plan, ...]
    times_s: tuple[float, ...] = field(init=False)  # of every plan

    @property
    def shortest_s(self) -> float:
        """The least iteration time there is a plan for."""
        return self.plans[0].iteration_time_s

    @property
    def longest_s(self) -> float:
        """T*: the iteration time beyond which slowing down saves nothing more."""
        return self.plans[-1].iteration_time_s

    def __post_init__(self) -> None:
        # Now, not at the first lookup, which somebody waits for.
        object.__setattr__(self, "times_s", tuple(plan.iteration_time_s for plan in self.plans))

    def at(self, deadline_s: float) -> Plan:
        """The plan of least energy among those in time, T_opt = min(T*, T'); its energy includes waiting until the deadline.

        Its lower bound is -inf unless the deadline is exactly the plan's own: nothing is solved here. RequestError below the
        shortest time.
        """
        if math.isnan(deadline_s) or deadline_s < self.shortest_s * (1 - 1e-9):
            raise RequestError(
                f"a deadline of {deadline_s:.6g} s is below the shortest possible iteration time of {self.shortest_s:.9g} s",
                hint="ask for a later one, or for the fastest plan",
                code="bad_value",
            )
        if math.isinf(deadline_s):
            raise RequestError("a deadline is a number of seconds, not inf", code="bad_value")
        index = max(0, bisect.bisect_right(self.times_s, deadline_s * (1 + 1e-12)) - 1)
        plan = self.plans[index]
        return _until(plan, max(deadline_s, plan.iteration_time_s))

    def dumps(self) -> str:
        """As JSON."""
        plans = [
            {"deadline_s": plan.deadline_s, "lower_bound_j": plan.lower_bound_j, "choice": plan.choice.tolist()}
            for plan in self.plans
        ]
        return json.dumps({"format": FORMAT, "problem": fingerprint(self.problem), "plans": plans})

    def save(self, path: Path | str) -> None:
        """Write the file as a whole or not at all."""
        path = Path(path)
        draft = path.with_name(path.name + ".new")
        draft.write_text(self.dumps() + "\n", encoding="utf-8")
        draft.replace(path)


def fingerprint(problem: Problem) -> str:
    """Tells problems apart: the same for the same instructions, order, options and blocking power, on any machine."""
    digest = hashlib.sha256()
    digest.update(repr([(node.stage, node.kind, node.microbatch) for node in problem.dag.nodes]).encode())
    for array in (problem.dag.rank, problem.dag.edges, problem.table):
        digest.update(repr(array.tolist()).encode())
    digest.update(repr([[(o.mhz, o.time_s, o.energy_j) for o in table] for table in problem.tables]).encode())
    digest.update(repr(float(problem.blocking_power_w)).encode())
    return digest.hexdigest()


def frontier(problem: Problem, points: int = 50, progress: Callable[[float], None] | None = None) -> Frontier:
    """Plans for ``points`` deadlines between the shortest time and T*, without those that another one makes useless."""
    if points < 2:
        raise RequestError(f"a frontier has two points or more, not {points}", code="bad_value")
    planner = Planner(problem)
    span = planner.cheapest_s - planner.shortest_s
    plans: list[Plan] = []
    for index in range(points):
        plans.append(planner.plan(planner.shortest_s + span * (index / (points - 1)) ** DENSER, QUICK))
        if progress is not None:
            progress((index + 1) / points)
    return Frontier(problem, _useful(plans))


def _useful(plans: list[Plan]) -> tuple[Plan, ...]:
    """Fastest first, without plans that are slower than another and save nothing; energies compared without waiting."""
    kept: list[Plan] = []
    least = math.inf
    for plan in sorted(plans, key=lambda plan: (plan.iteration_time_s, _effective_j(plan))):
        if (energy := _effective_j(plan)) < least:
            kept.append(plan)
            least = energy
    return tuple(kept)


def _effective_j(plan: Plan) -> float:
    return plan.energy_j - plan.problem.blocking_j(plan.deadline_s)


def _until(plan: Plan, deadline_s: float) -> Plan:
    """The same choice with another deadline: only the waiting differs."""
    # Waiting longer than it was planned for may let a slower plan be better, which the old bound does not know.
    bound = plan.lower_bound_j if deadline_s == plan.deadline_s else -math.inf
    return Plan(plan.problem, plan.choice, deadline_s, bound)


def loads(text: str, problem: Problem) -> Frontier:
    """Read JSON again; RequestError when it is not a frontier, or one of another problem."""
    try:
        document = json.loads(text)
        if document["format"] != FORMAT:
            raise RequestError(f"a frontier of format {document['format']}; this reads {FORMAT}", code="bad_value")
        if document["problem"] != fingerprint(problem):
            raise RequestError(
                "this frontier belongs to another problem: its schedule, profile or blocking power differ",
                hint="make it anew with powerctl perseus plan --frontier",
                code="bad_value",
            )
        plans = tuple(
            Plan(problem, np.array(row["choice"], np.int64), float(row["deadline_s"]), float(row["lower_bound_j"]))
            for row in document["plans"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"not a saved frontier: {error}", code="bad_value") from None
    counts = np.array([len(table) for table in problem.tables])[problem.table]
    if not plans or any(len(p.choice) != len(counts) or (p.choice < 0).any() or (p.choice >= counts).any() for p in plans):
        raise RequestError("not a saved frontier: its choices do not fit the problem", code="bad_value")
    return Frontier(problem, plans)


def load(path: Path | str, problem: Problem) -> Frontier:
    """Read a saved frontier of this problem."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read the frontier {path}: {error}", code="bad_value") from None
    return loads(text, problem)
