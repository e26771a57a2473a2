"""One rank: runs its part of the schedule on its GPU, waits for its peers at blocking power, and says how every step went.

House rules: instructions run one at a time in the order of the schedule; the gradient sync at the end of a step waits for the
slowest pipeline, and its norm for everybody, as in frameworks; truth (the simulator's energy) is only printed, for scoring.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from powerd.client import Client
from powerd.clock import Clock
from powerd.sim.node import SimNode
from powerd.sim.workload import Context
from powerd_integrations.pipeline import Conductor, Options, Place, measured
from powerd_integrations.simulated_pipeline.job import Job
from powerd_integrations.simulated_pipeline.mail import Mail
from powerd_policies.perseus import baselines, dag, document, profile
from powerd_policies.perseus.problem import Plan


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
    state: str | None  # of its conductor, when the step began
    plan: str | None
    ran_us: tuple[int, ...]  # begin, end, begin, end, ... of its instructions, microseconds from begin_ns

    def to_json(self) -> dict[str, Any]:
        """As it is printed."""
        return {"simulated": True, **asdict(self)}


class Exchange:
    """How conductors talk: through the ranks' own boxes; a GPU whose rank waits for the others is blocked."""

    def __init__(self, mail: Mail, context: Context) -> None:
        self._mail, self._context, self._round = mail, context, 0

    def gather(self, value: Any) -> Sequence[Any]:
        """Every rank's value, by rank."""
        self._round += 1
        return self._mail.gather(("exchange", str(self._round)), value, self._context.block)


class Rank:
    """One GPU of the job; ``run_step`` is what a framework's training loop calls."""

    def __init__(self, job: Job, rank: int, node: SimNode, clock: Clock, mail: Mail) -> None:
        self.rank, self.pipeline, self.place = rank, rank // job.ranks, rank % job.ranks
        self._node, self._clock, self._mail = node, clock, mail
        self._first = self.pipeline * job.ranks
        self._peers = [p * job.ranks + self.place for p in range(job.pipelines) if p != self.pipeline]
        self._steps = job.order[self.place]
        self._waits, self._sends = job.travels(self.place)
        self._kernels = {step: job.kernels(step) for step in self._steps}
        self._told: str | None = None
        self.conductor: Conductor | None = None
        self._job = job
        self._context = Context(rank, node=node, name="pipeline-rank")

    def conduct(self, options: Options) -> None:
        """From the next step on powerd conducts this job: what an adapter does for a framework when it is made."""
        job = self._job
        place = Place(self.pipeline, self.place, 0, job.pipelines, job.ranks, 1, self.rank)
        client = Client(on_error="log", timeout_s=60.0)
        self.conductor = Conductor(
            place, Exchange(self._mail, self._context), client, uuid=self._node.view(self.rank).uuid.decode(), order=job.order,
            options=options, shape=f"{job.profile} {job.rows}", now_ns=self._clock.now_ns,
        )  # fmt: skip

    def run_step(self, number: int) -> Step:
        """One iteration of the schedule and its gradient sync."""
        conductor, round_ = self.conductor, str(number)
        begin_ns, begin_mj, busy_s = self._clock.now_ns(), self._node.true_energy_mj(self.rank), 0.0
        ran_us: list[int] = []
        state: str | None = None
        plan: str | None = None
        if conductor is not None:
            conductor.step_begin()
            state, plan = str(conductor.state), None if conductor.plan is None else str(conductor.plan["id"])
        for step in self._steps:
            key = (step.stage, str(step.kind), step.microbatch)
            for source, before in self._waits.get(step, ()):
                self._mail.take(self._first + source, (round_, str(before)), self._context.block)
            if conductor is not None:
                conductor.begin(*key)
            ran_us.append((self._clock.now_ns() - begin_ns) // 1000)
            busy_s += self._context.run(self._kernels[step]).seconds
            ran_us.append((self._clock.now_ns() - begin_ns) // 1000)
            if conductor is not None:
                conductor.end(*key)
            for target in self._sends.get(step, ()):
                self._mail.send(self._first + target, (round_, str(step)))
        worked_ns = self._clock.now_ns()
        if conductor is not None:
            conductor.step_end()
        self._sync(round_)
        self._context.rest()
        end_ns, end_mj = self._clock.now_ns(), self._node.true_energy_mj(self.rank)
        return Step(self.rank, number, begin_ns, worked_ns, end_ns, busy_s, begin_mj, end_mj, state, plan, tuple(ran_us))

    def _sync(self, round_: str) -> None:
        """Gradients are summed over the pipelines' peers, their norm over all ranks: nobody goes on before the slowest."""
        for peer in self._peers:
            self._mail.send(peer, (round_, "gradients"))
        for peer in self._peers:
            self._mail.take(peer, (round_, "gradients"), self._context.block)
        self._mail.gather((round_, "norm"), waiting=self._context.block)

    def new_plan(self) -> dict[str, Any] | None:
        """What the first rank of a pipeline has to tell of the plan that it has just been given."""
        conductor = self.conductor
        if self.place or conductor is None or conductor.plan is None or conductor.plan["id"] == self._told:
            return None
        self._told, kept = conductor.plan["id"], conductor.agreement.profile
        return {
            "pipeline": self.pipeline, "planned": conductor.plan, "profile": kept.csv(),
            "blocking_power_w": kept.blocking_power_w, "document": self._document(conductor.plan, kept),
            "order": [[list(step) for step in rank] for rank in conductor.agreement.order],
        }  # fmt: skip

    def _document(self, plan: Mapping[str, Any], kept: measured.Profile) -> dict[str, Any] | None:
        """OUT.json of the plan in force, for `powerctl perseus show`; None when a stage is not as profiled."""
        import numpy as np

        job, watts = self._job, kept.blocking_power_w or 0.0
        rows = [profile.Row(row.stage, row.kind, row.mhz, row.time_s, row.energy_j) for row in kept.rows]
        problem = dag.problem(job.graph, profile.options(rows, watts), watts)
        clocks = dict(zip(itertools.chain(*job.order), itertools.chain(*plan["clocks"]), strict=True))
        options = [[option.mhz for option in table] for table in problem.tables]
        try:
            choice = [options[t].index(clocks[node]) for t, node in zip(problem.table.tolist(), job.graph.nodes, strict=True)]
        except ValueError:
            return None
        made = Plan(problem, np.array(choice), float(plan["deadline_s"]), float(plan["lower_bound_j"]))
        about = document.JobFile(
            job.schedule, job.ranks, job.microbatches, None, watts, job.pipelines, 1, job.chunks, job.recompute
        )
        return document.to_json(made, baselines.max_clock(problem), about)

    def close(self) -> None:
        """Give the GPU back."""
        if self.conductor is not None:
            self.conductor.close()
        self._context.close()
