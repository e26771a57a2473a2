"""From the measured profile to every pipeline's clocks: here where powerd[plan] is installed, else by this node's daemon.

House rules: plans travel as JSON, the same whoever made them; the solver is imported when it is first needed; a stage that is
slower than its profile is planned for as it is, not as it was.

Deadlines: a pipeline's own best is the iteration time at full clocks times the allowed slowdown, or the shortest that its slow
stages allow; beside a straggler it is ``T_opt = min(T*, T')`` (Perseus, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

from powerd.client import Client
from powerd.errors import UnavailableError
from powerd_integrations.pipeline.agreement import MakePlan
from powerd_integrations.pipeline.measured import Row
from powerd_integrations.pipeline.pace import NORMAL, Slow
from powerd_integrations.pipeline.recorded import RankOrder

Plans = list[dict[str, Any]]


def can_plan_here() -> bool:
    """Whether the solver's libraries are installed."""
    return all(find_spec(name) is not None for name in ("numpy", "scipy", "ortools"))


def as_it_is(rows: Sequence[Row], slow: Mapping[int, Slow]) -> tuple[Row, ...]:
    """The profile with its slow stages as they are now: times scaled, or clocks cut from above.

    A stage that is cut to a clock runs at that whatever higher clock is asked for; the top clock stands for it, so that the GPU
    goes faster by itself when what holds it back has gone.
    """
    made: list[Row] = []
    by_work: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        by_work.setdefault((row.stage, row.kind), []).append(row)
    for group in by_work.values():
        how = slow.get(group[0].stage, NORMAL)
        ordered = sorted(group, key=lambda row: -row.mhz)
        if how.ceiling_mhz is not None:
            ordered = _cut(ordered, how.ceiling_mhz)
        made += [row._replace(time_s=row.time_s * how.factor, energy_j=row.energy_j * how.factor) for row in ordered]
    return tuple(made)


def _cut(rows: list[Row], ceiling_mhz: int) -> list[Row]:
    """Rows of one kind of work, highest clock first, when the GPU runs at the ceiling at most."""
    below = [row for row in rows if row.mhz < ceiling_mhz]
    above = [row for row in rows if row.mhz >= ceiling_mhz]
    if not above:
        return rows
    low, high = (below or above[-1:])[0], above[-1]
    share = (ceiling_mhz - low.mhz) / (high.mhz - low.mhz) if below else 0.0
    time_s, energy_j = (a + (b - a) * share for a, b in ((low.time_s, high.time_s), (low.energy_j, high.energy_j)))
    # All the same, but a planner shall take the top one.
    cut = [row._replace(time_s=time_s * (1 + n * 1e-6), energy_j=energy_j * (1 + n * 1e-6)) for n, row in enumerate(above)]
    return [*cut, *below]


def expected_s(rows: Sequence[Row], slow: Mapping[int, Slow]) -> dict[tuple[int, str, int], float]:
    """(stage, kind, clock) -> seconds that an instruction should take now."""
    return {(row.stage, row.kind, row.mhz): row.time_s for row in as_it_is(rows, slow)}


class Planner(Protocol):
    """Who makes plans for all pipelines of a job."""

    def plan(self, request: MakePlan) -> Plans:
        """One plan per pipeline; a PowerdError or ValueError says why there is none."""


class Solver(Protocol):
    """One pipeline's planning problem, wherever it is solved; answers are OUT.json of powerd_policies.perseus.document."""

    def fastest_s(self) -> float:
        """The shortest possible iteration, seconds."""

    def at(self, deadline_s: float | None) -> dict[str, Any]:
        """The plan of least energy within the deadline; None: within the time that full clocks take."""


class Planning:
    """Deadlines for every pipeline, and plans for these from a solver; the same question is answered once."""

    def __init__(
        self,
        rows: Sequence[Row],
        order: Sequence[RankOrder],
        slowdown: float,
        name: str,
        solver: Callable[[Sequence[Row]], Solver],
    ) -> None:
        self._rows, self._order, self._slowdown, self._name = tuple(rows), order, slowdown, name
        self._make = solver
        self._solvers: dict[str, Solver] = {}
        self._plans: dict[tuple[str, float], dict[str, Any]] = {}
        self._usual_s: float | None = None

    def plan(self, request: MakePlan) -> Plans:
        if self._usual_s is None:
            self._usual_s = float(self._solver({}).at(None)["baseline"]["iteration_time_s"]) * (1.0 + self._slowdown)
        own_s = [max(self._usual_s, self._solver(slow).fastest_s()) if slow else self._usual_s for slow in request.slow]
        late_s = max([*own_s, *request.straggler_s.values()])
        made: Plans = []
        for pipeline, slow in enumerate(request.slow):
            deadline_s = own_s[pipeline]
            others_late = late_s > deadline_s * (1 + 1e-9) and pipeline not in request.straggler_s
            made.append(self._at(slow, late_s if others_late else deadline_s))
        return made

    def _solver(self, slow: Mapping[int, Slow]) -> Solver:
        key = repr(sorted(slow.items()))
        if key not in self._solvers:
            self._solvers[key] = self._make(as_it_is(self._rows, slow))
        return self._solvers[key]

    def _at(self, slow: Mapping[int, Slow], deadline_s: float) -> dict[str, Any]:
        question = (repr(sorted(slow.items())), round(deadline_s, 9))
        if question not in self._plans:
            out = self._solver(slow).at(deadline_s)
            self._plans[question] = {"id": f"{self._name}-{len(self._plans) + 1}", **in_order(out, self._order)}
        return self._plans[question]


def in_order(out: Mapping[str, Any], order: Sequence[RankOrder]) -> dict[str, Any]:
    """A plan as ranks need it: the clocks of every rank in the order in which it runs, and the figures worth telling."""
    clocks = {(c["stage"], c["instruction"], c["microbatch"]): c["mhz"] for c in out["clocks"]}
    return {
        "deadline_s": float(out["deadline_s"]),
        "iteration_s": float(out["iteration_time_s"]),
        "energy_j": float(out["energy_j"]),
        "lower_bound_j": float(out["lower_bound_j"]),
        "baseline_s": float(out["baseline"]["iteration_time_s"]),
        "baseline_j": float(out["baseline"]["energy_j"]),
        "clocks": [[clocks[key] for key in rank] for rank in order],
    }


class Here:
    """Solved in this process; needs powerd[plan]."""

    def __init__(self, rows: Sequence[Row], order: Sequence[RankOrder], blocking_power_w: float) -> None:
        from powerd_policies.perseus import baselines, dag, profile
        from powerd_policies.perseus.problem import Instruction

        graph = dag.build([[Instruction(*key) for key in rank] for rank in order])
        options = profile.options([profile.Row(r.stage, r.kind, r.mhz, r.time_s, r.energy_j) for r in rows], blocking_power_w)
        self._problem = dag.problem(graph, options, blocking_power_w)
        self._baseline = baselines.max_clock(self._problem)

    def fastest_s(self) -> float:
        from powerd_policies.perseus import planner

        return float(planner.fastest(self._problem).iteration_time_s)

    def at(self, deadline_s: float | None) -> dict[str, Any]:
        from powerd_policies.perseus import document, planner

        wanted_s = self._baseline.iteration_time_s if deadline_s is None else deadline_s
        return document.to_json(planner.plan(self._problem, wanted_s), self._baseline)


class AtDaemon:
    """Solved by this node's daemon, which has the solver."""

    def __init__(self, rows: Sequence[Row], order: Sequence[RankOrder], blocking_power_w: float, client: Client) -> None:
        self._client = client
        self._job = {
            "order": [[list(key) for key in rank] for rank in order],
            "profile_rows": [list(row) for row in rows],
            "blocking_power_w": blocking_power_w,
        }

    def _ask(self, deadline: str) -> dict[str, Any]:
        out = dict(self._client.perseus_plan({**self._job, "deadline": deadline}))
        if "clocks" not in out:
            raise UnavailableError(
                "the daemon made no plan", hint="install powerd[plan] beside the daemon or in this environment"
            )
        return out

    def fastest_s(self) -> float:
        return float(self._ask("fastest")["iteration_time_s"])

    def at(self, deadline_s: float | None) -> dict[str, Any]:
        return self._ask("1.0x" if deadline_s is None else f"{deadline_s!r}s")


def planning(
    order: Sequence[RankOrder],
    rows: Sequence[Row],
    blocking_power_w: float,
    slowdown: float,
    name: str,
    client: Client,
    here: bool,
) -> Planner:
    """The planner of a job; ``name`` begins the ids of its plans."""

    def solver(as_they_are: Sequence[Row]) -> Solver:
        if here:
            return Here(as_they_are, order, blocking_power_w)
        return AtDaemon(as_they_are, order, blocking_power_w, client)

    return Planning(rows, order, slowdown, name, solver)
