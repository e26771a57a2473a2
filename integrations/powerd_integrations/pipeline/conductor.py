"""One rank's Perseus: records, profiles, plans and follows, while training goes on.

House rules: nothing here raises into training; an instruction's begin and end cost microseconds and wait for nothing; only at the
step ends that ``Agreement.due`` names does it wait, for the other ranks; every rank that began to talk goes on talking until
all have agreed to stop, so that no rank is ever left waiting.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import astuple
from functools import partial
from typing import TYPE_CHECKING, Any

from powerd.client import Client
from powerd_integrations.pipeline import agreement as agreed
from powerd_integrations.pipeline import measured, planning
from powerd_integrations.pipeline.agreement import Agreement, State
from powerd_integrations.pipeline.diary import BASELINE, PROFILE, Diary, Page
from powerd_integrations.pipeline.exchange import Exchange
from powerd_integrations.pipeline.gpu import Gpu, Observed, Ran
from powerd_integrations.pipeline.measured import Sheet
from powerd_integrations.pipeline.options import Options
from powerd_integrations.pipeline.place import Place
from powerd_integrations.pipeline.recorded import Key, is_training, keys
from powerd_integrations.pipeline.timing import HostTiming, Send, Timing
from powerd_integrations.pipeline.worker import Worker

if TYPE_CHECKING:
    from powerd.client import Beats

log = logging.getLogger("powerd.pipeline")
PREPARE_S = 2.0  # a lease that takes longer is waited for by training on
RESULT_S = 30.0  # how long a step end waits at most for what the worker was asked a step ago


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
        self._gpu = Gpu(client, uuid, self.options, str(place))
        self._worker = Worker(self.options.background)
        about = (self._worker, self.options.first_step, lambda: self._gpu.uuid if self._gpu.ready else None)
        self._diary = Diary(client, self.options.job, place, *about) if self.options.report else None
        self._begin_ns = 0
        self._straight = False
        self._clock_mhz: float | None = None
        self._planner: planning.Planner | None = None
        self._planned: Future[list[dict[str, Any]]] | None = None
        self._measuring: Future[Sheet | None] | None = None
        self._arming: Future[Beats | None] | None = None
        self._mending: Future[bool] | None = None
        self._observing: Future[dict[int, Observed]] | None = None
        self._observed: dict[int, Observed] = {}
        self._expected_s: list[float | None] = []
        self._kept: list[tuple[Any, ...]] = []
        self._whole: deque[tuple[Any, ...]] = deque(maxlen=2)  # the newest steps that followed the plan, without a gap
        self._first = place.pipeline == place.rank == place.tensor == 0
        self._off = False
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
            if self._arming is not None and self._arming.done():
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
            self._worker.close()
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
        end_mark = self._mark()
        whole = len(self._marks) == 2 * len(self._keys) and bool(self._keys)
        followed = self._follows and self._k == self._length
        if self._beats is not None:
            self._step += 1
            if self._follows and not followed:
                self._safe()
                self._say_stray(f"{self.place} ended a step after {self._k} of {self._length} instructions")
        as_agreed = whole and tuple(self._keys) == self._expected
        step = (self._begin_mark, end_mark, tuple(self._keys), tuple(self._marks))
        self._follows = False
        if not whole or not is_training(self._keys):
            return  # an evaluation pass, or a step that broke off: no step for anybody
        self.steps += 1
        if self._diary is not None:
            self._straight = True
            self._diary.add(self._page(followed))
        if self._keep and as_agreed:
            self._kept.append(step)
        if followed and as_agreed:
            self._whole.append(step)
        else:
            self._whole.clear()
        if self.steps == 1:
            self._prepare()
        self._perform(self.agreement.step())
        while self.agreement.due and not self._off:
            self._talk(tuple(self._keys))

    def _page(self, followed: bool) -> Page:
        name = PROFILE if self.agreement.state is State.PROFILING else BASELINE
        clock_mhz: float | None = float(self._gpu.top_mhz) if self._gpu.clocks_mhz and name == BASELINE else None
        if self._beats is not None and self.plan is not None:
            name, clock_mhz = (str(self.plan["id"]), self._clock_mhz) if followed else ("safe", None)
        return Page(self.steps, self._begin_ns, self._now_ns(), name, clock_mhz)

    def _talk(self, ran: tuple[Key, ...]) -> None:
        words: dict[str, Any] = {"name": str(self.place), "place": list(astuple(self.place))}
        try:
            words |= _SAY[self.agreement.state](self, ran)
            words["ready"] = self._gpu.ready
        except Exception as error:  # the others must hear of it: they wait for these words
            log.debug("cannot say what the others wait for", exc_info=True)
            words |= {"ready": False, "fatal": f"{type(error).__name__}: {error}"}
        try:
            said = list(self._exchange.gather(words))
        except Exception as error:
            self._broken(error, "the ranks cannot talk")
            return
        self._first = said[0]["place"] == words["place"]
        self._perform(self.agreement.hear(said))

    def _ran(self, step: tuple[Any, ...]) -> Ran:
        begin, end, ran, marks = step
        times = self._timing.resolve([begin, *marks, end])
        inner = times[1:-1]
        return Ran(times[0], times[-1], tuple(zip(ran, inner[::2], inner[1::2], strict=True)))

    # -- what is said, by state -----------------------------------------------------------------------------------------------

    def _say_identity(self, ran: tuple[Key, ...]) -> dict[str, Any]:
        if not self._gpu.ready:
            self._prepare()
            if self._mending is not None and self.agreement.state is State.RECORDING:
                wait([self._mending], PREPARE_S)
        gpu = self._gpu
        words = {"clocks": list(gpu.clocks_mhz), "gpu": gpu.name, "driver": gpu.driver}
        words["shape"] = str(self._shape() if callable(self._shape) else self._shape)
        return words | ({"order": [list(key) for key in ran]} if self.agreement.state is State.RECORDING else {})

    def _say_profile(self, ran: tuple[Key, ...]) -> dict[str, Any]:
        self._expected = self.agreement.order[self.place.rank]
        self._length = len(self._expected)
        if self.place.local_rank != 0:
            return {}
        kept = measured.load(self.options.cache, self.agreement.key)
        return {"sheets": [] if kept is None else [sheet.to_json() for sheet in kept.sheets.values()]}

    def _say_sheet(self, ran: tuple[Key, ...]) -> dict[str, Any]:
        asked, self._measuring = self._measuring, None
        try:
            sheet = None if asked is None else asked.result(RESULT_S)
        except Exception as error:
            log.debug("the profile of this clock is lost: %s", error)
            sheet = None
        if not self._gpu.ready:
            self._prepare()
        return {"sheet": None if sheet is None else sheet.to_json()}

    def _say_plans(self, ran: tuple[Key, ...]) -> dict[str, Any]:
        if not self._first or self._planned is None or not self._planned.done():
            return {}
        planned, self._planned = self._planned, None
        error = planned.exception()
        return {"error": str(error) or type(error).__name__} if error is not None else {"plans": planned.result()}

    def _say_pace(self, ran: tuple[Key, ...]) -> dict[str, Any]:
        self._mend()
        if len(self._whole) < 1 + self._timing.lags or self.plan is None:
            return {"time_s": None}
        step = self._ran(self._whole[-1 - self._timing.lags])
        if self._observing is not None and self._observing.done():
            done, self._observing = self._observing, None
            self._observed = {} if done.exception() is not None else done.result()
        ratios: dict[int, list[tuple[float, float]]] = {}
        for ((stage, _, _), begin_ns, end_ns), expected_s in zip(step.instructions, self._expected_s, strict=True):
            if expected_s is None:
                continue
            ratios.setdefault(stage, []).append(((end_ns - begin_ns) / 1e9, expected_s))
        stages = []
        for stage, all_of in ratios.items():
            ratio, seen = _telling(all_of), self._observed.get(stage, Observed(None, ()))
            stages.append([stage, ratio, seen.ceiling_mhz, list(seen.reasons)])
            if ratio > 1.0 + 2 * self.options.tolerance and self._observing is None:
                clocks = self.plan["clocks"][self.place.rank]
                self._observing = self._worker.submit(partial(self._gpu.observe, step, clocks))
        return {"time_s": step.whole_s if self.place.rank == 0 else step.busy_s, "stages": stages}

    # -- what is done ---------------------------------------------------------------------------------------------------------

    def _perform(self, actions: Sequence[agreed.Action]) -> None:
        for action in actions:
            if isinstance(action, agreed.SetClock):
                self._kept = []
                self._worker.submit(partial(self._gpu.set_clock, action.mhz))
            elif isinstance(action, agreed.Measure):
                kept, self._kept = self._kept, []
                self._measuring = self._worker.submit(partial(self._measure, action.mhz, kept))
            elif isinstance(action, agreed.Save):
                if self.place.local_rank == 0 and self.place.tensor == 0:
                    self._worker.submit(self._save)
            elif isinstance(action, agreed.MakePlan):
                if self._first:
                    self._planned = self._worker.submit(partial(self._make_plans, action))
            elif isinstance(action, agreed.Arm):
                self._follow(dict(action.plan))
            elif isinstance(action, agreed.Tell):
                level = logging.DEBUG if not self._first else logging.WARNING if action.warning else logging.INFO
                log.log(level, "powerd: %s", action.text)
            else:
                self._leave()

    def _prepare(self) -> None:
        if self._mending is None or self._mending.done():
            self._mending = self._worker.submit(self._gpu.prepare)

    def _measure(self, mhz: int, kept: Sequence[tuple[Any, ...]]) -> Sheet | None:
        return self._gpu.sheet(mhz, [self._ran(step) for step in kept])

    def _save(self) -> None:
        try:
            measured.save(self.options.cache, self.agreement.key, self.agreement.profile)
        except OSError as error:
            log.info("powerd: the profile cannot be kept: %s", error)

    def _make_plans(self, request: agreed.MakePlan) -> list[dict[str, Any]]:
        if self._planner is None:
            profile, options = self.agreement.profile, self.options
            watts = options.blocking_power_w or profile.blocking_power_w or 0.0
            here = planning.can_plan_here() if options.plan_locally is None else options.plan_locally
            name = f"perseus-{self.agreement.key[:8]}"
            self._planner = planning.planning(
                self.agreement.order, profile.rows, watts, options.slowdown, name, self._gpu.client, here
            )
        return self._planner.plan(request)

    def _follow(self, plan: dict[str, Any]) -> None:
        """Arm this rank's part; the plan in force goes on until the new one is there."""
        self.plan = plan
        clocks = plan["clocks"][self.place.rank]
        slow = self.agreement.stages.of(self.place.pipeline)
        expected = planning.expected_s(self.agreement.profile.rows, slow)
        self._expected_s = [expected.get((s, k, mhz)) for (s, k, _), mhz in zip(self._expected, clocks, strict=True)]
        known = [(mhz, time_s) for mhz, time_s in zip(clocks, self._expected_s, strict=True) if mhz and time_s]
        self._clock_mhz = sum(mhz * time_s for mhz, time_s in known) / sum(time_s for _, time_s in known) if known else None
        self._arming = self._worker.submit(partial(self._gpu.arm, plan["id"], clocks, plan["iteration_s"]))
        if not self.options.background:
            self._take_beats()

    def _take_beats(self) -> None:
        arming, self._arming = self._arming, None
        beats = None if arming is None or arming.exception() is not None else arming.result()
        before, self._beats = self._beats, beats
        self._send = _nobody if beats is None else beats.send
        self._announced = False
        self._whole.clear()
        if before is not None and beats is None:  # a new plan takes the old one's place by itself
            self._worker.submit(before.close)

    def _mend(self) -> None:
        """A lease or a beat socket that was lost is asked for again, while training goes on at the daemon's own setting."""
        if self.plan is None or self._arming is not None or (self._gpu.ready and self._beats is not None and self._beats.alive):
            return
        if not self._gpu.ready:
            self._beats, self._send = None, _nobody
            self._prepare()
        else:
            self._follow(self.plan)

    def _broken(self, error: Exception, what: str = "conducting failed") -> None:
        """Something of our own went wrong: leave training alone from here on."""
        if self._off:
            return
        log.warning("powerd: %s and training goes on without it: %s: %s", what, type(error).__name__, error)
        log.debug("the failure", exc_info=error)
        self._leave()

    def _leave(self) -> None:
        if self._off:
            return
        self._off = True
        beats, self._beats, self._send = self._beats, None, _nobody
        if self._diary is not None:
            self._diary.close(self.agreement.why_off)
        self._worker.submit(partial(self._give_back, beats))

    def _give_back(self, beats: Beats | None) -> None:
        if beats is not None:
            beats.close()
        self._gpu.release()
        self._timing.close()


def _telling(times: Sequence[tuple[float, float]]) -> float:
    """How much longer a stage's work takes than expected, from (measured, expected) of each instruction, without the odd ones."""
    ordered = sorted(times, key=lambda pair: pair[0] / pair[1])
    odd = len(ordered) // 8
    counted = ordered[odd : len(ordered) - odd]
    return sum(measured_s for measured_s, _ in counted) / sum(expected_s for _, expected_s in counted)


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
