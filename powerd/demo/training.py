"""A conducted training run: its ranks are started, let go step by step, disturbed, and measured through powerd.

House rules: between two steps nothing moves until we say so, which is when faults are injected; energy is powerd's, time the
ranks' own; the ranks are processes like any training job's, nothing of them is imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from powerd.demo.children import Child, DemoError
from powerd.demo.stage import START_S, Stage

PATIENCE_S = 90.0  # real, without a word of the ranks
MODULE = "powerd_integrations.simulated_pipeline"


@dataclass(frozen=True, slots=True)
class Shape:
    """What is trained: stages of the measured profile, on pipelines side by side."""

    stages: tuple[int, ...] = (0, 2, 5, 7)
    pipelines: int = 2
    microbatches: int = 6
    schedule: str = "1f1b"
    profile: str = "gpt3-175b"

    @property
    def world(self) -> int:
        """GPUs."""
        return len(self.stages) * self.pipelines

    def gpus(self, pipeline: int) -> range:
        """The GPUs of one pipeline."""
        return range(pipeline * len(self.stages), (pipeline + 1) * len(self.stages))

    def arguments(self) -> list[str]:
        """As the ranks take it."""
        return [
            "--stages", ",".join(map(str, self.stages)), "--pipelines", str(self.pipelines),
            "--microbatches", str(self.microbatches), "--schedule", self.schedule, "--profile", self.profile,
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """One iteration as all ranks saw it, on the node's clock; ``plans`` by pipeline."""

    number: int
    begin_ns: int
    end_ns: int
    worked_s: tuple[float, ...]  # by pipeline: to the end of its last backward
    state: str | None
    plans: tuple[str | None, ...]
    true_j: tuple[float, ...]  # by GPU, from begin to end of this step: the simulator's truth, for scoring
    ran_s: tuple[tuple[tuple[float, float], ...], ...]  # by GPU: begin and end of its instructions


@dataclass(frozen=True, slots=True)
class Energy:
    """Joules of some GPUs over some steps; the true energy lies within the bounds with 95 % confidence."""

    energy_j: float
    low_j: float
    high_j: float

    def __add__(self, other: Energy) -> Energy:
        return Energy(self.energy_j + other.energy_j, self.low_j + other.low_j, self.high_j + other.high_j)

    def per(self, count: int) -> Energy:
        """A share of it."""
        return Energy(self.energy_j / count, self.low_j / count, self.high_j / count)


@dataclass(frozen=True, slots=True)
class Measured:
    """Consecutive steps: seconds and joules of one iteration; gaps between the steps are in it."""

    steps: int
    time_s: float
    energy: tuple[Energy, ...]  # by GPU
    true_j: float

    @property
    def total(self) -> Energy:
        """Of all GPUs."""
        return sum(self.energy[1:], self.energy[0])

    def of(self, gpus: Sequence[int]) -> Energy:
        """Of some GPUs."""
        return sum((self.energy[gpu] for gpu in gpus[1:]), self.energy[gpus[0]])


@dataclass
class Training:
    """The run: ``advance`` lets it make one step; what it said is kept."""

    here: Stage
    shape: Shape
    child: Child
    meter: Child
    steps: list[Step] = field(default_factory=list)
    plans: dict[str, dict[str, Any]] = field(default_factory=dict)  # id -> what was told of it
    each: Callable[[Step], None] = lambda step: None  # called with every step that has ended

    def advance(self) -> Step:
        """One more iteration; DemoError when a rank fails."""
        self.child.tell("go")
        rows: dict[int, dict[str, Any]] = {}
        while len(rows) < self.shape.world:
            message = self.child.next(PATIENCE_S)
            if "planned" in message:
                self.plans[message["planned"]["id"]] = message
            elif "step" in message:
                rows[message["rank"]] = message
            elif "done" in message:
                raise DemoError(f"rank {message['done']} ended after {len(self.steps)} steps")
        ordered = [rows[rank] for rank in range(self.shape.world)]
        self.steps.append(_step(ordered, self.shape))
        self.each(self.steps[-1])
        return self.steps[-1]

    def until(self, condition: Callable[[Step], bool], most: int, what: str) -> Step:
        """Steps until one fulfils the condition; DemoError after so many."""
        for _ in range(most):
            if condition(step := self.advance()):
                return step
        raise DemoError(f"{what}: not within {most} iterations; {self.child.last_words()}")

    def measured(self, count: int, name: str) -> Measured:
        """Make so many steps within energy windows, and one more, in which powerd closes these: its next sample must come."""
        self.meter.tell(f"begin {name}")
        self.meter.next(START_S)
        steps = [self.advance() for _ in range(count)]
        self.meter.tell("end")
        self.meter.next(START_S)
        self.advance()
        figures = self.meter.next(START_S)["figures"]
        seconds = (steps[-1].end_ns - steps[0].begin_ns) / 1e9 / count
        energy = tuple(_energy(figure, gpu).per(count) for gpu, figure in enumerate(figures))
        return Measured(count, seconds, energy, sum(sum(step.true_j) for step in steps) / count)

    def stop(self) -> None:
        """No further step; returns when all ranks have ended."""
        self.child.tell("stop")
        for _ in range(self.shape.world):
            while "done" not in self.child.next(PATIENCE_S):
                pass


def _energy(figure: dict[str, Any], gpu: int) -> Energy:
    values = [figure[name] for name in ("energy_j", "low_j", "high_j")]
    if None in values:
        raise DemoError(f"GPU {gpu}: no energy was measured")
    return Energy(*values)


def _step(rows: Sequence[dict[str, Any]], shape: Shape) -> Step:
    firsts = [shape.gpus(pipeline)[0] for pipeline in range(shape.pipelines)]
    begin_ns = min(row["begin_ns"] for row in rows)
    worked = [max(rows[gpu]["worked_ns"] for gpu in shape.gpus(pipeline)) for pipeline in range(shape.pipelines)]
    return Step(
        rows[0]["step"], begin_ns, max(row["end_ns"] for row in rows), tuple((ns - begin_ns) / 1e9 for ns in worked),
        rows[0]["state"], tuple(rows[gpu]["plan"] for gpu in firsts),
        tuple((row["end_mj"] - row["begin_mj"]) / 1000 for row in rows),
        tuple(tuple(zip(*[(us / 1e6 for us in row["ran_us"][at::2]) for at in (0, 1)], strict=True)) for row in rows),
    )  # fmt: skip


def start(here: Stage, shape: Shape, options: dict[str, Any], baseline: int, most: int = 200) -> Training:
    """The ranks, ready to make their first step; the first ``baseline`` ones are made without powerd."""
    words = ["--ask", "--steps", str(most), "--baseline", str(baseline), "--conduct", json.dumps(options)]
    child = here.start("training", "-m", MODULE, *shape.arguments(), *words)
    for _ in range(shape.world):
        if "ready" not in (message := child.next(START_S)):
            raise DemoError(f"a rank began with {message}")
    meter = here.start("meter", "-m", "powerd.demo.meter", str(shape.world))
    meter.next(START_S)
    here.go()
    return Training(here, shape, child, meter)
