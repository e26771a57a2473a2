"""One rank's Perseus: records, profiles, plans and follows, while training goes on.

House rules: nothing here raises into training; an instruction's begin and end cost microseconds and wait for nothing; only at the
step ends that ``Agreement.due`` names does it wait, for the other ranks; every rank that began to talk goes on talking until
all have agreed to stop, so that no rank is ever left waiting.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from powerd.client import Client
from powerd_integrations.pipeline import agreement as agreed
from powerd_integrations.pipeline import planning
from powerd_integrations.pipeline.agreement import Agreement, State
from powerd_integrations.pipeline.diary import BASELINE, PROFILE, Diary, Page
from powerd_integrations.pipeline.errands import Errands
from powerd_integrations.pipeline.exchange import Exchange
from powerd_integrations.pipeline.gpu import Observed, Ran, iteration
from powerd_integrations.pipeline.options import Options
from powerd_integrations.pipeline.pace import telling
from powerd_integrations.pipeline.place import Place
from powerd_integrations.pipeline.recorded import Key, is_training, keys
from powerd_integrations.pipeline.timing import HostTiming, Send, Timing

if TYPE_CHECKING:
    from powerd.client import Beats

log = logging.getLogger("powerd.pipeline")


class Conductor:
    """See the package's docstring for how an adapter drives it; ``state`` tells where it stands, ``plan`` what it follows."""

    def __init__(
        self,
        place: Place,
        exchange: Exchange,
        client: Client,
        *,
        uuid: str | None = None,
        order: Sequence[Sequence[Any]] | None = None,
        options: Options | None = None,
        shape: str | Callable[[], str] = "",
        now_ns: Callable[[], int] | None = None,
        timing: Timing | None = None,
    ) -> None:
        self.place, self.options = place, options or Options()
        self.agreement = Agreement(place, self.options, None if order is None else tuple(keys(rank) for rank in order))
        self.plan: dict[str, Any] | None = None  # of this pipeline, as planning.py makes it
        self.steps = 0  # training steps that ended
        self._exchange, self._shape = exchange, shape
        self._now_ns = now_ns or client.now_ns
        self._timing: Timing = timing or HostTiming(self._now_ns)
        self._mark, self._announce = self._timing.mark, self._timing.announce
        self._errands = Errands(client, uuid, self.options, place, self.agreement)
        self._gpu = self._errands.gpu
        about = (self._errands.worker, self.options.first_step, lambda: self._gpu.uuid if self._gpu.ready else None)
        self._diary = Diary(client, self.options.job, place, *about) if self.options.report else None
        self._begin_ns = 0
        self._straight = False
        self._clock_mhz: float | None = None
        self._expected_s: list[float | None] = []
        self._kept: list[tuple[Any, ...]] = []
        self._whole: deque[tuple[Any, ...]] = deque(maxlen=2)  # the newest steps that followed the plan, without a gap
        self._first = place.pipeline == place.rank == place.tensor == 0
        self._off = False
        self._fatal = ""  # what went wrong on this rank: it is said at the next exchange
        self._said_stray = False
        self._expected: tuple[Key, ...] = ()
        self._length = 0
        self._beats: Beats | None = None
        self._send: Send = _nobody
        self._step = 0  # as beats count
        self._announced = False
        self._k = 0
        self._keys: list[Key] = []
        self._marks: list[Any] = []
        self._begin_mark: Any = None
        self._keep = False
        self._follows = False

    # -- what training calls -------------------------------------------------------------------------------------------------

    def step_begin(self) -> None:
        """An iteration begins: called before its first instruction."""
        if self._off:
            return
        try:
            self._reset()
            self._keep = self.agreement.keeps
            if self._errands.armed():
                self._take_beats()
            self._begin_mark = self._mark()
            if self._diary is not None:
                self._begin_ns = self._now_ns()
                self._diary.begin(self._begin_ns, self._straight)
                self._straight = False
            if self._beats is not None:
                self._follows = True
                if not self._announced:
                    self._announced = True
                    self._announce(self._begin_mark, self._send, self._step, 0)
        except Exception as error:
            self._broken(error)

    def begin(self, stage: int, kind: str, microbatch: int) -> None:
        """An instruction begins; what it waited for has arrived."""
        if self._off:
            return
        try:
            key = (stage, kind, microbatch)
            if self._follows and (self._k >= self._length or self._expected[self._k] != key):
                self._stray(key)
            self._keys.append(key)
            self._marks.append(self._mark())
        except Exception as error:
            self._broken(error)

    def end(self, stage: int, kind: str, microbatch: int) -> None:
        """It has ended: the next one is announced."""
        if self._off:
            return
        try:
            mark = self._mark()
            self._marks.append(mark)
            self._k = k = self._k + 1
            if self._follows:
                if k < self._length:
                    self._announce(mark, self._send, self._step, k)
                else:
                    self._announce(mark, self._send, self._step + 1, 0)
        except Exception as error:
            self._broken(error)

    def step_end(self) -> None:
        """The iteration has ended, before or after the optimizer's step; on some step ends the ranks talk here."""
        if self._off:
            return
        try:
            self._close_step()
        except Exception as error:
            self._broken(error)

    def step_abort(self) -> None:
        """The iteration broke off: the safe clock until the next one begins."""
        if self._off:
            return
        try:
            if self._beats is not None:
                self._safe()
                self._step += 1
            self._follows = False
        except Exception as error:
            self._broken(error)

    def close(self) -> None:
        """Training is over: the clocks go back to whoever else has a say. A second call changes nothing."""
        try:
            self._leave()
            self._errands.worker.close()
        except Exception as error:
            log.debug("closing: %s", error)

    @property
    def state(self) -> State:
        """Where the job stands, the same on every rank."""
        return State.OFF if self._off else self.agreement.state

    # -- one step -----------------------------------------------------------------------------------------------------------

    def _reset(self) -> None:
        self._k, self._keys, self._marks = 0, [], []
        self._keep = self._follows = False

    def _stray(self, key: Key) -> None:
        """Not the instruction that the plan has next: the safe clock until a whole step begins again."""
        self._follows = False
        self._safe()
        wanted = self._expected[self._k] if self._k < self._length else None
        self._say_stray(
            f"{self.place} ran {key[1]} of microbatch {key[2]} on stage {key[0]}, not {wanted or 'the end of the step'}"
        )

    def _say_stray(self, text: str) -> None:
        log.log(logging.DEBUG if self._said_stray else logging.WARNING, "powerd: safe clock for this step: %s", text)
        self._said_stray = True

    def _safe(self) -> None:
        self._announced = False
        beats = self._beats
        if beats is not None:  # behind the beats that were announced already, if those wait for the device
            self._announce(self._mark(), lambda step, index: beats.safe(), 0, 0)

    def _close_step(self) -> None:
        """Whatever goes wrong in here, a training step counts on this rank as on every other."""
        ran, marks = tuple(self._keys), tuple(self._marks)
        whole = len(marks) == 2 * len(ran) and bool(ran)
        try:
            followed = self._ended(whole)
            if whole and is_training(ran):
                self._note((self._begin_mark, self._mark(), ran, marks), followed)
        except Exception as error:
            self._broken(error)
        self._follows = False
        if not whole or not is_training(ran):
            return  # an evaluation pass, or a step that broke off: no step for anybody
        self.steps += 1
        self._perform(self.agreement.step())
        while self.agreement.due and not self._off:
            self._talk(ran)

    def _ended(self, whole: bool) -> bool:
        """Whether the step was the plan's, from its first instruction to its last."""
        followed = self._follows and whole and self._k == self._length
        if self._beats is not None:
            self._step += 1
            if self._follows and not followed:
                self._safe()
                self._say_stray(f"{self.place} ended a step after {self._k} of {self._length} instructions")
        return followed

    def _note(self, step: tuple[Any, ...], followed: bool) -> None:
        """Keep what this step may be asked for."""
        if self._diary is not None:
            self._straight = True
            self._diary.add(self._page(followed))
        if self._keep and step[2] == self._expected:
            self._kept.append(step)
        if followed:
            self._whole.append(step)
        else:
            self._whole.clear()
        if self.steps == 0:
            self._errands.prepare()

    def _page(self, followed: bool) -> Page:
        name = PROFILE if self.agreement.state is State.PROFILING else BASELINE
        clock_mhz: float | None = float(self._gpu.top_mhz) if self._gpu.clocks_mhz and name == BASELINE else None
        if self._beats is not None and self.plan is not None:
            name, clock_mhz = (str(self.plan["id"]), self._clock_mhz) if followed else ("safe", None)
        return Page(self.steps + 1, self._begin_ns, self._now_ns(), name, clock_mhz)

    def _talk(self, ran: tuple[Key, ...]) -> None:
        words: dict[str, Any] = {"name": str(self.place), "place": list(astuple(self.place))}
        try:
            words |= {"fatal": self._fatal} if self._fatal else _SAY[self.agreement.state](self, ran)
            words["ready"] = self._errands.ready
        except Exception as error:  # the others must hear of it: they wait for these words
            log.debug("cannot say what the others wait for", exc_info=True)
            words |= {"ready": False, "fatal": f"{type(error).__name__}: {error}"}
        try:
            said = list(self._exchange.gather(words))
        except Exception as error:
            log.warning("powerd: training goes on without it, because the ranks cannot talk: %s: %s", type(error).__name__, error)
            self._leave()
            return
        self._first = said[0]["place"] == words["place"]
        self._perform(self.agreement.hear(said))

    def _ran(self, step: tuple[Any, ...]) -> Ran:
        begin, end, what, marks = step
        times = self._timing.resolve([begin, *marks, end])
        return iteration(times[0], times[-1], what, times[1:-1])

    # -- what is said, by state -----------------------------------------------------------------------------------------------

    def _say_identity(self, ran: tuple[Key, ...]) -> dict[str, Any]:
        recording = self.agreement.state is State.RECORDING
        self._errands.prepare(patiently=recording)
        gpu = self._gpu
        words = {"clocks": list(gpu.clocks_mhz), "gpu": gpu.name, "driver": gpu.driver}
        words["shape"] = str(self._shape() if callable(self._shape) else self._shape)
        return words | ({"order": [list(key) for key in ran], "differs": self.agreement.differs(ran)} if recording else {})

    def _say_profile(self, ran: tuple[Key, ...]) -> dict[str, Any]:
        self._expected = self.agreement.order[self.place.rank]
        self._length = len(self._expected)
        return {"sheets": self._errands.kept()}

    def _say_sheet(self, ran: tuple[Key, ...]) -> dict[str, Any]:
        sheet = self._errands.sheet()
        self._errands.prepare()
        return {"sheet": None if sheet is None else sheet.to_json()}

    def _say_plans(self, ran: tuple[Key, ...]) -> dict[str, Any]:
        return self._errands.plans() if self._first else {}

    def _say_pace(self, ran: tuple[Key, ...]) -> dict[str, Any]:
        self._mend()
        if len(self._whole) < 1 + self._timing.lags or self.plan is None:
            return {"time_s": None}
        step = self._ran(self._whole[-1 - self._timing.lags])
        ratios: dict[int, list[tuple[float, float]]] = {}
        for ((stage, _, _), begin_ns, end_ns), expected_s in zip(step.instructions, self._expected_s, strict=True):
            if expected_s is None:
                continue
            ratios.setdefault(stage, []).append(((end_ns - begin_ns) / 1e9, expected_s))
        longer = {stage: telling(all_of) for stage, all_of in ratios.items()}
        slow = any(ratio > 1.0 + 2 * self.options.tolerance for ratio in longer.values())
        observed = self._errands.observe(step, self.plan["clocks"][self.place.rank], slow)
        clamped = None if self._beats is None else self._beats.clamped
        unknown = Observed(clamped, ("the plan is cut by a stronger want",) if clamped else ())
        stages = [
            [s, ratio, *(observed.get(s, unknown).ceiling_mhz, list(observed.get(s, unknown).reasons))]
            for s, ratio in longer.items()
        ]
        return {"time_s": step.whole_s if self.place.rank == 0 else step.busy_s, "stages": stages}

    # -- what is done ---------------------------------------------------------------------------------------------------------

    def _perform(self, actions: Sequence[agreed.Action]) -> None:
        for action in actions:
            if isinstance(action, agreed.SetClock):
                self._kept = []
                self._errands.set_clock(action.mhz)
            elif isinstance(action, agreed.Measure):
                kept, self._kept = self._kept, []
                self._errands.measure(action.mhz, lambda kept=kept: [self._ran(step) for step in kept])  # type: ignore[misc]
            elif isinstance(action, agreed.Save):
                self._errands.save()
            elif isinstance(action, agreed.MakePlan):
                if self._first:
                    self._errands.make_plans(action)
            elif isinstance(action, agreed.Arm):
                self._follow(dict(action.plan))
            elif isinstance(action, agreed.Tell):
                level = logging.DEBUG if not self._first else logging.WARNING if action.warning else logging.INFO
                log.log(level, "powerd: %s", action.text)
            else:
                self._leave()

    def _follow(self, plan: dict[str, Any]) -> None:
        """Arm this rank's part; the plan in force goes on until the new one is there."""
        self.plan = plan
        clocks = plan["clocks"][self.place.rank]
        slow = self.agreement.stages.of(self.place.pipeline)
        expected = planning.expected_s(self.agreement.profile.rows, slow)
        self._expected_s = [expected.get((s, k, mhz)) for (s, k, _), mhz in zip(self._expected, clocks, strict=True)]
        known = [(mhz, time_s) for mhz, time_s in zip(clocks, self._expected_s, strict=True) if mhz and time_s]
        self._clock_mhz = sum(mhz * time_s for mhz, time_s in known) / sum(time_s for _, time_s in known) if known else None
        self._errands.arm(plan["id"], clocks, plan["iteration_s"])
        if not self.options.background:
            self._take_beats()

    def _take_beats(self) -> None:
        beats = self._errands.beats()
        before, self._beats = self._beats, beats
        self._send = _nobody if beats is None else beats.send
        self._announced = False
        self._whole.clear()
        if beats is None:  # else the new plan takes the old one's place by itself
            self._errands.give_up(before)

    def _mend(self) -> None:
        """A lease or a beat socket that was lost is asked for again, while training goes on at the daemon's own setting."""
        if self.plan is None or self._errands.arming or (self._errands.ready and self._beats is not None and self._beats.alive):
            return
        if self._errands.ready:
            if self._errands.arm_rest.over:
                self._follow(self.plan)
        else:
            self._beats, self._send = None, _nobody
            self._errands.prepare()

    def _broken(self, error: Exception) -> None:
        """Something of our own went wrong: the safe clock now, and all ranks leave together when they talk next."""
        log.debug("the failure", exc_info=error)
        self._fatal = self._fatal or f"{type(error).__name__}: {error}"
        self._follows = False
        beats, self._beats, self._send = self._beats, None, _nobody
        self._errands.give_up(beats)

    def _leave(self) -> None:
        if self._off:
            return
        self._off = True
        beats, self._beats, self._send = self._beats, None, _nobody
        if self._diary is not None:
            self._diary.close(self.agreement.why_off)
        self._errands.give_up(beats)
        self._errands.release(self._timing.close)


def _nobody(step: int, index: int) -> None:
    """Nobody follows beats just now."""


_SAY: dict[State, Callable[[Conductor, tuple[Key, ...]], dict[str, Any]]] = {
    State.RECORDING: Conductor._say_identity,
    State.WAITING: Conductor._say_identity,
    State.RESUMING: Conductor._say_profile,
    State.PROFILING: Conductor._say_sheet,
    State.PLANNING: Conductor._say_plans,
    State.RUNNING: Conductor._say_pace,
}
