"""Energy spans against the truth of the stepped simulated driver: a pipeline stage's instructions with bubbles between them.

House rules: the spans see readings only, the truth scores them; powerd's own sampling path reads NVML; seeded and exact.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks import load
from benchmarks.energy import NodeClock, Poller, Scored, polled_node
from powerd.api import LabelEnergy, Span, SpansRequest, SpansView
from powerd.clock import NS
from powerd.sim.node import SimNode
from powerd.sim.workload import BLOCKED, LOAD, Context
from powerd.trace import EnergySpans

#: Label -> kernels one after another, with the share of the GPU that each keeps busy.
MIXES: dict[str, tuple[tuple[str, float], ...]] = {
    "forward": (("gemm", 0.9), ("mixed", 0.6)),
    "backward": (("gemm", 1.0),),
    "weight": (("prefill", 0.7), ("decode", 0.8)),
}


@dataclass(frozen=True, slots=True)
class Setup:
    """One campaign: ``windows`` requests of ``spans`` spans a label on one node."""

    model: str = "a100-sxm-500w"
    windows: int = 40
    spans: int = 24  # of each label
    shortest_s: float = 0.05
    longest_s: float = 0.9
    seed: int = 1
    gpus: int = 4
    sample_hz: float = 10.0
    jitter_s: float = 0.003
    counter: bool = True
    bubbles: bool = True


#: What is reported: title -> campaign.
SETUPS: dict[str, Setup] = {
    "A100, 24 spans of 0.5 s a label": Setup(shortest_s=0.5, longest_s=0.5, seed=2),
    "A100, 24 spans of 0.05-0.9 s a label": Setup(),
    "H100, 24 spans of 0.05-0.9 s a label": Setup(model="h100-sxm", seed=3),
    "A100, 200 spans of 0.02-0.09 s a label": Setup(shortest_s=0.02, longest_s=0.09, seed=4, spans=200, windows=12),
    "A100 without a counter, 24 spans of 0.5 s a label": Setup(counter=False, shortest_s=0.5, longest_s=0.5, seed=5),
}


@dataclass(frozen=True, slots=True)
class ScoredLabel(Scored):
    """One label of one request beside the truth."""

    figure: LabelEnergy
    samples: int


class _Stage:
    """One GPU that runs spans and remembers what each really used."""

    def __init__(self, node: SimNode, gpu: int, setup: Setup, rng: random.Random) -> None:
        self._node, self._gpu, self._setup, self._rng = node, gpu, setup, rng
        self._context = Context(gpu, node=node)
        self.spans: list[Span] = []
        self.true_j: list[float] = []
        self.bubble_j = 0.0
        # A kind of work takes about the same time whenever it runs.
        self._lengths = {label: rng.uniform(setup.shortest_s, setup.longest_s) for label in MIXES}

    def run(self) -> Iterator[int]:
        """Run all spans; yields each instant at which it wants to go on."""
        order = [label for label in MIXES for _ in range(self._setup.spans)]
        self._rng.shuffle(order)
        left_mj = None
        for label in order:
            length_ns = self._lengths[label] * self._rng.uniform(0.95, 1.05) * NS
            begin_ns, begin_mj = self._node.now_ns(), self._node.true_energy_mj(self._gpu)
            if left_mj is not None:
                self.bubble_j += (begin_mj - left_mj) / 1000
            mix = MIXES[label]
            for kernel, activity in mix:
                load.begin(self._context, LOAD, kernel, activity, round(length_ns / len(mix)))
                yield self._node.now_ns() + round(length_ns / len(mix))
            left_mj = self._node.true_energy_mj(self._gpu)
            self.spans.append(Span(label, begin_ns, self._node.now_ns()))
            self.true_j.append((left_mj - begin_mj) / 1000)
            if self._setup.bubbles and self._rng.random() < 0.6:
                pause_ns = round(self._rng.uniform(0.02, 0.4) * NS)
                load.begin(self._context, BLOCKED, "gemm", 1.0, pause_ns)
                yield self._node.now_ns() + pause_ns


def campaign(setup: Setup) -> list[ScoredLabel]:
    """Run it and score every label of every request against the truth."""
    with polled_node(setup.model, setup.gpus, setup.seed, counter=setup.counter) as (node, poller):
        return asyncio.run(_go(node, poller, setup))


async def _go(node: SimNode, poller: Poller, setup: Setup) -> list[ScoredLabel]:
    rng = random.Random(setup.seed)  # noqa: S311
    period_ns = round(NS / setup.sample_hz)
    service = EnergySpans(NodeClock(node), period_ns)
    scored: list[ScoredLabel] = []
    begin_ns, tick = node.now_ns() + round(rng.uniform(0, period_ns)), 0

    def move(until_ns: int) -> None:
        nonlocal tick
        while True:
            due_ns = begin_ns + tick * period_ns + round(rng.uniform(0, setup.jitter_s) * NS)
            if due_ns > until_ns:
                break
            if due_ns > node.now_ns():
                node.advance((due_ns - node.now_ns()) / NS)
            service.observe(poller.read())
            tick += 1
        if until_ns > node.now_ns():
            node.advance((until_ns - node.now_ns()) / NS)

    move(node.now_ns() + 2 * NS)
    while len(scored) < setup.windows * (len(MIXES) + setup.bubbles):
        stages = [_Stage(node, gpu, setup, rng) for gpu in range(setup.gpus)]
        runs = {gpu: stage.run() for gpu, stage in enumerate(stages)}
        due = {gpu: next(run) for gpu, run in runs.items()}
        while due:
            gpu = min(due, key=lambda g: due[g])
            move(due[gpu])
            try:
                due[gpu] = next(runs[gpu])
            except StopIteration:
                del due[gpu]
        move(node.now_ns() + round(rng.uniform(0.2, 0.3) * NS))  # whatever the phase of the samples
        for gpu, stage in enumerate(stages):
            view = await service.answer(SpansRequest(poller.uuids[gpu], tuple(stage.spans), wait=False))
            scored += _score(view, stage)
            stage._context.close()
    return scored


def _score(view: SpansView, stage: _Stage) -> list[ScoredLabel]:
    true_j: dict[str, float] = {"": stage.bubble_j}
    for span, joules in zip(stage.spans, stage.true_j, strict=True):
        true_j[span.label] = true_j.get(span.label, 0.0) + joules
    return [ScoredLabel(label, true_j[label.label], view.samples) for label in view.labels]


def summary(scored: list[ScoredLabel]) -> dict[str, float]:
    """The figures that are reported."""
    work = [s for s in scored if s.figure.label]
    return {
        "labels": len(scored),
        "covered_percent": 100 * sum(s.covered for s in scored) / len(scored),
        "mean_abs_error_percent": 100 * statistics.fmean(abs(s.error) for s in work),
        "mean_error_percent": 100 * statistics.fmean(s.error for s in work),
        "worst_error_percent": 100 * max(abs(s.error) for s in work),
        "median_half_width_percent": 100 * statistics.median(s.width for s in work),
        "worst_error_of_bubbles_percent": 100 * max((abs(s.error) for s in scored if not s.figure.label), default=0.0),
    }
