"""A job of several ranks in one thread's time: every rank is a thread, the exchange a barrier, the daemon a table.

House rules: nothing sleeps; time is what the instructions' table says; the fake daemon answers exactly, so that what is asserted
is the conductor's doing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from powerd.api import LabelEnergy, SpansView
from powerd.model import ClockPlan
from powerd_integrations.pipeline import Conductor, Options, Place
from powerd_policies.perseus import schedules

CLOCKS = tuple(range(600, 1500, 60))  # 600..1440
BLOCKING_W = 80.0
UUID = "GPU-00000000-0000-0000-0000-00000000000"


class Barrier:
    """An exchange over threads."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks, timeout=60)
        self._values: list[Any] = [None] * ranks
        self.calls = 0

    def seat(self, rank: int) -> SimpleNamespace:
        def gather(value: Any) -> list[Any]:
            self._values[rank] = value
            self._barrier.wait()
            said = list(self._values)
            if self._barrier.wait() == 0:
                self.calls += 1
            return said

        return SimpleNamespace(gather=gather)


def work(stage: int, kind: str) -> float:
    """How heavy an instruction is: later stages are heavier, backward twice as heavy as forward."""
    return (1.0 + 0.15 * stage) * {"forward": 1.0, "backward": 2.0, "input": 1.0, "weight": 1.0}[kind]


def seconds(stage: int, kind: str, mhz: int) -> float:
    return 0.01 * work(stage, kind) * (0.2 + 0.8 * CLOCKS[-1] / mhz)


def joules(stage: int, kind: str, mhz: int) -> float:
    share = mhz / CLOCKS[-1]
    return seconds(stage, kind, mhz) * (90.0 + 310.0 * share**3)


@dataclass
class FakeBeats:
    plan: ClockPlan
    sent: list[tuple[int, int]] = field(default_factory=list)
    safes: int = 0
    alive: bool = True
    gpu: FakeGpu | None = None

    @property
    def clamped(self) -> int | None:
        return None if self.gpu is None else self.gpu.clamped_mhz

    def send(self, step: int, index: int) -> None:
        self.sent.append((step, index))
        if self.gpu is not None and self.alive:
            self.gpu.plan_mhz = self.plan.clocks_mhz[index]

    def safe(self) -> None:
        self.safes += 1
        if self.gpu is not None:
            self.gpu.plan_mhz = None

    def close(self) -> None:
        self.alive = False


@dataclass
class FakeGpu:
    """One simulated GPU: its clock, its time, what its spans used."""

    mhz: int = CLOCKS[-1]
    plan_mhz: int | None = None
    now: int = 1_000_000_000
    slower: float = 1.0
    ceiling_mhz: int = CLOCKS[-1]
    clamped_mhz: int | None = None  # what the daemon says that it cuts the plan to

    @property
    def clock_mhz(self) -> int:
        return min(self.plan_mhz or self.mhz, self.ceiling_mhz)

    def run(self, stage: int, kind: str) -> None:
        self.now += round(1e9 * seconds(stage, kind, self.clock_mhz) * self.slower)


class FakeClient:
    """A daemon that grants one GPU; ``up`` False: nobody is there."""

    def __init__(self, rank: int = 0) -> None:
        self.gpu = FakeGpu()
        self.uuid = UUID + str(rank)
        self.up = True
        self.set: list[int | None] = []
        self.beats: list[FakeBeats] = []
        self.warned: list[str] = []
        self.released = 0
        self.refuses = False  # plans are not armed
        self.deaf = 0  # so many questions for energy are not answered
        self.lease_now: SimpleNamespace | None = None

    def now_ns(self) -> int:
        return self.gpu.now

    def guard(self, what: str, action: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
        return action()

    def warn(self, what: str, error: Exception) -> None:
        self.warned.append(what)

    def resolve(self, gpus: str) -> tuple[str, ...]:
        return (self.uuid,) if self.up else ()

    def node(self) -> SimpleNamespace:
        one = SimpleNamespace(gpu=SimpleNamespace(uuid=self.uuid, name="Fake 80G"), driver_version="580.1", sm_clocks_mhz=CLOCKS)
        return SimpleNamespace(gpus=(one,) if self.up else ())

    def lease(self, gpus: Sequence[str], **wants: Any) -> SimpleNamespace:
        self.lease_now = SimpleNamespace(held=self.up, change=self._change, arm=self._arm, release=self._release)
        return self.lease_now

    def lose(self) -> None:
        assert self.lease_now is not None
        self.up = self.lease_now.held = False
        self.gpu.plan_mhz, self.gpu.mhz = None, CLOCKS[-1]
        for beats in self.beats:
            beats.alive = False

    def _change(self, *, sm_clock_mhz: Any, wait_s: float) -> tuple[()]:
        self.gpu.mhz = sm_clock_mhz[1] if isinstance(sm_clock_mhz, tuple) else sm_clock_mhz
        self.set.append(None if isinstance(sm_clock_mhz, tuple) else sm_clock_mhz)
        return ()

    def _arm(self, plan: ClockPlan) -> FakeBeats:
        self.beats.append(FakeBeats(plan, gpu=self.gpu, alive=not self.refuses))
        return self.beats[-1]

    def _release(self) -> None:
        self.released += 1

    def spans(self, uuid: str, spans: Sequence[Any]) -> SpansView:
        if self.deaf > 0:
            self.deaf -= 1
            return SpansView(uuid, (), 0, "")
        totals: dict[str, list[float]] = {}
        for before, after in zip([None, *spans], spans, strict=False):
            assert before is None or before.end_ns <= after.begin_ns, "spans overlap"
            if before is not None and after.begin_ns > before.end_ns:
                totals.setdefault("", []).append((after.begin_ns - before.end_ns) / 1e9)
            totals.setdefault(after.label, []).append((after.end_ns - after.begin_ns) / 1e9)
        labels = []
        for label, times in totals.items():
            name, _, asked = label.partition("@")
            stage, _, kind = name.partition("/")
            mhz = min(int(asked), self.gpu.ceiling_mhz) if asked else self.gpu.mhz
            watts = joules(int(stage), kind, mhz) / seconds(int(stage), kind, mhz) if kind else BLOCKING_W
            held = ("hw_thermal_slowdown",) if asked and int(asked) > mhz else ()
            energy_j = watts * sum(times)
            labels.append(LabelEnergy(label, len(times), sum(times), energy_j, energy_j, energy_j, held, mhz))
        return SpansView(uuid, tuple(labels), 100, "fit")


class Rank:
    """One rank's training loop; ``order`` is what it really runs."""

    def __init__(
        self, place: Place, exchange: Any, client: FakeClient, options: Options, derived: Any, order: Any, **about: Any
    ) -> None:
        self.client, self.place = client, place
        self.conductor = Conductor(place, exchange, client, order=derived, options=options, **about)  # type: ignore[arg-type]
        self.order = order


class Job:
    """Pipelines of ranks; ``steps`` runs training steps with true waiting times between stages."""

    def __init__(
        self, tmp_path: Path | None = None, *, ranks: int = 3, pipelines: int = 1, microbatches: int = 4, name: str = "1f1b",
        derived: bool = True, clients: Sequence[FakeClient] | None = None, recorded: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        order = schedules.order(name, ranks, microbatches)
        total = ranks * pipelines
        self.exchange = Barrier(total)
        chosen: dict[str, Any] = {
            "background": False,
            "patience": 2,
            "report": False,
            "cache": tmp_path,
            "clock_stride": 1,
            "iterations_per_clock": 2,
            **options,
        }
        self.ranks = []
        for n in range(total):
            pipeline, rank = divmod(n, ranks)
            place = Place(pipeline, rank, 0, pipelines, ranks, 1, n)
            client = clients[n] if clients else FakeClient(n)
            place = Place(pipeline, rank, 0, pipelines, ranks, 1, 0 if n == 0 else 1)
            runs = recorded(pipeline, rank, order[rank]) if recorded else order[rank]
            self.ranks.append(
                Rank(place, self.exchange.seat(n), client, Options(**chosen), order if derived else None, runs, shape="tiny")
            )
        self.losses: list[float] = []

    @property
    def states(self) -> set[str]:
        return {str(rank.conductor.state) for rank in self.ranks}

    def steps(self, count: int, *, backward: bool = True, between: Callable[[], None] | None = None) -> None:
        for _ in range(count):
            self._together(lambda rank: rank.conductor.step_begin())
            for pipeline in range(self.ranks[0].place.pipelines):
                self._run([rank for rank in self.ranks if rank.place.pipeline == pipeline], backward)
            self._together(lambda rank: rank.conductor.step_end())
            latest = max(rank.client.gpu.now for rank in self.ranks)
            for rank in self.ranks:  # gradient synchronisation: everybody waits for the slowest
                rank.client.gpu.now = latest + 1_000_000

    def _run(self, ranks: list[Rank], backward: bool) -> None:
        """Play a pipeline: an instruction begins when its rank is free and its inputs are there."""
        ended: dict[tuple[int, str, int], int] = {}
        last = max(i.stage for rank in ranks for i in rank.order)
        left = [[i for i in rank.order if backward or i.kind == "forward"] for rank in ranks]
        while any(left):
            moved = False
            for rank, todo in zip(ranks, left, strict=True):
                while todo:
                    i = todo[0]
                    needs = [(i.stage - 1, "forward", i.microbatch)] if i.kind == "forward" and i.stage else []
                    if i.kind == "backward" and i.stage < last:
                        needs = [(i.stage + 1, "backward", i.microbatch)]
                    if any(key not in ended for key in needs):
                        break
                    gpu = rank.client.gpu
                    gpu.now = max([gpu.now, *(ended[key] for key in needs)])
                    rank.conductor.begin(i.stage, str(i.kind), i.microbatch)
                    gpu.run(i.stage, str(i.kind))
                    rank.conductor.end(i.stage, str(i.kind), i.microbatch)
                    ended[i.stage, str(i.kind), i.microbatch] = gpu.now
                    todo.pop(0)
                    moved = True
            assert moved, "the order that the test wants cannot be run"

    def _together(self, call: Callable[[Rank], None]) -> None:
        threads = [threading.Thread(target=call, args=(rank,)) for rank in self.ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
            assert not thread.is_alive(), "a rank waits for ever"

    def until(self, state: str, limit: int = 400) -> int:
        """Train until every rank is there; how many steps it took."""
        for taken in range(limit):
            if self.states == {state}:
                return taken
            self.steps(1)
        raise AssertionError(f"not {state} after {limit} steps but {self.states}")

    def time_s(self) -> float:
        """One more iteration of the first pipeline, in seconds, without what is between iterations."""
        before = self.ranks[0].client.gpu.now
        self.steps(1)
        return (self.ranks[0].client.gpu.now - before - 1_000_000) / 1e9

    def close(self) -> None:
        for rank in self.ranks:
            rank.conductor.close()
