"""The controller of a fleet: cluster, pool and instance controllers together; the same object in simulation and production.

House rules: a decision is a function of what was observed until now; the plan is the whole desired fleet; whatever is changed, or
was to be changed and is not, is an event; the fleet grows at once and shrinks only when an epoch ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from powerd_policies.dynamollm.capacity import Capacity, Demand, Lengths, scaled, total_of
from powerd_policies.dynamollm.caution import Caution
from powerd_policies.dynamollm.classes import Slo
from powerd_policies.dynamollm.clocks import Clocks, parts_of, promised
from powerd_policies.dynamollm.cluster import ClusterController, Pools, needs
from powerd_policies.dynamollm.emergency import Emergencies, Measures, Patience, slack_of
from powerd_policies.dynamollm.fleet import ClassLoad, FleetEvent, FleetPlan, FleetState, InstanceState
from powerd_policies.dynamollm.fragments import PARTITIONS, routes
from powerd_policies.dynamollm.gate import Gate, reshard_j
from powerd_policies.dynamollm.knobs import Knobs
from powerd_policies.dynamollm.optimizer import Weights
from powerd_policies.dynamollm.overheads import Overheads
from powerd_policies.dynamollm.pool import Layout, Need, PoolController, Shape
from powerd_policies.dynamollm.predictor import Rate
from powerd_policies.dynamollm.recent import Recent
from powerd_policies.dynamollm.reconcile import reconcile

EARLY_S = 15.0  # between two decisions ahead of time
SURE = 1e-9
#: A fleet that no parallelism makes large enough is re-sharded only for one that holds so many times more: while four instances
#: at a time change hands, a third of twelve is missing when it is needed most. Epochs come every five minutes, not at a peak.
TURN_EARLY, TURN_DUE = 1.5, 1.2
SHORT = 0.95  # a plan that holds less of the load is short; one that holds as much is within its own margins


class Predictor(Protocol):
    """What the controllers ask of a forecast (predictor.LoadPredictor)."""

    def observe(self, now_s: float, window_s: float, arrivals: Mapping[str, ClassLoad]) -> None: ...

    def peak(self, from_s: float, to_s: float) -> Mapping[str, Rate]: ...


class Fleet:
    """The cluster, pool and instance controllers together; what is switched on is ``knobs``."""

    def __init__(
        self, name: str, knobs: Knobs, capacity: Capacity, gpus: int, overheads: Overheads, predictor: Predictor
    ) -> None:
        self.name, self.knobs, self.capacity, self.gpus = name, knobs, capacity, gpus
        self.period_s = 60.0 if knobs.fixed else knobs.period_s
        self.predictor = predictor
        self.overheads = overheads
        self.lead_s = overheads.start_s()  # however an instance is started, it is of use only then
        self.pool = PoolController(capacity, knobs, gpus, overheads.start_s())
        self.cluster = ClusterController(self.pool, knobs, gpus)
        self.gate = Gate(horizon_s=knobs.horizon_s, every_s=knobs.pool_s)
        self.recent = Recent(max(120.0, knobs.surge_s))
        self.clocks = Clocks(knobs, capacity, self.pool, self.recent)
        self.emergencies = Emergencies(Patience.of(knobs.period_s))
        self.caution = Caution()
        self.pools = self._reference()
        self.shapes: dict[str, tuple[Shape, ...]] = {}
        self._cluster_s = self._pool_s = -float("inf")  # when these decided last
        self._planned = False
        self._helped = True  # the last decision changed something
        self._cold: bool | None = None  # there is no history; None: not asked yet
        self._lacks = ""
        self._held = 1.0  # of the load, by the plan

    def decide(self, state: FleetState) -> FleetPlan:
        """Return the whole desired fleet."""
        events: list[FleetEvent] = []
        if self._cold is None:  # before the first window is in: a few seconds of load are no history
            self._cold = total_of(self._forecast(state.now_s)).requests_per_s <= 0
        if state.window_s > 0:
            self.predictor.observe(state.now_s, state.window_s, state.arrivals)
            self.recent.add(state.now_s, state.window_s, state.arrivals)
        measures = self._ladders(state, events)
        if self.knobs.backs_off:
            self.caution.see(state.window_s, state.instances, self._promises(state))
            self.clocks.factor = self.caution.factor
        self._plan(state, measures, events)
        members = reconcile(state.instances, self.shapes, state.gpus, self.knobs.pairs)
        blind = not self._planned and self.recent.covered_s < self.knobs.fast_s
        short = self.knobs.backs_off and self._held < SHORT  # nothing else is left that could be given
        wants, more = self.clocks.decide(state, members, self.pools, measures.max_clock, blind or short)
        events += more
        alive = Counter(member.pool for member in members)
        return FleetPlan(
            wants,
            routes(self.pools.partition, alive),
            tuple(events),
            reordered=frozenset(i.id for i in state.instances) if short else measures.reordered,
            resteered=measures.resteered,
            shed=measures.shed,
        )

    def _reference(self) -> Pools:
        """The pools before anything is known: as for a load that needs every GPU."""
        name = self.knobs.partitions[0]
        partition = PARTITIONS[name]
        if len(partition) == 1:
            return Pools(name, partition, {pool: {pool: 1.0} for pool in partition})
        return self.cluster.standing(name)

    def _plan(self, state: FleetState, measures: Measures, events: list[FleetEvent]) -> None:
        """Decide shapes anew when an epoch ends, and ahead of time when load outgrows them."""
        now_s, knobs = state.now_s, self.knobs
        if not self.shapes:
            self.shapes = self._everything()
        if not (knobs.instances or knobs.shards):
            return
        forecast = self._forecast(now_s)
        known = total_of(forecast).requests_per_s > 0
        if not known or (self._cold and self.recent.covered_s < knobs.warmup_s):
            return
        late = bool(measures.reshard)
        young = bool(self._cold) and self.recent.covered_s < knobs.pool_s
        every_s = knobs.young_s if young else max(knobs.pool_s, self.lead_s)
        due = now_s >= self._pool_s + every_s - SURE or not self._planned
        if not due and (
            now_s < self._pool_s + (EARLY_S if self._helped else knobs.young_s) or not (late or self._outgrown(state))
        ):
            return
        surge = self._surge(young)
        peak = {name: _larger(rate, surge.get(name, Rate())) for name, rate in forecast.items()}
        peak = scaled(peak, self.caution.factor)
        if not due:
            events.append(FleetEvent(now_s, "misprediction", "fleet", self._says(surge)))
        mean = self.recent.rates(120.0) or scaled(peak, 0.75)
        epoch = due and (now_s >= self._cluster_s + knobs.cluster_s - SURE or not self._planned)
        if epoch or (knobs.instances and self.pools.gpus is not None and not due):
            self._repool(now_s, mean, events)
        before = self.shapes
        self._reshape(state, peak, mean, due, events)
        self._pool_s, self._planned, self._helped = now_s, True, due or before != self.shapes
        events.extend(self.emergencies.resharded(now_s, measures.reshard))

    def _forecast(self, now_s: float) -> Demand:
        return self.predictor.peak(now_s, now_s + self.lead_s + self.knobs.ahead_s)

    def _surge(self, young: bool) -> Demand:
        """Return what is to be held at least: the recent load, its rise once more, and much more while little was seen."""
        knobs = self.knobs
        now, before = self.recent.rates(knobs.surge_s), self.recent.rates(3 * knobs.surge_s)
        last, mean = total_of(now).prompt_tokens_per_s, total_of(before).prompt_tokens_per_s
        rise = 1.0 + knobs.trend * max(0.0, last / mean - 1.0) if mean > 0 else 1.0
        wary = 1.0 + knobs.young_s / self.recent.covered_s if young else 1.0
        return scaled(now, knobs.surge_margin * rise * wary)

    def _repool(self, now_s: float, mean: Demand, events: list[FleetEvent]) -> None:
        """The cluster controller's part, for the peak until its next decision takes effect."""
        peak = self.predictor.peak(now_s, now_s + self.lead_s + self.knobs.cluster_s)
        before = self.pools.name
        self.pools = self.cluster.plan(peak, mean, self.pools if self._planned else None)
        self._cluster_s = now_s
        if self._planned and self.pools.name != before:
            events.append(FleetEvent(now_s, "merge", "fleet", f"pools by {before} become pools by {self.pools.name}"))

    def _reshape(self, state: FleetState, peak: Demand, mean: Demand, due: bool, events: list[FleetEvent]) -> None:
        """The pool controllers' part: counts and parallelism, through the gate."""
        now_s, knobs = state.now_s, self.knobs
        have = self._have()
        own = needs(self.pools, peak, mean, have)
        weights = self._weights(state)
        if due or not knobs.shards:
            layout = self.pool.plan(own, weights=weights)
        else:
            layout = self._staying(own, have, weights)
            layout = self.pool.plan(own, weights=weights) if layout.lacks else layout
        if (due or knobs.backs_off) and self._planned and _turned(have, layout):
            stays = self._staying(own, have, weights)
            if not stays.lacks:
                layout = self._gated(now_s, have, stays, layout, events)
            elif knobs.backs_off and layout.share < (TURN_DUE if due else TURN_EARLY) * stays.share:
                layout = stays
        self._held = layout.share
        if layout.lacks != self._lacks:
            self._lacks = layout.lacks
            if layout.lacks:
                done = "; highest clocks, queues by deadline" if knobs.backs_off and layout.share < SHORT else ""
                events.append(FleetEvent(now_s, "infeasible", "fleet", layout.lacks + done))
            elif knobs.backs_off:
                events.append(FleetEvent(now_s, "infeasible", "fleet", "the load fits again"))
        shapes = dict(layout.shapes)
        if not due:
            shapes = {pool: _grown(self.shapes.get(pool, ()), new) for pool, new in shapes.items()}
            if sum(s.tp * s.count for own_shapes in shapes.values() for s in own_shapes) > self.gpus:
                shapes = dict(layout.shapes)
        for pool in shapes:
            before, after = _text(self.shapes.get(pool, ())), _text(shapes[pool])
            if before != after:
                events.append(FleetEvent(now_s, "scale", pool, f"{before} -> {after}"))
        self.shapes = shapes

    def _staying(self, own: list[Need], have: Mapping[str, Mapping[int, int]], weights: Weights) -> Layout:
        """The best layout with the parallelism that each pool has."""
        tps = {pool: tuple(sorted(counts)) or self.pool.tps for pool, counts in have.items()}
        return self.pool.plan(own, tps=tps, weights=weights)

    def _gated(
        self, now_s: float, have: Mapping[str, Mapping[int, int]], stays: Layout, new: Layout, events: list[FleetEvent]
    ) -> Layout:
        """Return ``new`` where its change of parallelism pays, else ``stays``."""
        table, top = self.capacity.model.table, self.pool.top
        gpu_w = max(table[tp, top[tp]].decode_w for tp in top)
        costs_j = reshard_j(have, new.shapes, self.gpus, self.overheads, self.capacity.model.weights_bytes, gpu_w)
        saves_w = stays.power_w - new.power_w
        if saves_w < self.knobs.merge_gain * stays.power_w:  # within what the model may err
            return stays
        verdict = self.gate.ask(now_s, "fleet", saves_w, costs_j)
        if not verdict.act:
            events.append(FleetEvent(now_s, "gate", "fleet", f"no re-shard: {verdict.why}"))
            return stays
        self.gate.did(now_s, "fleet")
        events.append(FleetEvent(now_s, "reshard", "fleet", verdict.why))
        return new

    def _have(self) -> dict[str, dict[int, int]]:
        return {
            pool: {shape.tp: shape.count for shape in self.shapes.get(pool, ()) if shape.count} for pool in self.pools.partition
        }

    def _everything(self) -> dict[str, tuple[Shape, ...]]:
        """All GPUs at the reference parallelism: the state of practice, and the begin where there is no forecast."""
        knobs = self.knobs
        tp = knobs.tp
        if knobs.instances and knobs.shards and knobs.joint:  # whichever holds most: nobody knows what will come
            usual = {name: Rate(k.share, k.share * k.prompt_tokens, k.share * k.output_tokens) for name, k in self._usual()}
            tp = max(self.pool.tps, key=lambda tp: self.capacity.holds(tp, self.pool.top[tp], self.gpus // tp, usual))
        top = self.capacity.model.clocks_mhz(tp)[0]
        if self.pools.gpus is None:
            count = self.gpus // tp
            if knobs.budget_w is not None:
                lowest = self.capacity.model.table[tp, self.capacity.model.clocks_mhz(tp)[-1]]
                count = max(1, min(count, int(knobs.budget_w / (tp * lowest.decoding_w(64)))))
            return {pool: (Shape(tp, top, count),) for pool in list(self.pools.partition)[:1]}
        return {pool: (Shape(tp, top, gpus // tp),) if gpus else () for pool, gpus in self.pools.gpus.items()}

    def _usual(self) -> list[tuple[str, Lengths]]:
        return [(name, known) for name, known in self.capacity.lengths.items() if known.share > 0]

    def _outgrown(self, state: FleetState) -> bool:
        """Whether what arrived lately is more than the planned fleet holds at its highest clocks."""
        if not self.knobs.instances:
            return False
        demands = self.pools.demands(scaled(self.recent.rates(self.knobs.surge_s), self.caution.factor * self.knobs.outgrown))
        for pool, demand in demands.items():
            if total_of(demand).requests_per_s <= 0:
                continue
            for tp, count, part in parts_of(self._have().get(pool, {}), demand):
                if not self.capacity.serve(tp, self.pool.top[tp], count, part).feasible:
                    return True
        return False

    def _says(self, surge: Demand) -> str:
        total = total_of(surge)
        rates = f"{total.requests_per_s:.1f} requests/s with {total.prompt_tokens_per_s:.0f} prompt tokens/s"
        return f"{rates} are more than was planned"

    def _weights(self, state: FleetState) -> Weights:
        """GPUs that are off also save their price, in watts of energy at what it costs now."""
        price = state.price_per_kwh or 0.0
        if self.knobs.usd_per_kg_carbon is not None and state.carbon_g_per_kwh is not None:
            price += self.knobs.usd_per_kg_carbon * state.carbon_g_per_kwh / 1000.0
        if self.knobs.usd_per_gpu_hour is None or price <= 0:
            return self.knobs.weights
        return replace(self.knobs.weights, gpu=self.knobs.weights.energy * 1000.0 * self.knobs.usd_per_gpu_hour / price)

    def _promises(self, state: FleetState) -> dict[str, Slo]:
        """Return the SLO of each pool that has instances."""
        return {pool: promised(self.capacity, self.pools, pool) for pool in {i.pool for i in state.instances}}

    def _ladders(self, state: FleetState, events: list[FleetEvent]) -> Measures:
        if not self.knobs.ladder:
            return Measures()
        slacks, slos = {}, self._promises(state)
        for i in state.instances:
            if i.phase == "serving" and (clock_mhz := self._known_clock_mhz(i)) is not None:
                slo = slos[i.pool]
                slacks[i.id] = (slack_of(i.load, self.capacity.model.table[i.tp, clock_mhz], slo), slo.ttft_s)
        measures = self.emergencies.update(state.now_s, slacks)
        events.extend(measures.events)
        return measures

    def _known_clock_mhz(self, instance: InstanceState) -> int | None:
        """The clock with figures that an instance runs at, or the next one below; an unknown clock (0) is a full one."""
        if (instance.tp, instance.clock_mhz) in self.capacity.model.table:
            return instance.clock_mhz
        if not (clocks := self.capacity.model.clocks_mhz(instance.tp)):
            return None
        return next((clock for clock in clocks if 0 < clock <= instance.clock_mhz), clocks[-1 if instance.clock_mhz else 0])


def _larger(one: Rate, other: Rate) -> Rate:
    return Rate(
        max(one.requests_per_s, other.requests_per_s),
        max(one.prompt_tokens_per_s, other.prompt_tokens_per_s),
        max(one.output_tokens_per_s, other.output_tokens_per_s),
    )


def _grown(old: tuple[Shape, ...], new: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """Return ``new`` with no kind of instance fewer than in ``old``."""
    counts = {shape.tp: shape for shape in old}
    for shape in new:
        before = counts.get(shape.tp)
        counts[shape.tp] = replace(shape, count=max(shape.count, before.count if before else 0))
    return tuple(counts[tp] for tp in sorted(counts))


def _text(shapes: tuple[Shape, ...]) -> str:
    return " + ".join(f"{shape.count} x TP{shape.tp}" for shape in shapes if shape.count) or "nothing"


def _turned(have: Mapping[str, Mapping[int, int]], layout: Layout) -> bool:
    """Whether a layout has parallelisms in a pool that it does not have now."""
    return any(shape.tp not in have.get(pool, {}) for pool, shapes in layout.shapes.items() for shape in shapes)
