"""The live planner: runs a controller on what is observed and publishes its plan for everybody to read.

House rules: a controller that fails, and input that is stale, leave the last plan in force, and the plan says so; while anything
is stale nothing shrinks; a planner that starts begins with the fleet that is there; the plan is replaced as a whole, in memory
and on disk; nothing here touches a GPU.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from powerd_integrations.fleet import handover
from powerd_integrations.fleet.observed import Arrivals, Observations
from powerd_integrations.fleet.published import Group, PublishedPlan, Serving, Subscribers, write_plan
from powerd_integrations.fleet.waiting import says
from powerd_policies.dynamollm.fleet import FleetController, FleetEvent, FleetPlan, InstanceState

log = logging.getLogger("powerd.fleet")
KEPT_EVENTS: Final = 200
UNDECIDED: Final = "nothing decided yet"


@dataclass(frozen=True, slots=True)
class PlannerOptions:
    """How a planner looks at its fleet; seconds."""

    limits: handover.Limits
    stale_after_s: float = 10.0  # input older than this is stale
    gone_after_s: float = 15.0  # an instance that has not reported for so long does not exist
    tick_s: float = 1.0
    look_s: float = 0.0  # before the first decision: who serves already reports within it


@dataclass(frozen=True, slots=True)
class PlannerFigures:
    """What a planner counts of itself, for its metrics page."""

    decisions: int
    decide_seconds: float
    failures: int
    held_ticks: int
    requests: Mapping[str, int]
    serving: Mapping[Group, int]
    resteered: int  # waiting requests that routers sent elsewhere in an emergency
    rejected: int  # or told that they waited too long


class LivePlanner:
    """Publishes the desired fleet; every method may be called from any thread.

    ``controller.decide`` runs in the caller of ``tick`` and in nobody else; readers of ``plan`` never wait for it.
    """

    def __init__(
        self,
        controller: FleetController,
        options: PlannerOptions,
        *,
        plan_file: Path | None = None,
        groups: Mapping[Group, tuple[int, int]],
        now_s: Callable[[], float] = time.monotonic,
        unix_s: Callable[[], float] = time.time,
    ) -> None:
        self._controller = controller
        self._options = options
        self._file = plan_file
        # Least and most replicas of each group that an autoscaler knows: every plan names them, also with 0.
        self._groups = dict(groups)
        self._begun_s = now_s()
        self._cut: frozenset[Group] = frozenset()  # wanted, and more than the groups may have
        self._now_s, self._unix_s = now_s, unix_s
        self._lock = threading.Lock()
        self._seen = Observations(now_s(), options.gone_after_s)
        self._requests: Counter[str] = Counter()
        self._rescued: Counter[tuple[str, str]] = Counter()  # by what and where, since the last decision
        self._rescues: Counter[str] = Counter()
        self._events: deque[FleetEvent] = deque(maxlen=KEPT_EVENTS)
        self._handover = handover.Handover()
        self._wanted: FleetPlan | None = None
        self._decided_s: float | None = None  # on the planner's clock
        self._decided_unix_s: float | None = None
        self._last_try_s = -math.inf
        self._serving: tuple[Serving, ...] = ()
        self._decisions = self._failures = self._held_ticks = 0
        self._decide_seconds = 0.0
        self._file_error = ""
        self.subscribers = Subscribers()
        self._plan = PublishedPlan(0, None, unix_s(), controller.name, held=UNDECIDED)

    # --- what comes in --------------------------------------------------------------------------------------------------------

    def add_arrivals(self, report: Arrivals) -> bool:
        """Count what a router saw; False when this report was counted before."""
        with self._lock:
            counted = self._seen.add_arrivals(report, self._now_s())
            if counted:
                self._requests.update({name: load.requests for name, load in report.classes.items()})
                for what, counts in (("resteered", report.resteered), ("rejected", report.rejected)):
                    self._rescued.update({(what, name): count for name, count in counts.items()})
                    self._rescues[what] += sum(counts.values())
            return counted

    def add_instances(self, states: Iterable[InstanceState]) -> None:
        """Take what instances say of themselves."""
        with self._lock:
            self._seen.add_instances(states, self._now_s())

    def remove_instance(self, name: str) -> None:
        """Take an instance's goodbye."""
        with self._lock:
            self._seen.remove_instance(name)

    # --- what goes out --------------------------------------------------------------------------------------------------------

    def plan(self) -> PublishedPlan:
        """Return the plan in force."""
        return self._plan

    def events(self) -> list[FleetEvent]:
        """Return the newest events, oldest first."""
        with self._lock:
            return list(self._events)

    def figures(self) -> PlannerFigures:
        """Return what the planner counted."""
        with self._lock:
            return PlannerFigures(
                self._decisions,
                self._decide_seconds,
                self._failures,
                self._held_ticks,
                dict(self._requests),
                Counter(replica.group for replica in self._serving),
                self._rescues["resteered"],
                self._rescues["rejected"],
            )

    # --- the loop -------------------------------------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Tick until ``stop`` is set."""
        while True:
            self.tick()
            if stop.wait(self._options.tick_s):
                return

    def tick(self) -> PublishedPlan:
        """Decide when it is time, move the hand-over on, publish; returns the plan in force."""
        now_s = self._now_s()
        with self._lock:
            held = self._why_held(now_s)
            if held and self._wanted is not None:
                self._seen.forget_arrivals(now_s)
            frozen = bool(held) or self._seen.oldest_load_s(now_s) > self._options.stale_after_s
            serving = self._seen.serving(now_s)
            new = self._wanted is None
            due = now_s >= self._begun_s + self._options.look_s if new else now_s - self._last_try_s >= self._controller.period_s
            state = self._seen.state(now_s, self._options.limits.gpus) if due and (not held or new) else None
        if state is not None:
            self._last_try_s = now_s
            self._note_rescued(now_s)
            begun_s = time.perf_counter()
            try:
                self._take(self._controller.decide(state), now_s)
            except Exception as error:  # a controller is a plug-in: whatever it raises, the last plan stays
                held, frozen = f"the controller failed: {type(error).__name__}: {error}", True
                self._note([FleetEvent(now_s, "error", self._controller.name, held)])
                with self._lock:
                    self._failures += 1
                log.exception("the controller %s failed; the last plan stays", self._controller.name)
            with self._lock:
                self._decide_seconds += time.perf_counter() - begun_s
                self._decisions += 1
        if self._wanted is not None:
            limits = self._options.limits
            counts = Counter(replica.group for replica in serving)
            if new:
                self._handover = handover.Handover({group: counts[group] for group in self._groups})
            self._handover, events = handover.step(
                self._handover, _wanted(self._wanted, self._groups), counts, now_s, limits, frozen=frozen
            )
            self._note(events)
        with self._lock:
            self._serving = serving
            self._held_ticks += bool(held)
        blind = bool(held)
        if self._wanted is None:
            held = held or UNDECIDED
        return self._publish(held or ("some instances' metrics are stale: nothing shrinks" if frozen else ""), blind=blind)

    def _why_held(self, now_s: float) -> str:
        age_s = self._seen.arrivals_age_s(now_s)
        if age_s is None:
            return "no router has reported yet"
        if age_s > self._options.stale_after_s:
            return "no router has reported lately: the load is not known"
        return ""

    def _take(self, plan: FleetPlan, now_s: float) -> None:
        unknown = {want.tp for want in plan.instances if want.tp < 1}
        if unknown:
            raise ValueError(f"a plan with tensor parallelism {unknown}")
        self._wanted, self._decided_s, self._decided_unix_s = plan, now_s, self._unix_s()
        self._note(plan.events)
        counts = _counted(plan)
        cut = {group: count for group, count in counts.items() if count > self._groups.get(group, (0, 0))[1]}
        if cut.keys() - self._cut:
            said = "; ".join(_says_cut(group, cut[group], self._groups) for group in sorted(cut.keys() - self._cut))
            self._note([FleetEvent(now_s, "infeasible", self._controller.name, said)])
        self._cut = frozenset(cut)

    def _note(self, events: Iterable[FleetEvent]) -> None:
        with self._lock:
            for event in events:
                log.info("event=%s subject=%s %s", event.kind, event.subject, event.detail)
                self._events.append(event)

    def _note_rescued(self, now_s: float) -> None:
        """Say what routers did for instances in trouble; with every decision, so that events stay few."""
        with self._lock:
            done, self._rescued = self._rescued, Counter()
        names = sorted({name for _, name in done})
        said = [says(done["resteered", name], done["rejected", name]) for name in names]
        self._note(FleetEvent(now_s, "emergency", name, text) for name, text in zip(names, said, strict=True))

    def _publish(self, held: str, *, blind: bool) -> PublishedPlan:
        old, now = self._plan, self._handover
        wanted = self._wanted
        clocks = {} if wanted is None else {Group(want.pool, want.tp): want.clock_mhz for want in wanted.instances}
        # Nobody is withdrawn or rejected because of a load that is not known any more.
        ladder = FleetPlan((), {}) if wanted is None or blind else wanted
        shed, reordered, resteered = dict(ladder.shed), ladder.reordered, ladder.resteered
        same = (old.desired, old.routes, old.held, old.clocks_mhz, old.shed_after_s, old.reordered, old.resteered) == (
            now.desired, now.routes, held, clocks, shed, reordered, resteered
        )  # fmt: skip
        version = old.version if same else old.version + 1
        plan = PublishedPlan(
            version,
            self._decided_unix_s,
            self._unix_s(),
            self._controller.name,
            held,
            now.desired,
            clocks,
            now.routes,
            shed,
            reordered,
            resteered,
            self._serving,
        )
        self._plan = plan
        if self._file is not None:
            try:
                write_plan(plan, self._file)
                self._file_error = ""
            except OSError as error:  # readers keep the last file and see its age; over HTTP the plan is still to be had
                if str(error) != self._file_error:
                    log.error("the plan cannot be written: %s", error)
                self._file_error = str(error)
        if not same:
            self.subscribers.notify(version)
        return plan


def _counted(plan: FleetPlan) -> Counter[Group]:
    return Counter(Group(want.pool, want.tp) for want in plan.instances)


def _wanted(plan: FleetPlan, groups: Mapping[Group, tuple[int, int]]) -> handover.Wanted:
    """Count the wanted instances by group, within the bounds that the autoscaler has; what is no group is nobody's to start."""
    counts = _counted(plan)
    return handover.Wanted({group: min(most, max(least, counts[group])) for group, (least, most) in groups.items()}, plan.routes)


def _says_cut(group: Group, wanted: int, groups: Mapping[Group, tuple[int, int]]) -> str:
    """Say why the fleet has less of a group than the controller wants."""
    if group not in groups:
        return f"{group}: wanted, but no group of this fleet"
    return f"{group}: {wanted} wanted, but max_replicas of the group is {groups[group][1]}"
