"""What is trained: the shape of a job, what each rank runs, and which kernels an instruction is.

House rules: pure; ranks are numbered pipeline by pipeline (rank = pipeline x ranks per pipeline + rank within it); what travels
between ranks is exactly what the graph of the schedule says.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

from powerd.errors import RequestError
from powerd_policies.perseus import dag, schedules
from powerd_policies.perseus.problem import Dag, Instruction, Kind, Order

#: An instruction as a mix of a stage's measured kernels; the parts of a split backward are half of it each (assumed).
MIXES: Final[dict[str, tuple[tuple[str, float], ...]]] = {
    Kind.FORWARD: (("forward", 1.0),),
    Kind.BACKWARD: (("backward", 1.0),),
    Kind.INPUT: (("backward", 0.5),),
    Kind.WEIGHT: (("backward", 0.5),),
    Kind.RECOMPUTE: (("forward", 1.0),),
}


@dataclass(frozen=True)
class Job:
    """A training job on the GPUs 0, 1, ... of a simulated node; ``rows[s]`` is the profile's stage for virtual stage ``s``."""

    rows: tuple[int, ...] = (0, 2, 5, 7)
    pipelines: int = 1
    schedule: str = "1f1b"
    microbatches: int = 8
    chunks: int = 1
    recompute: bool = False
    profile: str = "gpt3-175b"

    def __post_init__(self) -> None:
        if self.pipelines < 1:
            raise RequestError(f"there is at least 1 pipeline, not {self.pipelines}", code="bad_value")
        per_rank = schedules.stage_count(self.schedule, 1, self.chunks)
        if not self.rows or len(self.rows) % per_rank:
            raise RequestError(f"{len(self.rows)} stages do not share out over ranks with {per_rank} each", code="bad_value")

    @cached_property
    def ranks(self) -> int:
        """Ranks, thus GPUs, of one pipeline."""
        return len(self.rows) // schedules.stage_count(self.schedule, 1, self.chunks)

    @property
    def world(self) -> int:
        """Ranks, thus GPUs, of the whole job."""
        return self.ranks * self.pipelines

    @cached_property
    def order(self) -> Order:
        """What each rank of a pipeline runs; RequestError for a schedule that cannot be."""
        return schedules.order(self.schedule, self.ranks, self.microbatches, self.chunks, self.recompute)

    @cached_property
    def graph(self) -> Dag:
        """What must have ended before what may begin, in one pipeline."""
        return dag.build(self.order)

    def kernels(self, step: Instruction) -> tuple[tuple[str, float], ...]:
        """The kernels of an instruction and their units."""
        return tuple((f"{self.profile}/{self.rows[step.stage]}/{part}", units) for part, units in MIXES[step.kind])

    def travels(self, rank: int) -> tuple[dict[Instruction, list[tuple[int, Instruction]]], dict[Instruction, list[int]]]:
        """Of one rank of a pipeline: instruction -> (rank, instruction) that it waits for, and -> the ranks that wait for it."""
        waits: dict[Instruction, list[tuple[int, Instruction]]] = {}
        sends: dict[Instruction, list[int]] = {}
        for before, after in self.graph.edges.tolist():
            source, target = int(self.graph.rank[before]), int(self.graph.rank[after])
            if source == target:
                continue
            if target == rank:
                waits.setdefault(self.graph.nodes[after], []).append((source, self.graph.nodes[before]))
            if source == rank:
                targets = sends.setdefault(self.graph.nodes[before], [])
                if target not in targets:
                    targets.append(target)
        return waits, sends
