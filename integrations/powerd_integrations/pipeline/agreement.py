"""What the ranks of a job decide together: a state machine that every rank feeds the same words and so leaves in the same state.

House rules: pure, no clock, no input or output: ``step`` and ``hear`` answer with what this rank is to do; a decision rests on
what all ranks said, never on what one of them knows; an event that the table does not have for a state is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from powerd_integrations.pipeline.measured import Profile, Sheet, fingerprint, profile_from_json
from powerd_integrations.pipeline.options import Options
from powerd_integrations.pipeline.pace import Pace, Slow, Stages
from powerd_integrations.pipeline.place import Place
from powerd_integrations.pipeline.recorded import OrderError, RankOrder, agree, difference, keys
from powerd_integrations.pipeline.sweep import Sweep, ladder

#: What one rank says to all others at an exchange: JSON.
Said = Mapping[str, Any]


class State(StrEnum):
    """Where a job stands."""

    WARMUP = "warm-up"  # the first step also makes connections and buffers: nothing is learnt from it
    RECORDING = "recording"
    RESUMING = "resuming"  # is there a profile from an earlier start?
    PROFILING = "profiling"
    PLANNING = "planning"
    RUNNING = "running"
    WAITING = "waiting"  # some rank's daemon does not answer, or does not let it set clocks
    OFF = "off"


class Event(StrEnum):
    """What moves it."""

    WARM = "the first step has ended"
    AGREED = "every rank ran what it should"
    UNREADY = "a rank has no lease"
    READY = "every rank has a lease"
    UNMEASURED = "the profile has gaps"
    MEASURED = "the profile is whole"
    PLANNED = "there is a plan"
    KEPT = "there is no better plan"
    CHANGED = "somebody became slow or well again"
    FAILED = "this job cannot be conducted"


TABLE: Mapping[tuple[State, Event], State] = {
    (State.WARMUP, Event.WARM): State.RECORDING,
    (State.RECORDING, Event.AGREED): State.RESUMING,
    (State.RECORDING, Event.UNREADY): State.WAITING,
    (State.WAITING, Event.READY): State.RESUMING,
    (State.RESUMING, Event.UNMEASURED): State.PROFILING,
    (State.RESUMING, Event.MEASURED): State.PLANNING,
    (State.PROFILING, Event.MEASURED): State.PLANNING,
    (State.PROFILING, Event.UNREADY): State.WAITING,
    (State.PLANNING, Event.PLANNED): State.RUNNING,
    (State.PLANNING, Event.KEPT): State.RUNNING,
    (State.RUNNING, Event.CHANGED): State.PLANNING,
    **{(state, Event.FAILED): State.OFF for state in State if state is not State.OFF},
}


@dataclass(frozen=True, slots=True)
class SetClock:
    """Pin this rank's GPU to a clock; None: as fast as it can."""

    mhz: int | None


@dataclass(frozen=True, slots=True)
class Measure:
    """Turn the kept steps into a sheet for this clock and say it at the next exchange."""

    mhz: int


@dataclass(frozen=True, slots=True)
class Save:
    """Keep the profile for the next start."""


@dataclass(frozen=True, slots=True)
class MakePlan:
    """The first rank plans: the slow stages of each pipeline, and the iteration times of those that straggle."""

    slow: tuple[Mapping[int, Slow], ...]
    straggler_s: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Arm:
    """Run by this pipeline's plan from the next iteration on."""

    plan: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Tell:
    """Something people want to know; ``warning`` when it costs them the saving."""

    text: str
    warning: bool = False


@dataclass(frozen=True, slots=True)
class TurnOff:
    """Give the lease back and leave training alone."""


Action = SetClock | Measure | Save | MakePlan | Arm | Tell | TurnOff


class Agreement:
    """The job as all ranks know it; ``state`` is the same everywhere at every step end."""

    def __init__(self, place: Place, options: Options, derived: Sequence[RankOrder] | None = None) -> None:
        self.state = State.WARMUP
        self.place, self.options = place, options
        self.orders: tuple[tuple[RankOrder, ...], ...] = ()  # of every pipeline
        self.key = ""
        self.profile = Profile()
        self.sweep: Sweep | None = None
        self.plans: tuple[Mapping[str, Any], ...] = ()  # by pipeline
        self.pace = Pace(options.tolerance, options.patience)
        self.stages = Stages(2 * options.tolerance, options.patience)
        self.why_off = ""
        self._derived = derived
        self._clocks: tuple[int, ...] = ()
        self._steps = 0  # ended in this state, or at this clock
        self._current: int | None = None  # the clock being measured
        self._pending: int | None = None  # the clock whose sheets were not told yet
        self._final = False
        self._settling = False
        self._at_once = False  # talk again at this very step end
        self._heard = False  # the ranks have talked at this step end

    def _to(self, event: Event) -> None:
        self.state = TABLE[self.state, event]
        self._steps = 0
        self._at_once = False

    @property
    def _measuring(self) -> bool:
        return self.state is State.PROFILING and self._current is not None and self._pending is None

    @property
    def keeps(self) -> bool:
        """Whether the step that is about to begin is one that counts for the profile."""
        return self.state is State.PROFILING and self._current is not None and self._steps >= self.options.settle_iterations

    def step(self) -> tuple[Action, ...]:
        """A training step has ended on every rank."""
        self._steps += 1
        self._heard = False
        if self.state is State.WARMUP:
            self._to(Event.WARM)
        elif self._steps >= self.options.settle_iterations + self.options.iterations_per_clock and self._measuring:
            assert self._current is not None
            assert self.sweep is not None
            done, self._pending = self._current, self._current
            self._current = self.sweep.after(done)
            self._final = self._current is None
            self._steps = 0
            return (Measure(done), SetClock(self._current))
        return ()

    @property
    def due(self) -> bool:
        """Whether the ranks exchange words now."""
        if self._at_once or self._heard:
            return self._at_once
        if self.state is State.PROFILING:
            return self._pending is not None and (self._final or self._steps >= self.options.settle_iterations)
        if self.state is State.RECORDING:
            return self._steps > 0
        if self.state is State.WAITING:
            return self._steps > 0 and (self._steps <= 3 or self._steps % self.options.exchange_steps == 0)
        if self.state is State.RUNNING:
            return self._steps > 0 and self._steps % self.options.exchange_steps == 0
        return self.state is State.PLANNING and self._steps > 0

    def hear(self, said: Sequence[Said]) -> tuple[Action, ...]:
        """What all ranks said at this exchange, in the same sequence everywhere."""
        self._at_once, self._heard = False, True
        for words in said:
            if words.get("fatal"):
                return self.fail(f"{words['name']}: {words['fatal']}")
        return _HEAR[self.state](self, said)

    def fail(self, why: str) -> tuple[Action, ...]:
        """Nothing more is conducted in this job."""
        if self.state is State.OFF:
            return ()
        self._to(Event.FAILED)
        self.why_off = why
        return (Tell(f"clocks are left alone from here on: {why}", warning=True), TurnOff())

    # -- one method per state ----------------------------------------------------------------------------------------------

    def _hear_recording(self, said: Sequence[Said]) -> tuple[Action, ...]:
        try:
            self.orders = agree([(_place(words), keys(words["order"])) for words in said])
        except OrderError as error:
            return self.fail(str(error))
        other = [f"{words['name']}: {words['differs']}" for words in said if words.get("differs")]
        note = (Tell(f"the recorded order counts, not the schedule's: {other[0]}{_more(other)}"),) if other else ()
        return (*note, *self._identify(said, Event.AGREED))

    @property
    def order(self) -> tuple[RankOrder, ...]:
        """What the ranks of this rank's pipeline run; empty until they have agreed."""
        return self.orders[self.place.pipeline] if self.orders else ()

    def differs(self, ran: RankOrder) -> str:
        """How what this rank ran differs from what its schedule promised; empty: not at all, or nothing was promised."""
        if self._derived is None:
            return ""
        promised = self._derived[self.place.rank] if self.place.rank < len(self._derived) else ()
        return "" if ran == promised else difference(ran, promised)

    def _hear_waiting(self, said: Sequence[Said]) -> tuple[Action, ...]:
        return self._identify(said, Event.READY)

    def _identify(self, said: Sequence[Said], event: Event) -> tuple[Action, ...]:
        """Every rank says what GPU it has; on to the kept profile if all have one that may be set."""
        idle = [str(words["name"]) for words in said if not words["ready"]]
        if idle:
            if self.state is not State.WAITING:
                self._to(Event.UNREADY)
                return (Tell(f"no clocks can be set for {idle[0]}{_more(idle)}: training goes on, and this is tried again"),)
            return ()
        options = self.options
        self._clocks = ladder(
            [w["clocks"] for w in said], options.clock_stride, options.lowest_clock_mhz, options.highest_clock_mhz
        )
        if not self._clocks:
            return self.fail("the GPUs of this job have no SM clock in common")
        stages = 1 + max(key[0] for order in self.orders[0] for key in order)
        self.key = fingerprint([w["gpu"] for w in said], [w["driver"] for w in said], [w["shape"] for w in said], stages)
        self._to(event)
        self._at_once = True
        return ()

    def _hear_resuming(self, said: Sequence[Said]) -> tuple[Action, ...]:
        told: list[Profile] = [self.profile]
        for words in said:
            try:
                told.append(profile_from_json(words.get("sheets") or ()))
            except (ValueError, KeyError, TypeError):
                continue
        best = max(told, key=lambda profile: len(profile.sheets))  # the first of the longest, so the same on every rank
        self.profile = best if self._fits(best) else Profile()
        known = len(self.profile.sheets)
        self.sweep = Sweep(self._clocks, self.options.rises, self.profile, self.options.blocking_power_w)
        note = (Tell(f"{known} clocks are known from an earlier start"),) if known else ()
        if self.sweep.done:
            return (*note, *self._measured())
        self._to(Event.UNMEASURED)
        self._current, self._pending = self.sweep.next_mhz, None
        return (*note, SetClock(self._current))

    def _fits(self, profile: Profile) -> bool:
        """Whether it has every instruction at every clock."""
        wanted = {key[:2] for order in self.orders[0] for key in order}
        return all({(row.stage, row.kind) for row in sheet.rows} == wanted for sheet in profile.sheets.values())

    def _hear_profiling(self, said: Sequence[Said]) -> tuple[Action, ...]:
        assert self.sweep is not None
        assert self._pending is not None
        if any(not words["ready"] for words in said):
            self._to(Event.UNREADY)
            self._current = self._pending = None
            return (SetClock(None), Tell("a rank lost its lease: the profile waits for it"))
        sheets: list[Sheet | None] = []
        for words in said:
            try:
                sheets.append(Sheet.from_json(words["sheet"]))
            except (ValueError, KeyError, TypeError):
                sheets.append(None)
        self.sweep.take(self._pending, sheets)
        self._pending = None
        if self.sweep.done:
            return (Save(), *self._measured())
        if self._current is None:  # the last one is to be measured again
            self._current, self._steps = self.sweep.next_mhz, 0
            return (Save(), SetClock(self._current))
        return (Save(),)

    def _measured(self) -> tuple[Action, ...]:
        self._current = None
        if not self.profile.sheets or not self._fits(self.profile):
            return (SetClock(None), *self.fail("no clock could be measured on every rank"))
        if (self.options.blocking_power_w or self.profile.blocking_power_w) is None:
            return (SetClock(None), *self.fail("the power of a blocked GPU was never seen: state blocking_power_w"))
        self._to(Event.MEASURED)
        self._at_once = True
        return (SetClock(None), self._request())

    def _request(self) -> MakePlan:
        return MakePlan(tuple(self.stages.of(n) for n in range(self.place.pipelines)), self.pace.times_s)

    def _hear_planning(self, said: Sequence[Said]) -> tuple[Action, ...]:
        answer = said[0]
        if answer.get("error"):
            if not self.plans:
                return self.fail(f"no plan: {answer['error']}")
            self._to(Event.KEPT)
            return (Tell(f"the plan stays as it is: {answer['error']}"),)
        if not answer.get("plans"):
            return ()  # the first rank still plans
        before, self.plans = self.plans, tuple(answer["plans"])
        self._to(Event.PLANNED)
        self._settling = True
        mine = self.plans[self.place.pipeline]
        if before and before[self.place.pipeline]["id"] == mine["id"]:
            return ()
        return (Arm(mine),)

    def _hear_running(self, said: Sequence[Said]) -> tuple[Action, ...]:
        if self._settling:  # the iterations in which the plan was swapped tell nothing
            self._settling = False
            return ()
        measured: list[float | None] = [None] * self.place.pipelines
        stages: dict[tuple[int, int], tuple[float, int | None]] = {}
        notes: list[str] = []
        for words in said:
            pipeline, seconds = _place(words).pipeline, words.get("time_s")
            if seconds is not None:
                measured[pipeline] = max(seconds, measured[pipeline] or 0.0)
            for stage, ratio, ceiling_mhz, reasons in words.get("stages") or ():
                known = stages.get((pipeline, stage))
                if known is None or ratio > known[0]:
                    stages[pipeline, stage] = (ratio, ceiling_mhz)
                    if reasons:
                        notes.append(f"stage {stage} of pipeline {pipeline}: {', '.join(reasons)}")
        changed = self.stages.tell(stages)
        slower = self.pace.tell(measured, [plan["iteration_s"] for plan in self.plans], {n for n, _ in self.stages.slow})
        for pipeline in changed:
            self.pace.forget(pipeline)
        if not changed and not slower:
            return ()
        self._to(Event.CHANGED)
        self._at_once = True
        words_of = [f"pipeline {n} takes {time_s:.4g} s" for n, time_s in self.pace.times_s.items()]
        words_of += [f"stage {stage} of pipeline {n} at {_slow(slow)}" for (n, stage), slow in sorted(self.stages.slow.items())]
        return (Tell("plans anew: " + "; ".join([*(words_of or ["everybody keeps pace again"]), *notes])), self._request())

    def _hear_off(self, said: Sequence[Said]) -> tuple[Action, ...]:
        return ()


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _slow(slow: Slow) -> str:
    return f"{slow.ceiling_mhz} MHz at most" if slow.ceiling_mhz is not None else f"{slow.factor:.3g}x its measured time"


def _place(words: Said) -> Place:
    return Place(*words["place"])


_HEAR = {
    State.RECORDING: Agreement._hear_recording,
    State.WAITING: Agreement._hear_waiting,
    State.RESUMING: Agreement._hear_resuming,
    State.PROFILING: Agreement._hear_profiling,
    State.PLANNING: Agreement._hear_planning,
    State.RUNNING: Agreement._hear_running,
    State.OFF: Agreement._hear_off,
    State.WARMUP: Agreement._hear_off,
}
