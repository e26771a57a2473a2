"""One rank: runs its part of the schedule on its GPU, waits for its peers at blocking power, and says how every step went.

House rules: instructions run one at a time in the order of the schedule; the gradient sync at the end of a step waits for the
slowest pipeline, and its norm for everybody, as in training frameworks; truth (the simulator's energy) is only printed, for scoring.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

from powerd.clock import Clock
from powerd.sim.node import SimNode
from powerd.sim.workload import Context
from powerd_integrations.simulated_pipeline.job import Job
from powerd_integrations.simulated_pipeline.mail import Mail


@dataclass(frozen=True, slots=True)
class Step:
    """One step of one rank; times on the node's clock, energy true and of this rank's GPU since the node was made."""

    rank: int
    step: int
    begin_ns: int
    worked_ns: int  # end of its last instruction, before the gradient sync
    end_ns: int
    busy_s: float
    begin_mj: float
    end_mj: float

    def to_json(self) -> dict[str, Any]:
        """As it is printed."""
        return {"simulated": True, **asdict(self)}


class Conducted(Protocol):
    """What a framework's hook calls around its own work; powerd_integrations.pipeline.Conductor is one."""

    def step_begin(self) -> None: ...
    def begin(self, stage: int, kind: str, microbatch: int) -> None: ...
    def end(self, stage: int, kind: str, microbatch: int) -> None: ...
    def step_end(self) -> None: ...
    def close(self) -> None: ...


class Rank:
    """One GPU of the job; ``run_step`` is what a framework's training loop calls."""

    def __init__(self, job: Job, rank: int, node: SimNode, clock: Clock, mail: Mail, conductor: Conducted | None = None) -> None:
        self.rank, self.pipeline, self.place = rank, rank // job.ranks, rank % job.ranks
        self._node, self._clock, self._mail = node, clock, mail
        self.conductor = conductor
        self._first = self.pipeline * job.ranks
        self._peers = [p * job.ranks + self.place for p in range(job.pipelines) if p != self.pipeline]
        self._steps = job.order[self.place]
        self._waits, self._sends = job.travels(self.place)
        self._kernels = {step: job.kernels(step) for step in self._steps}
        self._context = Context(rank, node=node, name="pipeline-rank")

    def run_step(self, number: int) -> Step:
        """One iteration of the schedule and its gradient sync."""
        conductor, round_ = self.conductor, str(number)
        begin_ns, begin_mj, busy_s = self._clock.now_ns(), self._node.true_energy_mj(self.rank), 0.0
        if conductor is not None:
            conductor.step_begin()
        for step in self._steps:
            key = (step.stage, str(step.kind), step.microbatch)
            for source, before in self._waits.get(step, ()):
                self._mail.take(self._first + source, (round_, str(before)), self._context.block)
            if conductor is not None:
                conductor.begin(*key)
            busy_s += self._context.run(self._kernels[step]).seconds
            if conductor is not None:
                conductor.end(*key)
            for target in self._sends.get(step, ()):
                self._mail.send(self._first + target, (round_, str(step)))
        worked_ns = self._clock.now_ns()
        self._sync(round_)
        self._context.rest()
        if conductor is not None:
            conductor.step_end()
        end_ns, end_mj = self._clock.now_ns(), self._node.true_energy_mj(self.rank)
        return Step(self.rank, number, begin_ns, worked_ns, end_ns, busy_s, begin_mj, end_mj)

    def _sync(self, round_: str) -> None:
        """Gradients are summed over the pipelines' peers, their norm over all ranks: nobody goes on before the slowest."""
        for peer in self._peers:
            self._mail.send(peer, (round_, "gradients"))
        for peer in self._peers:
            self._mail.take(peer, (round_, "gradients"), self._context.block)
        self._mail.gather((round_, "norm"), waiting=self._context.block)

    def close(self) -> None:
        """Give the GPU back."""
        if self.conductor is not None:
            self.conductor.close()
        self._context.close()
