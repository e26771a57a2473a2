"""The controller of a fleet, and every published policy as a configuration of it; the same object in simulation and production.

House rules: a decision is a function of what was observed until now; the plan is the whole desired fleet; whatever is changed, or
was to be changed and is not, is an event; the fleet grows at once and shrinks only when an epoch ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Protocol

from powerd_policies.dynamollm import predictor as forecasts
from powerd_policies.dynamollm.budget import Draw, WattBudget
from powerd_policies.dynamollm.capacity import Capacity, Demand, Lengths, assumed, scaled, total_of
from powerd_policies.dynamollm.classes import Classes, Slo
from powerd_policies.dynamollm.cluster import ClusterController, Pools, needs
from powerd_policies.dynamollm.emergency import Emergencies, Measures, slack_of
from powerd_policies.dynamollm.engine_model import EngineModel
from powerd_policies.dynamollm.fleet import (
    ClassLoad,
    FleetController,
    FleetEvent,
    FleetPlan,
    FleetState,
    InstanceState,
    InstanceWant,
)
from powerd_policies.dynamollm.fragments import PARTITIONS, routes
from powerd_policies.dynamollm.gate import Gate
from powerd_policies.dynamollm.instance import InstanceController
from powerd_policies.dynamollm.knobs import POLICIES, Knobs
from powerd_policies.dynamollm.optimizer import Weights
from powerd_policies.dynamollm.overheads import Overheads
from powerd_policies.dynamollm.pool import Layout, PoolController, Shape
from powerd_policies.dynamollm.predictor import Rate
from powerd_policies.dynamollm.recent import Recent
from powerd_policies.dynamollm.reconcile import Member, reconcile

EARLY_S = 15.0  # between two decisions ahead of time
SURE = 1e-9


class Predictor(Protocol):
    """What the controllers ask of a forecast (predictor.LoadPredictor)."""

    def observe(self, now_s: float, window_s: float, arrivals: Mapping[str, ClassLoad]) -> None: ...

    def peak(self, from_s: float, to_s: float) -> Mapping[str, Rate]: ...


def build(
    name: str,
    *,
    model: EngineModel,
    classes: Classes,
    gpus: int,
    lengths: Mapping[str, Lengths] | None = None,
    chunk_tokens: int = 512,
    overheads: Overheads | None = None,
    predictor: Predictor | None = None,
    knobs: Knobs | None = None,
) -> FleetController:
    """Return the controller of a policy by name (``knobs.POLICIES``); ``knobs`` in place of the policy's own.

    ``lengths`` is what is known beforehand of each class (``capacity.measured`` on a past trace; None: ``capacity.assumed``).
    A predictor belongs to one controller. Raises ValueError for an unknown name and for a model without the needed parallelism.
    """
    if knobs is None:
        if name not in POLICIES:
            raise ValueError(f"there is no policy {name!r}; there are {', '.join(POLICIES)}")
        knobs = POLICIES[name]
    if knobs.tp not in model.tps:
        raise ValueError(f"{name} needs tensor parallelism {knobs.tp}; the profile of {model.name} holds {model.tps}")
    known = {**assumed(classes), **(lengths or {})}
    capacity = Capacity(model, classes, known, chunk_tokens, knobs.share_late)
    return Fleet(name, knobs, capacity, gpus, overheads or Overheads(), predictor or forecaster())


def forecaster(
    *, epoch_s: float = 0.0, history: Iterable[forecasts.Observed] = (), injected: forecasts.Injected | None = None
) -> forecasts.LoadPredictor:
    """Return the predictor as these controllers want it: they react within seconds, so the recent past is short.

    ``history`` as ``LoadPredictor.learn`` takes it; ``epoch_s`` is where in the week time 0 lies.
    """
    found = forecasts.LoadPredictor(epoch_s=epoch_s, knobs=forecasts.Knobs(level_s=120.0, peak_s=120.0), injected=injected)
    found.learn(history)
    return found


def static(
    tp: int, count: int, clock_mhz: int, *, model: EngineModel, classes: Classes | None = None, name: str = ""
) -> FleetController:
    """Return the controller of a fixed fleet; ValueError when the model has no such parallelism and clock."""
    if (tp, clock_mhz) not in model.table:
        raise ValueError(
            f"{model.name} holds no TP{tp} at {clock_mhz} MHz; it holds {model.tps} and {model.clocks_mhz(model.tps[0])}"
        )
    return Static(name or f"TP{tp}x{count}@{clock_mhz}", tp, count, clock_mhz)


class Static:
    """A fleet that never changes; who stops is replaced."""

    period_s = 60.0

    def __init__(self, name: str, tp: int, count: int, clock_mhz: int) -> None:
        self.name, self.tp, self.count, self.clock_mhz = name, tp, count, clock_mhz

    def decide(self, state: FleetState) -> FleetPlan:
        """Return the fixed fleet."""
        partition = PARTITIONS["one"]
        (pool,) = partition
        members = reconcile(state.instances, {pool: (Shape(self.tp, self.clock_mhz, self.count),)}, state.gpus)
        wants = tuple(InstanceWant(m.id, pool, m.tp, self.clock_mhz, reason="fixed") for m in members)
        return FleetPlan(wants, routes(partition, {pool: self.count}))


class Fleet:
    """The cluster, pool and instance controllers together; what is switched on is ``knobs``."""

    def __init__(
        self, name: str, knobs: Knobs, capacity: Capacity, gpus: int, overheads: Overheads, predictor: Predictor
    ) -> None:
        self.name, self.knobs, self.capacity, self.gpus = name, knobs, capacity, gpus
        self.period_s = 60.0 if knobs.fixed else knobs.period_s
        self.predictor = predictor
        self.lead_s = overheads.lead_s()
        self.pool = PoolController(capacity, knobs, gpus, overheads.start_s())
        self.cluster = ClusterController(self.pool, knobs, gpus)
        self.gate = Gate(horizon_s=knobs.horizon_s, every_s=knobs.pool_s)
        self.recent = Recent(max(120.0, knobs.surge_s))
        self.emergencies = Emergencies()
        self.budget = WattBudget(capacity.model, knobs.budget_w) if knobs.budget_w is not None else None
        self.pools = self._reference()
        self.shapes: dict[str, tuple[Shape, ...]] = {}
        self._instances: dict[str, tuple[str, InstanceController]] = {}
        self._begun_s: float | None = None
        self._cluster_s = self._pool_s = -float("inf")  # when these decided last
        self._planned = False
        self._helped = True  # the last decision changed something
        self._cold = False  # there is no history
        self._modelled_w = 0.0
        self._within = (True, True)
        self._lacks = ""

    def decide(self, state: FleetState) -> FleetPlan:
        """Return the whole desired fleet."""
        events: list[FleetEvent] = []
        if self._begun_s is None:
            self._begun_s = state.now_s
        if state.window_s > 0:
            self.predictor.observe(state.now_s, state.window_s, state.arrivals)
            self.recent.add(state.now_s, state.window_s, state.arrivals)
        measures = self._ladders(state, events)
        self._plan(state, measures, events)
        members = reconcile(state.instances, self.shapes, state.gpus, self.knobs.pairs)
        wants = self._wants(state, members, measures, events)
        alive = Counter(member.pool for member in members)
        return FleetPlan(
            wants,
            routes(self.pools.partition, alive),
            tuple(events),
            reordered=measures.reordered,
            resteered=measures.resteered,
            shed=measures.shed,
        )

    def _reference(self) -> Pools:
        """The pools before anything is known: as for a load that needs every GPU."""
        name = self.knobs.partitions[0]
        partition = PARTITIONS[name]
        if len(partition) == 1:
            return Pools(name, partition, {pool: {pool: 1.0} for pool in partition})
        return replace(self.cluster.standing(name))

    def _plan(self, state: FleetState, measures: Measures, events: list[FleetEvent]) -> None:
        """Decide shapes anew when an epoch ends, and ahead of time when load outgrows them."""
        now_s, knobs = state.now_s, self.knobs
        if not self.shapes:
            self.shapes = self._everything()
        if not (knobs.instances or knobs.shards):
            return
        ends_s = now_s + self.lead_s + knobs.ahead_s
        forecast = self.predictor.peak(now_s, ends_s)
        known = total_of(forecast).requests_per_s > 0
        self._cold = self._cold or (self.recent.covered_s <= 0 and not known)
        if not known or (self._cold and self.recent.covered_s < knobs.warmup_s):
            return
        late = bool(measures.reshard)
        young = self._cold and self.recent.covered_s < knobs.pool_s
        every_s = knobs.young_s if young else knobs.pool_s
        due = now_s >= self._pool_s + every_s - SURE or not self._planned
        if not due and (
            now_s < self._pool_s + (EARLY_S if self._helped else knobs.young_s) or not (late or self._outgrown(state))
        ):
            return
        surge = self._surge(young)
        peak = {name: _larger(rate, surge.get(name, Rate())) for name, rate in forecast.items()}
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
        tps = {pool: tuple(sorted(shapes)) or self.pool.tps for pool, shapes in have.items()}
        stays = self.pool.plan(own, tps=tps, weights=weights) if knobs.shards and self._planned else None
        layout = self.pool.plan(own, weights=weights) if stays is None or due or stays.lacks else stays
        if stays is not None and layout is not stays and not stays.lacks:
            layout = self._gated(now_s, have, stays, layout, events)
        if layout.lacks != self._lacks:
            self._lacks = layout.lacks
            if layout.lacks:
                events.append(FleetEvent(now_s, "infeasible", "fleet", layout.lacks))
        shapes = dict(layout.shapes)
        if not knobs.instances and not knobs.shards:
            return
        if not due:
            shapes = {pool: _grown(self.shapes.get(pool, ()), new) for pool, new in shapes.items()}
            if sum(s.tp * s.count for own_shapes in shapes.values() for s in own_shapes) > self.gpus:
                shapes = dict(layout.shapes)
        for pool in shapes:
            before, after = _text(self.shapes.get(pool, ())), _text(shapes[pool])
            if before != after:
                events.append(FleetEvent(now_s, "scale", pool, f"{before} -> {after}"))
        self.shapes = shapes

    def _gated(
        self, now_s: float, have: Mapping[str, Mapping[int, int]], stays: Layout, new: Layout, events: list[FleetEvent]
    ) -> Layout:
        """Return ``new`` where its change of parallelism pays, else ``stays``."""
        turned = 0
        for pool, shapes in new.shapes.items():
            now = have.get(pool, {})
            if any(shape.tp not in now for shape in shapes):
                turned += sum(shape.tp * max(0, shape.count - now.get(shape.tp, 0)) for shape in shapes)
        if not turned:
            return new
        table = self.capacity.model.table
        gpu_w = max(table[tp, clock].decode_w for tp, clock in self.pool.top.items())
        costs_j = turned * gpu_w * self.pool.start_s
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
        demands = self.pools.demands(scaled(self.recent.rates(self.knobs.surge_s), self.knobs.outgrown))
        for pool, demand in demands.items():
            if total_of(demand).requests_per_s <= 0:
                continue
            for tp, count, part in _parts(self._have().get(pool, {}), demand):
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

    def _ladders(self, state: FleetState, events: list[FleetEvent]) -> Measures:
        if not self.knobs.ladder:
            return Measures()
        slacks, promised = {}, {pool: self._slo(pool) for pool in {i.pool for i in state.instances}}
        for i in state.instances:
            at = self.capacity.model.table.get((i.tp, i.clock_mhz))
            if i.phase == "serving" and at is not None:
                slo = promised[i.pool]
                slacks[i.id] = (slack_of(i.load, at, slo), slo.ttft_s)
        measures = self.emergencies.update(state.now_s, slacks)
        events.extend(measures.events)
        return measures

    def _slo(self, pool: str) -> Slo:
        """What a pool was promised: the TTFT of its longest prompts (the pool's clock cares for shorter ones), the least TBT."""
        names = self.pools.partition.get(pool) or tuple(self.capacity.classes.slos)
        slos = [self.capacity.classes.slos[name] for name in names]
        return Slo(max(slo.ttft_s for slo in slos), min(slo.tbt_s for slo in slos))

    def _wants(
        self, state: FleetState, members: list[Member], measures: Measures, events: list[FleetEvent]
    ) -> tuple[InstanceWant, ...]:
        """Give every member its clock."""
        by_id = {i.id: i for i in state.instances}
        if not self.knobs.clocks:
            top = {tp: self.capacity.model.clocks_mhz(tp)[0] for tp in {member.tp for member in members}}
            wants = [InstanceWant(m.id, m.pool, m.tp, top[m.tp], reason="clocks are not scaled") for m in members]
        else:
            floors = self._floors(members, by_id)
            wants = [self._want(state.now_s, member, by_id, floors, measures) for member in members]
            gone = [name for name in self._instances if name not in by_id]
            for name in gone:
                del self._instances[name]
        return tuple(self._within_budget(state, wants, by_id, events) if self.budget is not None else wants)

    def _floors(self, members: list[Member], by_id: Mapping[str, InstanceState]) -> dict[tuple[str, int], int]:
        """Return the clock that each pool's instances of one parallelism need together for what arrived lately."""
        demands = self.pools.demands(scaled(self.recent.rates(self.knobs.fast_s), self.knobs.clock_margin))
        serving: dict[str, Counter[int]] = {}
        for member in members:
            if member.id is not None and by_id[member.id].phase == "serving":
                serving.setdefault(member.pool, Counter())[member.tp] += 1
        floors: dict[tuple[str, int], int] = {}
        for pool, have in serving.items():
            demand = demands.get(pool, {})
            for tp, count, part in _parts(have, demand):
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
        measures: Measures,
    ) -> InstanceWant:
        floor = floors.get((member.pool, member.tp))
        top = self.capacity.model.clocks_mhz(member.tp)[0]
        if member.id is None or by_id[member.id].phase != "serving":
            return InstanceWant(member.id, member.pool, member.tp, floor or top, reason="starts")
        if not self._planned and self.recent.covered_s < self.knobs.fast_s:
            return InstanceWant(member.id, member.pool, member.tp, top, reason="nothing is known yet")
        pool, controller = self._instances.get(member.id, ("", None))
        if controller is None or pool != member.pool:
            controller = self._controller(member)
            self._instances[member.id] = (member.pool, controller)
        controller.floor_mhz = top if member.id in measures.max_clock else floor
        decision = controller.clock(now_s, by_id[member.id].load)
        return InstanceWant(member.id, member.pool, member.tp, decision.clock_mhz, reason=decision.reason)

    def _controller(self, member: Member) -> InstanceController:
        peers = max(1, sum(shape.count for shape in self.shapes.get(member.pool, ())))
        return InstanceController(
            self.capacity.model,
            member.tp,
            self._slo(member.pool),
            chunk_tokens=self.capacity.chunk_tokens,
            peers=peers,
            dwell_s=self.knobs.dwell_s,
            period_s=self.knobs.period_s,
        )

    def _within_budget(
        self, state: FleetState, wants: list[InstanceWant], by_id: Mapping[str, InstanceState], events: list[FleetEvent]
    ) -> list[InstanceWant]:
        """Lower clocks until the modelled watts, corrected by the measured ones, are within the budget."""
        assert self.budget is not None
        self.budget.learn(state.power_w, self._modelled_w)
        draws, kept = [], {want.id for want in wants}
        for i in state.instances:  # those that drain draw as well, and nobody sets their clocks any more
            if i.id not in kept:
                draws.append(Draw(i.tp, 1, i.clock_mhz, i.load.prompt_tokens_per_s or 0.0, i.load.output_tokens_per_s or 0.0))
        leaving_w = self.budget.power_w(draws)
        draws = []
        for want in wants:
            load = by_id[want.id].load if want.id is not None and want.id in by_id else None
            prompt = (load.prompt_tokens_per_s if load else None) or 0.0
            output = (load.output_tokens_per_s if load else None) or 0.0
            draws.append(Draw(want.tp, 1, want.clock_mhz, prompt, output))
        ceiling = self.budget.ceiling(draws, leaving_w)
        self._modelled_w = leaving_w + self.budget.power_w(draws, ceiling.clock_mhz)
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


def _parts(have: Mapping[int, int], demand: Demand) -> list[tuple[int, int, Demand]]:
    """Return (parallelism, count, its part of the demand) for a pool's kinds of instances, by their GPUs."""
    gpus = sum(tp * count for tp, count in have.items())
    if len(have) == 1:
        ((tp, count),) = have.items()
        return [(tp, count, demand)]
    return [(tp, count, scaled(demand, tp * count / gpus)) for tp, count in have.items()]


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
