"""One simulated engine and the daemon's governor around it, without processes: pages go one way, clocks the other, every second.

House rules: batching, metrics and page are the simulator's, what reads and decides is the daemon's; time is counted, not waited.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from powerd.engineload import LoadWindow
from powerd.enginepage import parse
from powerd.governor import Governor
from powerd.policytable import instance_policy, promise
from powerd.replicatypes import SloSpec
from powerd.sim import enginemodels
from powerd.sim.engine.batch import Batch, Request
from powerd.sim.engine.metrics import Metrics
from powerd_policies.dynamollm.engine_model import EngineModel

MODEL = enginemodels.load()
TP = 4
CHUNK = 512
CLOCKS = tuple(range(210, 1981, 15))
#: (weight, prompt, output): as conversations are.
LENGTHS = (
    (6, 150, 220), (14, 300, 240), (12, 450, 230), (7, 800, 230), (22, 1300, 190), (17, 1800, 190), (9, 2600, 200),
    (5, 4200, 200),
)  # fmt: skip


def arrivals(
    rate: Callable[[float], float], seconds: float, seed: int, lengths: Sequence[tuple[int, int, int]] = LENGTHS
) -> list[Request]:
    """Poisson arrivals of ``rate(now)``, at most 8 a second."""
    rng, at_s, made = random.Random(seed), 0.0, list[Request]()
    while (at_s := at_s + rng.expovariate(8.0)) < seconds:
        if rng.random() < rate(at_s) / 8.0:
            _, prompt, output = rng.choices(lengths, [weight for weight, _, _ in lengths])[0]
            made.append(Request(len(made), prompt, output, at_s))
    return made


@dataclass
class Outcome:
    """What became of the requests, and what it took."""

    joules: float = 0.0
    clocks_mhz: list[int] = field(default_factory=list)
    ended: list[Request] = field(default_factory=list)

    def late(self, over: int, upto: int, ttft_s: float) -> float:
        """The share of prompts of more than ``over`` and at most ``upto`` tokens whose first token came after ``ttft_s``."""
        return late(self.ended, over, upto, ttft_s)


def late(ended: Sequence[Request], over: int, upto: int, ttft_s: float) -> float:
    """As ``Outcome.late``, of these requests."""
    waits = [r.first_s - r.arrived_s for r in ended if over < r.prompt_tokens <= upto and r.first_s is not None]
    return sum(wait_s > ttft_s for wait_s in waits) / len(waits)


def serve(requests: Sequence[Request], slo: SloSpec | int, *, lengths_told: bool = True, model: EngineModel = MODEL) -> Outcome:
    """Serve requests under an SLO, or at a clock in MHz; ``lengths_told``: whether the page has the lengths of prompts."""
    batch, metrics, outcome = Batch(model.kv_tokens[TP], CHUNK), Metrics("test", 16384, model.kv_tokens[TP]), Outcome()
    clock_mhz = slo if isinstance(slo, int) else model.max_clock_mhz
    now_s, look_s, coming = 0.0, 1.0, list(reversed(requests))
    if isinstance(slo, SloSpec):
        promised = promise(slo.ttft_s, slo.tbt_s)
        policy = instance_policy("llama2-70b_h100", "", TP, promised, CLOCKS, 10.0, 1.0, CHUNK, slo.classes)
        governor = Governor(policy, slo, CLOCKS, now_s=0.0, stale_s=4.0, good_scrapes=3, park_after_s=10.0)
        window = LoadWindow(slo, 15.0)

    def look(at_s: float) -> int:
        text = metrics.text(batch)
        page = parse(text if lengths_told else text.replace("vllm:request_prompt_tokens", "vllm:unknown"))
        found = governor.good(at_s, window.add(round(at_s * 1e9), page)).clock_mhz or model.max_clock_mhz
        outcome.clocks_mhz.append(found)
        return max(clock for clock in model.clocks_mhz(TP) if clock <= found)

    while coming or batch.running or batch.waiting:
        while coming and coming[-1].arrived_s <= now_s:
            batch.add(coming.pop())
        at = model.table[TP, clock_mhz]
        if (iteration := batch.next(now_s)) is None:
            end_s = min(coming[-1].arrived_s, look_s)
            outcome.joules += TP * at.idle_w * (end_s - now_s)
        else:
            decoding = len(iteration.decodes)
            end_s = now_s + at.iteration_s(iteration.prompt_tokens, decoding)
            outcome.joules += TP * at.iteration_j(iteration.prompt_tokens, decoding)
        while look_s <= end_s:
            if isinstance(slo, SloSpec):
                clock_mhz = look(look_s)
            look_s += 1.0
        now_s = end_s
        if iteration is not None:
            gaps_s = [now_s - request.last_s for request in iteration.decodes if request.last_s is not None]
            served = batch.finish(iteration, now_s)
            metrics.iteration(gaps_s, [request for request in served if request.first_s == now_s])
            for request in served:
                if request.generated >= request.output_tokens:
                    metrics.ended(request, "stop")
                    outcome.ended.append(request)
    return outcome
