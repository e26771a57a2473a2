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
from powerd.errors import PowerdError, UnavailableError
from powerd_integrations.pipeline.agreement import MakePlan
from powerd_integrations.pipeline.measured import Row
from powerd_integrations.pipeline.options import Options
from powerd_integrations.pipeline.pace import NORMAL, Slow
from powerd_integrations.pipeline.recorded import RankOrder

NEARLY = 1.003  # a deadline that no plan with changing clocks keeps is tried once more so much later
Plans = list[dict[str, Any]]
#: What changing a clock costs, by the names of powerd_policies.perseus.switching.Switching.
Switching = dict[str, Any]


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


Order = tuple[RankOrder, ...]


class Planning:
    """Deadlines for every pipeline, and plans for these from a solver; the same question is answered once."""

    def __init__(
        self, orders: Sequence[Order], rows: Sequence[Row], slowdown: float, name: str,
        solver: Callable[[Order, Sequence[Row]], Solver],
    ) -> None:  # fmt: skip
        self._orders, self._rows, self._slowdown, self._name = tuple(orders), tuple(rows), slowdown, name
        self._make = solver
        self._solvers: dict[tuple[Order, str], Solver] = {}
        self._plans: dict[tuple[Order, str, float], dict[str, Any]] = {}
        self._usual_s: dict[Order, float] = {}

    def plan(self, request: MakePlan) -> Plans:
        own_s = [self._own_s(order, slow) for order, slow in zip(self._orders, request.slow, strict=True)]
        late_s = max([*own_s, *request.straggler_s.values()])
        made: Plans = []
        for pipeline, slow in enumerate(request.slow):
            deadline_s = own_s[pipeline]
            others_late = late_s > deadline_s * (1 + 1e-9) and pipeline not in request.straggler_s
            made.append(self._at(self._orders[pipeline], slow, late_s if others_late else deadline_s))
        return made

    def _own_s(self, order: Order, slow: Mapping[int, Slow]) -> float:
        """What a pipeline would take if it were alone."""
        if order not in self._usual_s:
            baseline_s = float(self._solver(order, {}).at(None)["baseline"]["iteration_time_s"])
            self._usual_s[order] = baseline_s * (1.0 + self._slowdown)
        usual_s = self._usual_s[order]
        return max(usual_s, self._solver(order, slow).fastest_s()) if slow else usual_s

    def _solver(self, order: Order, slow: Mapping[int, Slow]) -> Solver:
        key = (order, repr(sorted(slow.items())))
        if key not in self._solvers:
            self._solvers[key] = self._make(order, as_it_is(self._rows, slow))
        return self._solvers[key]

    def _at(self, order: Order, slow: Mapping[int, Slow], deadline_s: float) -> dict[str, Any]:
        question = (order, repr(sorted(slow.items())), round(deadline_s, 9))
        if question not in self._plans:
            out = self._solver(order, slow).at(deadline_s)
            self._plans[question] = {"id": f"{self._name}-{len(self._plans) + 1}", **in_order(out, order)}
        return self._plans[question]


def in_time(plan: Callable[[float], dict[str, Any]], otherwise: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A plan that keeps its deadline though clocks take time to change; else one that may be late by what that takes.

    Short instructions leave no time for a change, and a profile of a live run need not have its fastest times at the top clock.
    """
    for factor in (1.0, NEARLY):
        try:
            if "clocks" in (out := plan(factor)):
                return out
        except PowerdError:
            continue
    return otherwise()


def in_order(out: Mapping[str, Any], order: Sequence[RankOrder]) -> dict[str, Any]:
    """A plan as ranks need it: the clocks of every rank in the order in which it runs, and the figures worth telling."""
    clocks = {(c["stage"], c["instruction"], c["microbatch"]): c["mhz"] for c in out["clocks"]}
    real = out.get("switching") or out  # what the plan becomes when clocks take time to change
    return {
        "deadline_s": float(out["deadline_s"]),
        "iteration_s": float(real["iteration_time_s"]),
        "energy_j": float(real["energy_j"]),
        "lower_bound_j": float(out["lower_bound_j"]),
        "baseline_s": float(out["baseline"]["iteration_time_s"]),
        "baseline_j": float(out["baseline"]["energy_j"]),
        "clocks": [[clocks[key] for key in rank] for rank in order],
    }


class Here:
    """Solved in this process; needs powerd[plan]."""

    def __init__(self, rows: Sequence[Row], order: Sequence[RankOrder], blocking_power_w: float, switching: Switching) -> None:
        from powerd_policies.perseus import baselines, dag, profile
        from powerd_policies.perseus import switching as changes
        from powerd_policies.perseus.problem import Instruction

        graph = dag.build([[Instruction(*key) for key in rank] for rank in order])
        options = profile.options([profile.Row(r.stage, r.kind, r.mhz, r.time_s, r.energy_j) for r in rows], blocking_power_w)
        self._problem = dag.problem(graph, options, blocking_power_w)
        self._baseline = baselines.max_clock(self._problem)
        self._switching = changes.Switching(**switching)

    def fastest_s(self) -> float:
        from powerd_policies.perseus import planner

        return float(planner.fastest(self._problem).iteration_time_s)

    def at(self, deadline_s: float | None) -> dict[str, Any]:
        from powerd_policies.perseus import document, planner
        from powerd_policies.perseus import switching as changes

        wanted_s = self._baseline.iteration_time_s if deadline_s is None else deadline_s

        def planned(within_s: float, switching: changes.Switching | None) -> dict[str, Any]:
            return document.to_json(planner.plan(self._problem, within_s, switching), self._baseline)

        return in_time(lambda factor: planned(wanted_s * factor, self._switching), lambda: planned(wanted_s, None))


class AtDaemon:
    """Solved by this node's daemon, which has the solver."""

    def __init__(
        self, rows: Sequence[Row], order: Sequence[RankOrder], blocking_power_w: float, switching: Switching, client: Client
    ) -> None:
        self._client = client
        self._job = {
            "order": [[list(key) for key in rank] for rank in order],
            "profile_rows": [list(row) for row in rows],
            "blocking_power_w": blocking_power_w,
            "switching": dict(switching),
        }

    def _ask(self, deadline: str, without: str = "") -> dict[str, Any]:
        job = {key: value for key, value in self._job.items() if key != without}
        out = dict(self._client.perseus_plan({**job, "deadline": deadline}))
        if "clocks" not in out:
            raise UnavailableError(
                "the daemon made no plan", hint="install powerd[plan] beside the daemon or in this environment"
            )
        return out

    def fastest_s(self) -> float:
        return float(self._ask("fastest", without="switching")["iteration_time_s"])

    def at(self, deadline_s: float | None) -> dict[str, Any]:
        def words(factor: float) -> str:
            return f"{factor}x" if deadline_s is None else f"{deadline_s * factor!r}s"

        return in_time(lambda factor: self._ask(words(factor)), lambda: self._ask(words(1.0), without="switching"))


def planning(
    orders: Sequence[Order], rows: Sequence[Row], blocking_power_w: float, options: Options, name: str, client: Client
) -> Planner:
    """The planner of a job, from the order of each pipeline; ``name`` begins the ids of its plans."""
    here = can_plan_here() if options.plan_locally is None else options.plan_locally
    switching = {"latency_s": options.switch_latency_s, "ranks_per_node": options.ranks_per_node}

    def solver(order: Order, as_they_are: Sequence[Row]) -> Solver:
        if here:
            return Here(as_they_are, order, blocking_power_w, switching)
        return AtDaemon(as_they_are, order, blocking_power_w, switching, client)

    return Planning(orders, rows, options.slowdown, name, solver)
