"""Every instance's clock, every 5 s: what its pool needs together, what it needs itself, what a watt budget leaves.

House rules: the pool's clock holds the recent load; an instance may only go above it; a budget caps both, and says so when it
begins, ends and when it cannot be kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from powerd_policies.dynamollm.budget import Draw, WattBudget
from powerd_policies.dynamollm.capacity import Capacity, Demand, scaled, total_of
from powerd_policies.dynamollm.classes import Slo
from powerd_policies.dynamollm.cluster import Pools
from powerd_policies.dynamollm.fleet import FleetEvent, FleetState, InstanceState, InstanceWant
from powerd_policies.dynamollm.instance import InstanceController
from powerd_policies.dynamollm.knobs import Knobs
from powerd_policies.dynamollm.pool import PoolController
from powerd_policies.dynamollm.recent import Recent
from powerd_policies.dynamollm.reconcile import Member


class Clocks:
    """The instance controllers of a fleet and the clocks that their pools share."""

    def __init__(self, knobs: Knobs, capacity: Capacity, pool: PoolController, recent: Recent) -> None:
        self.knobs, self.capacity, self.pool, self.recent = knobs, capacity, pool, recent
        self.budget = WattBudget(capacity.model, knobs.budget_w, knobs.budget_strict) if knobs.budget_w is not None else None
        self.pools: Pools | None = None
        self._promised: dict[str, Slo] = {}
        self._peers: Counter[str] = Counter()
        self._instances: dict[str, tuple[str, InstanceController]] = {}
        self.factor = 1.0  # times the recent load is what clocks are chosen for, by what was missed
        self._modelled_w = 0.0
        self._within = (True, True)

    def decide(
        self, state: FleetState, members: Sequence[Member], pools: Pools, raised: frozenset[str], blind: bool
    ) -> tuple[tuple[InstanceWant, ...], list[FleetEvent]]:
        """Return every member with its clock; ``raised`` run at the highest, all do while ``blind``: nothing is known yet."""
        by_id = {i.id: i for i in state.instances}
        self.pools, self._promised = pools, {pool: promised(self.capacity, pools, pool) for pool in {m.pool for m in members}}
        self._peers = Counter(member.pool for member in members)
        events: list[FleetEvent] = []
        if not self.knobs.clocks:
            top = {tp: self.capacity.model.clocks_mhz(tp)[0] for tp in {member.tp for member in members}}
            wants = [InstanceWant(m.id, m.pool, m.tp, top[m.tp], reason="clocks are not scaled") for m in members]
        else:
            floors = self._floors(members, by_id)
            wants = [self._want(state.now_s, member, by_id, floors, raised, blind) for member in members]
            gone = [name for name in self._instances if name not in by_id]
            for name in gone:
                del self._instances[name]
        return tuple(wants if self.budget is None else self._within_budget(state, self.budget, wants, by_id, events)), events

    def _floors(self, members: Sequence[Member], by_id: Mapping[str, InstanceState]) -> dict[tuple[str, int], int]:
        """Return the clock that each pool's instances of one parallelism need together for what arrived lately."""
        assert self.pools is not None
        demands = self.pools.demands(scaled(self.recent.rates(self.knobs.fast_s), self.factor * self.knobs.clock_margin))
        serving: dict[str, Counter[int]] = {}
        for member in members:
            if member.id is not None and by_id[member.id].phase == "serving":
                serving.setdefault(member.pool, Counter())[member.tp] += 1
        floors: dict[tuple[str, int], int] = {}
        for pool, have in serving.items():
            demand = demands.get(pool, {})
            for tp, count, part in parts_of(have, demand):
                quiet = total_of(demand).requests_per_s <= 0
                clocks = self.pool.clocks.get(tp) or self.capacity.model.clocks_mhz(tp)
                floors[pool, tp] = clocks[-1] if quiet else self.pool.clock_mhz(tp, count, part)
        return floors

    def _want(
        self,
        now_s: float,
        member: Member,
        by_id: Mapping[str, InstanceState],
        floors: Mapping[tuple[str, int], int],
        raised: frozenset[str],
        blind: bool,
    ) -> InstanceWant:
        floor = floors.get((member.pool, member.tp))
        top = self.capacity.model.clocks_mhz(member.tp)[0]
        if member.id is None or by_id[member.id].phase != "serving":
            return InstanceWant(member.id, member.pool, member.tp, floor or top, reason="starts")
        if blind:
            return InstanceWant(member.id, member.pool, member.tp, top, reason="nothing is known yet")
        pool, controller = self._instances.get(member.id, ("", None))
        if controller is None or pool != member.pool:
            controller = self._controller(member)
            self._instances[member.id] = (member.pool, controller)
        controller.floor_mhz = top if member.id in raised else floor
        decision = controller.clock(now_s, by_id[member.id].load)
        return InstanceWant(member.id, member.pool, member.tp, decision.clock_mhz, reason=decision.reason)

    def _controller(self, member: Member) -> InstanceController:
        return InstanceController(
            self.capacity.model,
            member.tp,
            self._promised[member.pool],
            chunk_tokens=self.capacity.chunk_tokens,
            peers=self._peers[member.pool],
            dwell_s=self.knobs.dwell_s,
            period_s=self.knobs.period_s,
            backs_off=self.knobs.backs_off,
        )

    def _within_budget(
        self,
        state: FleetState,
        budget: WattBudget,
        wants: list[InstanceWant],
        by_id: Mapping[str, InstanceState],
        events: list[FleetEvent],
    ) -> list[InstanceWant]:
        """Lower clocks until the modelled watts, corrected by the measured ones, are within the budget."""
        budget.learn(state.power_w, self._modelled_w)
        draws, kept = [], {want.id for want in wants}
        for i in state.instances:  # those that drain draw as well, and nobody sets their clocks any more
            if i.id not in kept:
                draws.append(Draw(i.tp, 1, i.clock_mhz, i.load.prompt_tokens_per_s or 0.0, i.load.output_tokens_per_s or 0.0))
        leaving_w = budget.power_w(draws)
        draws = []
        for want in wants:
            load = by_id[want.id].load if want.id is not None and want.id in by_id else None
            prompt = (load.prompt_tokens_per_s if load else None) or 0.0
            output = (load.output_tokens_per_s if load else None) or 0.0
            draws.append(Draw(want.tp, 1, want.clock_mhz, prompt, output))
        ceiling = budget.ceiling(draws, leaving_w)
        self._modelled_w = leaving_w + budget.power_w(draws, ceiling.clock_mhz)
        free = ceiling.clock_mhz is None
        if (free, ceiling.kept) != self._within:
            self._within = (free, ceiling.kept)
            said = "within the watt budget" if free else f"no clock above {ceiling.clock_mhz} MHz for the watt budget"
            lacks = "" if ceiling.kept else f"; {ceiling.power_w:.0f} W are drawn all the same"
            events.append(FleetEvent(state.now_s, "budget", "fleet", said + lacks))
        if ceiling.clock_mhz is None:
            return wants
        capped = []
        for want in wants:
            if want.clock_mhz > ceiling.clock_mhz:
                clocks = self.capacity.model.clocks_mhz(want.tp)
                clock = next((each for each in clocks if each <= ceiling.clock_mhz), clocks[-1])
                capped.append(replace(want, clock_mhz=clock, reason="the watt budget"))
            else:
                capped.append(want)
        return capped


def parts_of(have: Mapping[int, int], demand: Demand) -> list[tuple[int, int, Demand]]:
    """Return (parallelism, count, its part of the demand) for a pool's kinds of instances, by their GPUs."""
    gpus = sum(tp * count for tp, count in have.items())
    if len(have) == 1:
        ((tp, count),) = have.items()
        return [(tp, count, demand)]
    return [(tp, count, scaled(demand, tp * count / gpus)) for tp, count in have.items()]


def promised(capacity: Capacity, pools: Pools, pool: str) -> Slo:
    """Return a pool's SLO: the TTFT of its longest prompts (the pool's clock cares for shorter ones), the least TBT."""
    names = pools.partition.get(pool) or tuple(capacity.classes.slos)
    slos = [capacity.classes.slos[name] for name in names]
    return Slo(max(slo.ttft_s for slo in slos), min(slo.tbt_s for slo in slos))
