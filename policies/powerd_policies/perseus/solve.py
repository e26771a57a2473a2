"""From a job, its profile and a deadline in words to a plan and its baseline: what powerctl and the daemon's child both do.

House rules: no file is read here and nothing is printed; the solver is loaded only when there is something to solve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from powerd.errors import RequestError
from powerd_policies.perseus import baselines, document
from powerd_policies.perseus.document import JobFile
from powerd_policies.perseus.problem import Plan, Problem
from powerd_policies.perseus.profile import Row

KEYS = ("job", "profile_rows", "deadline")


@dataclass(frozen=True, slots=True)
class Solved:
    """A plan beside the baseline that it is judged by."""

    job: JobFile
    plan: Plan
    baseline: Plan

    def to_json(self) -> dict[str, Any]:
        """OUT.json."""
        return document.to_json(self.plan, self.baseline, self.job)


def solve(job: JobFile, rows: Sequence[Row], deadline: str | float = "1.0x") -> Solved:
    """The plan of least energy for a deadline in words (``document.deadline_s``); RequestError for bad input."""
    return solve_problem(job, job.problem(rows), deadline)


def solve_problem(job: JobFile, problem: Problem, deadline: str | float) -> Solved:
    """The same for a problem that is built already."""
    from powerd_policies.perseus import planner

    baseline = baselines.max_clock(problem)
    deadline_s = document.deadline_s(deadline, baseline.iteration_time_s, document.shortest_s(problem))
    return Solved(job, planner.plan(problem, deadline_s, job.switching), baseline)


def answer(content: object) -> dict[str, Any]:
    """OUT.json for ``{"job": ..., "profile_rows": [...], "deadline": ...}``; RequestError naming what is wrong."""
    if not isinstance(content, Mapping):
        raise RequestError("a request is a JSON object with job, profile_rows and deadline", code="bad_value")
    document.known_keys(content, KEYS, "the request")
    for key in KEYS[:2]:
        if key not in content:
            raise RequestError(f"the request: {key} is missing", code="bad_value")
    deadline = content.get("deadline", "1.0x")
    if isinstance(deadline, bool) or not isinstance(deadline, str | int | float):
        raise RequestError(f"the request: deadline is {deadline!r}", hint="1.05x, seconds, or fastest", code="bad_value")
    job = document.parse(content["job"])
    noise = {"noise": job.noise} if "noise" in content["job"] else {}
    return solve(job, document.rows_of(content["profile_rows"], **noise), deadline).to_json()
