"""What training jobs report of themselves: steps, restores, checkpoints, and what became of their energy.

House rules: pure and bounded; steps of several ranks become one by their number; a step that is run again was lost before; a
saving is only told when the job measured both sides of it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from powerd.api import JobEvent, JobStep, JobView
from powerd.clock import NS
from powerd.errors import DeniedError, RequestError
from powerd.records import JobStepRow

KINDS = ("start", "step", "restore", "checkpoint_begin", "checkpoint_end", "exception", "end", "note")
BASELINE, PROFILE = "baseline", "profile"  # reserved plan names: full clock to compare with, and a profiling sweep
SILENT_NS = 600 * NS
MAX_JOBS = 256
MAX_JOBS_OF_USER = 64
KEEP_STEPS = 1000  # of one job in memory; what is older is summed up
MAX_STEPS_OF_EVENT = 1000
MIN_COMPARED = 3  # steps on either side of a saving
_NAME = 128

#: (state, event) -> state; what is not here leaves the state as it is, except that any sign of life ends silence.
_STATES = {
    ("running", "end"): "ended",
    ("running", "exception"): "failed",
    ("ended", "start"): "running",
    ("ended", "step"): "running",
    ("failed", "start"): "running",
    ("failed", "step"): "running",
    ("failed", "restore"): "running",
}


@dataclass(frozen=True, slots=True)
class JobRestored:
    """From here on the job's steps after ``step`` of attempts before ``attempt`` are lost."""

    job: str
    attempt: int
    step: int


@dataclass(slots=True)
class JobRow:
    """A job's sums: what is stored of it beside its steps, replaced by job."""

    job: str
    uid: int
    begin_wall_ns: int
    state: str = "running"
    end_wall_ns: int | None = None
    last_wall_ns: int = 0
    attempt: int = 0
    steps: int = 0  # retained
    lost_steps: int = 0
    unmeasured_steps: int = 0  # of all
    unmeasured_retained: int = 0
    energy_j: float | None = None
    exceptions: int = 0
    checkpoints: int = 0
    checkpoint_time_s: float = 0.0
    checkpoint_energy_j: float | None = None
    plan: str | None = None
    gpus: tuple[str, ...] = ()
    last_detail: str = ""


Record = JobStepRow | JobRestored | JobRow

_APART_NS = 1_000_000  # between two steps of a job, so that each is a point of its own
_STEPPED_BACK_NS = 60 * NS  # a wall clock that went back further may use old times again
_OLDEST_NS = 86_400 * NS


def _plus(a: float | None, b: float | None) -> float | None:
    """The sum of what is known."""
    return b if a is None else a if b is None else a + b


def merged(row: JobStepRow, step: JobStep) -> JobStepRow:
    """A step with one more rank's report in it: the slowest time, the sum of the energies, the mean clock by time."""
    time_s = (step.end_ns - step.begin_ns) / NS
    clock = row.clock_mhz if step.clock_mhz is None else step.clock_mhz
    if row.clock_mhz is not None and step.clock_mhz is not None:
        ranks = len(row.gpus), len(step.gpus)
        clock = (row.clock_mhz * ranks[0] + step.clock_mhz * ranks[1]) / max(1, sum(ranks))
    energy = None if row.energy_j is None or step.energy_j is None else row.energy_j + step.energy_j
    return JobStepRow(
        row.job, row.attempt, row.step, row.wall_ns, min(row.begin_ns, step.begin_ns), max(row.end_ns, step.end_ns),
        max(row.time_s, time_s), energy, clock, row.plan or step.plan, tuple(sorted({*row.gpus, *step.gpus})),
    )  # fmt: skip


@dataclass(slots=True)
class Job:
    """One job: its sums and its newest retained steps."""

    row: JobRow
    seen_ns: int  # of the newest event
    steps: dict[int, JobStepRow] = field(default_factory=dict)  # by number, oldest first
    checkpoint_ns: int | None = None  # since when one is written
    newest_wall_ns: int = 0  # of all steps

    def add(self, event: JobEvent, wall_ns: int, now_ns: int) -> list[Record]:
        """Take an event; what of it is to be stored."""
        row, out = self.row, list[Record]()
        self.seen_ns, row.last_wall_ns = now_ns, wall_ns
        at_ns = now_ns if event.time_ns is None else event.time_ns
        state = _STATES.get((row.state, event.kind), row.state)
        if state != row.state:
            row.end_wall_ns = wall_ns if state in ("ended", "failed") else None
            row.state = state
        if event.detail and event.kind in ("exception", "end", "note"):
            row.last_detail = event.detail[:500]
        if event.kind == "exception":
            row.exceptions += 1
        elif event.kind == "restore" and event.step is not None:
            out += self._restore(event.step)
        elif event.kind == "checkpoint_begin":
            self.checkpoint_ns = at_ns
        elif event.kind == "checkpoint_end":
            row.checkpoints += 1
            row.checkpoint_energy_j = _plus(row.checkpoint_energy_j, event.energy_j)
            row.energy_j = _plus(row.energy_j, event.energy_j)
            if self.checkpoint_ns is not None:
                row.checkpoint_time_s += max(0, at_ns - self.checkpoint_ns) / NS
            self.checkpoint_ns = None
        for step in event.steps:
            out += self._step(step, wall_ns, wall_ns - now_ns)
        return [*out, replace(row)]

    def _restore(self, kept: int) -> list[Record]:
        """Training goes on after step ``kept``: what came later was for nothing."""
        row = self.row
        row.attempt += 1
        lost = [number for number in self.steps if number > kept]
        # Steps that are only known as sums lie before those that are kept one by one, numbered without holes.
        summed = row.steps - len(self.steps)
        oldest = min(self.steps, default=None)
        before = max(0, min(summed, oldest - 1 - kept)) if oldest is not None else 0
        row.steps -= len(lost) + before
        row.lost_steps += len(lost) + before
        row.unmeasured_retained -= sum(self.steps[number].energy_j is None for number in lost)
        for number in lost:
            del self.steps[number]
        return [JobRestored(row.job, row.attempt, kept)]

    def _moment(self, step: JobStep, wall_ns: int, boot_wall_ns: int) -> int:
        """The wall time that a step goes by for ever: of its end, neither to come nor older than a day, no other step's."""
        end_wall_ns = min(max(step.end_ns + boot_wall_ns, wall_ns - _OLDEST_NS), wall_ns)
        if end_wall_ns < self.newest_wall_ns + _APART_NS < end_wall_ns + _STEPPED_BACK_NS:
            end_wall_ns = self.newest_wall_ns + _APART_NS
        self.newest_wall_ns = end_wall_ns
        return end_wall_ns

    def _step(self, step: JobStep, wall_ns: int, boot_wall_ns: int) -> list[Record]:
        row, known, out = self.row, self.steps.get(step.step), list[Record]()
        if known is not None and not set(known.gpus).isdisjoint(step.gpus):
            if known.begin_ns <= step.begin_ns < known.end_ns or step.begin_ns == known.begin_ns:
                return []  # told twice: an answer got lost
            out += self._restore(step.step - 1)  # run again without a word
            known = None
        if known is None:
            time_s = (step.end_ns - step.begin_ns) / NS
            new = JobStepRow(
                row.job, row.attempt, step.step, self._moment(step, wall_ns, boot_wall_ns), step.begin_ns, step.end_ns, time_s,
                step.energy_j, step.clock_mhz, step.plan, tuple(sorted(step.gpus)),
            )  # fmt: skip
            row.steps += 1
        else:
            new = merged(known, step)
        unknown = (new.energy_j is None) - (known is not None and known.energy_j is None)
        row.unmeasured_steps += unknown
        row.unmeasured_retained += unknown
        before_j = None if known is None else known.energy_j
        if new.energy_j is not None:
            row.energy_j = _plus(row.energy_j, new.energy_j - (before_j or 0.0))
        elif before_j is not None:
            row.energy_j = (row.energy_j or 0.0) - before_j
        if step.plan not in (None, PROFILE):
            row.plan = None if step.plan == BASELINE else step.plan
        row.gpus = tuple(sorted({*row.gpus, *step.gpus}))
        self.steps[step.step] = new
        while len(self.steps) > KEEP_STEPS:
            del self.steps[next(iter(self.steps))]
        return [*out, new]

    def counted(self) -> tuple[float, ...]:
        """Steps, lost steps and joules so far."""
        return self.row.steps + self.row.lost_steps, self.row.lost_steps, self.row.energy_j or 0.0

    def state(self, now_ns: int) -> str:
        """running, ended, failed, or silent: it runs and has not said anything for ten minutes."""
        return "silent" if self.row.state == "running" and now_ns - self.seen_ns > SILENT_NS else self.row.state

    def view(self, now_ns: int) -> JobView:
        """The job as its readers see it."""
        row, steps = self.row, list(self.steps.values())
        measured = row.steps - row.unmeasured_retained
        return JobView(
            job=row.job, state=self.state(now_ns), begin_wall_ns=row.begin_wall_ns, end_wall_ns=row.end_wall_ns, steps=row.steps,
            lost_steps=row.lost_steps, time_s=statistics.median(s.time_s for s in steps) if steps else None,
            energy_j=row.energy_j,
            energy_per_retained_step_j=None if row.energy_j is None or measured <= 0 else row.energy_j / measured,
            saving_fraction=saving(steps, row.plan), plan=row.plan, gpus=row.gpus, unmeasured_steps=row.unmeasured_steps,
            checkpoints=row.checkpoints, checkpoint_time_s=row.checkpoint_time_s, checkpoint_energy_j=row.checkpoint_energy_j,
            exceptions=row.exceptions, last_detail=row.last_detail,
        )  # fmt: skip


def saving(steps: Iterable[JobStepRow], plan: str | None) -> float | None:
    """How much less energy a step takes under a plan than the job's own steps at full clock; None: not measured.

    Medians of both, on the same GPUs; steps marked ``baseline`` count as full clock, and if there are none, those without a plan.
    """
    if plan is None:
        return None
    steps = list(steps)
    under = [s for s in steps if s.plan == plan and s.energy_j is not None]
    if not under:
        return None
    gpus = under[-1].gpus
    mark = BASELINE if any(s.plan == BASELINE for s in steps) else None
    planned = [s.energy_j for s in under if s.gpus == gpus and s.energy_j is not None]
    full = [s.energy_j for s in steps if s.plan == mark and s.gpus == gpus and s.energy_j is not None]
    if len(planned) < MIN_COMPARED or len(full) < MIN_COMPARED or statistics.median(full) <= 0:
        return None
    return 1 - statistics.median(planned) / statistics.median(full)


def check_event(job: str, event: JobEvent) -> None:
    """RequestError ``bad_value`` that names what is wrong."""
    if not job or len(job) > _NAME or not job.isprintable():
        raise RequestError(f"a job's name has 1 to {_NAME} printable characters", code="bad_value")
    if event.kind not in KINDS:
        raise RequestError(f"unknown kind of event {event.kind[:40]!r}", code="bad_value", hint=f"one of {', '.join(KINDS)}")
    if event.steps and event.kind != "step":
        raise RequestError(f"steps come with kind step, not {event.kind}", code="bad_value")
    if event.kind == "restore" and (event.step is None or event.step < -1):
        raise RequestError("restore needs the last step that is kept", code="bad_value", hint="-1: none is")
    if len(event.steps) > MAX_STEPS_OF_EVENT:
        raise RequestError(f"{len(event.steps)} steps: at most {MAX_STEPS_OF_EVENT} an event", code="too_many")
    if event.energy_j is not None and not (math.isfinite(event.energy_j) and event.energy_j >= 0):
        raise RequestError("energy_j has to be a number of joules", code="bad_value")
    for step in event.steps:
        numbers = [v for v in (step.energy_j, step.clock_mhz) if v is not None]
        if step.step < 0 or step.end_ns < step.begin_ns or not all(math.isfinite(v) and v >= 0 for v in numbers):
            raise RequestError(f"step {step.step}: a number, a beginning before its end and no negative figure", code="bad_value")
        if not step.gpus or (step.plan is not None and len(step.plan) > _NAME):
            raise RequestError(
                f"step {step.step}: at least one GPU, and a plan's id of at most {_NAME} characters", code="bad_value"
            )


class JobTable:
    """All jobs of a node; use it from one thread (the daemon's loop)."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self.listeners: list[Callable[[Record], None]] = []  # every sink of measurements that keeps jobs
        self.counters: tuple[float, ...] = (0, 0, 0.0)  # steps, lost steps, joules that were reported to this daemon

    def load(self, rows: Iterable[JobRow], steps: Iterable[JobStepRow], now_ns: int, wall_ns: int) -> None:
        """Take over what an earlier daemon stored: steps oldest first."""
        for row in rows:
            self._jobs[row.job] = Job(row, now_ns - max(0, wall_ns - row.last_wall_ns))
        for step in steps:
            if (job := self._jobs.get(step.job)) is not None:
                job.steps[step.step] = step
                job.newest_wall_ns = max(job.newest_wall_ns, step.wall_ns)

    def owner(self, job: str) -> int | None:
        """The user whose job this is; None: there is none of that name."""
        known = self._jobs.get(job)
        return None if known is None else known.row.uid

    def add(self, name: str, uid: int, event: JobEvent, wall_ns: int, now_ns: int) -> None:
        """Take an event of a user; DeniedError when the job is somebody else's, RequestError when it makes no sense."""
        check_event(name, event)
        job = self._jobs.get(name)
        if job is None:
            self._make_room(uid, now_ns)
            job = self._jobs[name] = Job(JobRow(name, uid, wall_ns), now_ns)
        elif job.row.uid != uid:
            raise DeniedError(f"job {name!r} is another user's", hint="name yours differently")
        before = job.counted()
        for record in job.add(event, wall_ns, now_ns):
            for listener in self.listeners:
                listener(record)
        self.counters = tuple(
            sum_ + max(0, now - then) for sum_, now, then in zip(self.counters, job.counted(), before, strict=True)
        )

    def _make_room(self, uid: int, now_ns: int) -> None:
        mine = [n for n, job in self._jobs.items() if job.row.uid == uid]
        over = mine if len(mine) >= MAX_JOBS_OF_USER else list(self._jobs) if len(self._jobs) >= MAX_JOBS else []
        if not over:
            return
        idle = [n for n in over if self._jobs[n].state(now_ns) != "running"]
        if not idle:
            raise RequestError(f"{len(over)} jobs are running", code="too_many", hint="send kind end when a job is over")
        del self._jobs[min(idle, key=lambda n: self._jobs[n].seen_ns)]

    def view(self, name: str, now_ns: int) -> JobView | None:
        """One job, or None."""
        job = self._jobs.get(name)
        return None if job is None else job.view(now_ns)

    def steps(self, name: str, limit: int) -> list[JobStepRow]:
        """The newest retained steps that are kept in memory, oldest first."""
        job = self._jobs.get(name)
        return [] if job is None else list(job.steps.values())[-limit:]

    def gpus(self, now_ns: int) -> set[tuple[str, str]]:
        """(job, GPU) of every running job."""
        return {(name, u) for name, job in self._jobs.items() if job.state(now_ns) == "running" for u in job.row.gpus}

    def views(self, now_ns: int, uid: int | None = None) -> list[JobView]:
        """All jobs, or those of one user; newest first."""
        jobs = [j for j in self._jobs.values() if uid is None or j.row.uid == uid]
        return [j.view(now_ns) for j in sorted(jobs, key=lambda j: -j.row.begin_wall_ns)]

    def states(self, now_ns: int) -> dict[str, int]:
        """How many jobs are in each state."""
        counts = dict.fromkeys(("running", "ended", "failed", "silent"), 0)
        for job in self._jobs.values():
            counts[job.state(now_ns)] += 1
        return counts
