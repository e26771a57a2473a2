"""A fleet whose prompts are computed and whose answers are written on separate instances, each side at clocks of its own.

House rules: each side is an ordinary ``Fleet`` that sees its own instances, its own half of the engine model and its own half of
the promises (``phases``), so that counts, parallelism, gates, ladders and clocks are decided by the same code as of mixed fleets;
GPUs are divided between the sides once, by what they are known to need; the same object in simulation and in production.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from powerd_policies.dynamollm.capacity import Capacity, Demand, Lengths, Service, assumed, total_of
from powerd_policies.dynamollm.classes import Classes
from powerd_policies.dynamollm.controller import Fleet, Predictor
from powerd_policies.dynamollm.engine_model import EngineModel
from powerd_policies.dynamollm.fleet import FleetEvent, FleetPlan, FleetState, Role
from powerd_policies.dynamollm.knobs import Knobs
from powerd_policies.dynamollm.overheads import Overheads
from powerd_policies.dynamollm.phases import UNCHUNKED, Links, promised, second_late, seen_by
from powerd_policies.dynamollm.predictor import Rate

NAME: Final = "splitphases"
KNOBS: Final = Knobs(instances=True, shards=True, clocks=True, ladder=True)
MARGIN: Final = 0.85  # of the TTFT is planned with: nothing but prompts is in these queues (fixed on another jitter of the hour)


class SplitPhases:
    """Two fleets in one pool: instances that prefill are bound by the TTFT alone, those that decode by the TBT alone.

    ``predictor`` makes a forecaster for each side. Raises ValueError for a watt budget, which it does not know how to divide, for
    several pools, and where a side gets no GPU.
    """

    def __init__(
        self,
        model: EngineModel,
        classes: Classes,
        gpus: int,
        predictor: Callable[[], Predictor],
        *,
        lengths: Mapping[str, Lengths] | None = None,
        chunk_tokens: int = 512,
        overheads: Overheads | None = None,
        links: Links | None = None,
        knobs: Knobs = KNOBS,
    ) -> None:
        if knobs.budget_w is not None or len(knobs.partitions) > 1 or knobs.partitions[0] != "one":
            raise ValueError(f"{NAME}: one pool and no watt budget")
        self.name, self.period_s = NAME, knobs.period_s
        classes = classes if knobs.pace is None else knobs.pace.apply(classes)
        known = {**assumed(classes), **(lengths or {})}
        capacities: dict[Role, Capacity] = {
            "prefill": PromptCapacity(
                seen_by(model, "prefill"), promised(classes, "prefill"), known, chunk_tokens, knobs.share_late,
                margin=MARGIN,
            ),
            "decode": AnswerCapacity(
                seen_by(model, "decode"), promised(classes, "decode"), known, UNCHUNKED, knobs.share_late,
                tbt_margin=knobs.tbt_margin, uneven=0.0, links=links or Links(),
            ),
        }  # fmt: skip
        divided = division(capacities, known if lengths is None else lengths, gpus)
        self.sides: dict[Role, Fleet] = {
            role: Fleet(role, knobs, capacity, divided[role], overheads or Overheads(), predictor())
            for role, capacity in capacities.items()
        }

    def decide(self, state: FleetState) -> FleetPlan:
        """Return the whole desired fleet."""
        plans = {role: side.decide(self._seen(state, role)) for role, side in self.sides.items()}
        prompts = plans["prefill"]
        return FleetPlan(
            tuple(replace(want, role=role) for role, plan in plans.items() for want in plan.instances),
            prompts.routes,
            tuple(_of_side(event, role) for role, plan in plans.items() for event in plan.events),
            reordered=prompts.reordered,
            resteered=prompts.resteered,
            shed=prompts.shed,
        )

    def _seen(self, state: FleetState, role: Role) -> FleetState:
        """Return what one side sees: its instances and GPUs, and all arrivals."""
        first = min(self.sides["prefill"].gpus, state.gpus)
        gpus = first if role == "prefill" else state.gpus - first
        return replace(state, instances=tuple(i for i in state.instances if i.role == role), gpus=gpus, power_w=None)


class PromptCapacity(Capacity):
    """What instances hold that compute prompts and nothing else."""

    def serve(self, tp: int, clock_mhz: int, n: int, demand: Demand) -> Service:
        """As of a mixed fleet, without answers; an iteration's fixed time draws power too, which there is decode's."""
        prompts = {name: Rate(rate.requests_per_s, rate.prompt_tokens_per_s, 0.0) for name, rate in demand.items()}
        found = super().serve(tp, clock_mhz, n, prompts)
        total = total_of(prompts)
        if n <= 0 or total.requests_per_s <= 0:
            return found
        at = self.model.table[tp, clock_mhz]
        iterations = max(total.requests_per_s, total.prompt_tokens_per_s / self.chunk_tokens) / n
        fixed = min(iterations * at.prefill_fixed_s, max(0.0, 1.0 - total.prompt_tokens_per_s / n * at.prefill_token_s))
        return replace(found, power_w=found.power_w + n * tp * fixed * (at.prefill_w - at.idle_w))


@dataclass(frozen=True)
class AnswerCapacity(Capacity):
    """What instances hold that write answers and nothing else; ``links`` bring the KV caches."""

    links: Links = field(default_factory=Links)

    def serve(self, tp: int, clock_mhz: int, n: int, demand: Demand) -> Service:
        """As of a mixed fleet without prompts; who gets the second token too late counts as who gets the first too late there."""
        found = super().serve(tp, clock_mhz, n, demand)
        total = total_of(demand)
        if not found.feasible or total.requests_per_s <= 0:
            return found
        at = self.model.table[tp, clock_mhz]
        usual_s = at.decode_fixed_s + at.decode_request_s * max(1.0, found.batch)  # whom it hits is chance, so the mean decides
        lacks, late = "", found.late
        for name, rate in demand.items():
            known, tbt_s = self.lengths[name], self.classes.slos[name].tbt_s
            missed = sum(
                weight * second_late(tbt_s, known.output_tokens, self.links.move_s(tokens), usual_s)
                for weight, tokens in known.prompts
            )
            if missed > self.class_late and rate.requests_per_s > 0:
                lacks = lacks or f"TBT of {name}: the second token is late for {100 * missed:.1f} %"
            late += missed * rate.requests_per_s / total.requests_per_s
        if late > self.share_late and not lacks:
            lacks = f"TBT of all classes: the second token is late for {100 * late:.1f} %"
        return replace(found, feasible=not lacks, lacks=lacks, late=late)


def division(capacities: Mapping[Role, Capacity], lengths: Mapping[str, Lengths], gpus: int) -> dict[Role, int]:
    """Return the GPUs of each side with which the two hold most of the usual mix at the highest clocks.

    In whole instances of the largest parallelism; ValueError when there are not enough for one of each.
    """
    unit = max(capacities["prefill"].model.tps)
    if gpus < 2 * unit:
        raise ValueError(f"{NAME} needs at least {2 * unit} GPUs, an instance of TP{unit} for each phase; there are {gpus}")

    usual = {
        name: Rate(known.share, known.share * known.prompt_tokens, known.share * known.output_tokens)
        for name, known in lengths.items()
    }

    def holds(role: Role, given: int) -> float:
        capacity, model = capacities[role], capacities[role].model
        return max(capacity.holds(tp, model.clocks_mhz(tp)[0], given // tp, usual) for tp in model.tps)

    first = max(range(unit, gpus - unit + 1, unit), key=lambda given: min(holds("prefill", given), holds("decode", gpus - given)))
    return {"prefill": first, "decode": gpus - first}


def _of_side(event: FleetEvent, role: Role) -> FleetEvent:
    return replace(event, subject=f"fleet ({role})") if event.subject == "fleet" else event
