"""The pool controller (every 5 minutes): how many instances of which tensor parallelism, and the clock they are planned for.

House rules: pure; a plan holds the predicted load at its planned clock and a burst beyond it at the highest one, so the reserve
is in the clocks and not in idle GPUs; power is compared at the load that is expected most of the time, not at the peak.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from powerd_policies.dynamollm.capacity import Capacity, Demand, scaled, total_of
from powerd_policies.dynamollm.knobs import Knobs
from powerd_policies.dynamollm.optimizer import InfeasibleError, Option, Pool, Sharding, Weights, optimise


@dataclass(frozen=True, slots=True)
class Shape:
    """So many instances of a pool with one tensor parallelism; the clock is the one planned for the peak."""

    tp: int
    clock_mhz: int
    count: int


@dataclass(frozen=True, slots=True)
class Need:
    """What a pool has to hold (``peak``) and does most of the time (``mean``); ``gpus``: exactly so many, None: free."""

    name: str
    peak: Demand
    mean: Demand
    have: Mapping[int, int]  # instances by tensor parallelism
    gpus: int | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """The pools' shapes; ``power_w`` as expected at mean load; ``lacks``: what could not be met, empty when all is.

    ``share`` of the load is held within every SLO; 0: the search found none that is.
    """

    shapes: Mapping[str, tuple[Shape, ...]]
    power_w: float
    lacks: str = ""
    share: float = 1.0

    @property
    def gpus(self) -> int:
        """GPUs of all pools."""
        return sum(shape.tp * shape.count for shapes in self.shapes.values() for shape in shapes)


USUAL_START_S: Final = 60.0
SHARES: Final = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)  # of a load that is too much, tried in turn


class PoolController:
    """Plans pools against a capacity model; ``start_s`` is what a new instance takes, for the cost of having one."""

    def __init__(self, capacity: Capacity, knobs: Knobs, gpus: int, start_s: float = 60.0) -> None:
        self.capacity, self.knobs, self.gpus, self.start_s = capacity, knobs, gpus, start_s
        self.burst = 1.0 + (knobs.burst - 1.0) * max(1.0, start_s / USUAL_START_S) ** 0.5  # grows as long as nobody comes to help
        model = capacity.model
        self.tps = model.tps if knobs.shards else (knobs.tp,)
        self.top = {tp: model.clocks_mhz(tp)[0] for tp in self.tps}
        self.clocks = {tp: model.clocks_mhz(tp) if knobs.clocks else (self.top[tp],) for tp in self.tps}

    def plan(
        self, needs: list[Need], *, tps: Mapping[str, tuple[int, ...]] | None = None, weights: Weights | None = None
    ) -> Layout:
        """Return the layout of least cost; one that lacks something uses what there is and says which class lacks what."""
        lacks = ""
        for share in SHARES:
            for burst in (self.burst, 1.0) if share == 1.0 else (1.0,):
                try:
                    found = self._try([_less(need, share) for need in needs], burst, tps or {}, weights)
                except InfeasibleError as error:
                    lacks = lacks if share < 1.0 else str(error)
                else:
                    said = f"{lacks}; planned for {100 * share:.0f} % of the load" if share < 1.0 else ""
                    return replace(self._layout(found, said), share=share)
        return self._fallback(needs, lacks)

    def _try(self, needs: list[Need], burst: float, tps: Mapping[str, tuple[int, ...]], weights: Weights | None) -> Sharding:
        pools = []
        for need in needs:
            options = self.options(need, tps.get(need.name, self.tps), burst)
            if not options and total_of(need.peak).requests_per_s > 0:
                raise InfeasibleError(f"{need.name}: {self._lacks(need)}")
            pools.append(Pool(need.name, 1.0 if options else 0.0, tuple(options), need.gpus))
        return optimise(pools, self.gpus, budget_w=self.knobs.budget_w, weights=weights or self.knobs.weights)

    def options(self, need: Need, tps: tuple[int, ...], burst: float = 1.0) -> list[Option]:
        """Return the kinds of instances that keep the need, each with the share of it that one holds and what it draws."""
        if total_of(need.peak).requests_per_s <= 0:
            return []
        if need.gpus is not None:
            return [option for tp in tps for option in self._given(need, tp, need.gpus)]
        return [option for tp in tps for option in self._free(need, tp, burst)]

    def _free(self, need: Need, tp: int, burst: float) -> list[Option]:
        """Options of one parallelism with as few instances as their clock allows; none that another beats in count and power."""
        capacity, top, most = self.capacity, self.top[tp], self.gpus // tp
        peak = need.peak
        if most < 1:
            return []
        least = capacity.least(tp, top, peak, most)
        if least is None:
            return []
        floor = least if burst <= 1.0 else capacity.least(tp, top, scaled(peak, burst), most)
        if floor is None:
            return []
        found: dict[int, tuple[int, float]] = {}
        for clock in self.clocks[tp] if self.knobs.joint else (top,):
            count = capacity.least(tp, clock, peak, most)
            if count is not None and max(count, floor) not in found:
                found[max(count, floor)] = (clock, self.power_w(tp, max(count, floor), need.mean))
        options, best = [], float("inf")
        for count in sorted(found):
            clock, power_w = found[count]
            if power_w < best:
                best = power_w
                idle_w = capacity.model.table[tp, clock].idle_w
                start_w = tp * idle_w * self.start_s / self.knobs.horizon_s
                options.append(Option(tp, clock, 1.0 / count, power_w / count, 0.0, need.have.get(tp, 0), start_w))
        return options

    def _given(self, need: Need, tp: int, gpus: int) -> list[Option]:
        """Options of one parallelism where the GPUs are given and all are used, at the highest clock (the paper's way)."""
        count, top = gpus // tp, self.top[tp]
        if count < 1:
            return []
        holds = min(64.0, self.capacity.holds(tp, top, count, need.peak)) / count
        if holds <= 0:
            return []
        low_w, high_w = (self.capacity.serve(tp, top, count, scaled(need.mean, part)).power_w / count for part in (0.5, 1.0))
        base_w = max(0.0, 2.0 * low_w - high_w)
        return [Option(tp, top, holds, base_w, max(0.0, high_w - base_w) * count, need.have.get(tp, 0))]

    def power_w(self, tp: int, count: int, demand: Demand) -> float:
        """Return the watts of ``count`` instances at the clock that the instance controllers would choose for ``demand``."""
        served = [self.capacity.serve(tp, clock, count, demand) for clock in self.clocks[tp]]
        feasible = [service.power_w for service in served if service.feasible]
        return min(feasible) if feasible else served[0].power_w

    def clock_mhz(self, tp: int, count: int, demand: Demand) -> int:
        """Return the clock of least power that keeps ``demand``, the highest when none does."""
        best, best_w = self.top[tp], float("inf")
        for clock in self.clocks[tp]:
            service = self.capacity.serve(tp, clock, count, demand)
            if not service.feasible:
                break
            if service.power_w < best_w:
                best, best_w = clock, service.power_w
        return best

    def _lacks(self, need: Need) -> str:
        """Say what a need fails by, and how many GPUs would do."""
        gpus = self.gpus if need.gpus is None else need.gpus
        tps = [tp for tp in self.tps if tp <= gpus]
        if not tps:
            return f"{gpus} GPUs are fewer than an instance of TP{min(self.tps)} has"
        held, tp = max((self.capacity.holds(tp, self.top[tp], gpus // tp, need.peak), tp) for tp in tps)
        if held <= 0:
            alone = self.capacity.serve(tp, self.top[tp], gpus // tp, scaled(need.peak, 1e-3))
            return f"no tensor parallelism and clock keeps {alone.lacks or 'its SLO'} at any load"
        lacks = self.capacity.serve(tp, self.top[tp], gpus // tp, need.peak).lacks
        needed = math.ceil(gpus / held)
        told = f"{gpus} GPUs hold {100 * held:.0f} % of the load at the highest clock, about {needed} would be needed"
        return f"{lacks}; {told}" if lacks else told

    def _fallback(self, needs: list[Need], lacks: str) -> Layout:
        """Everything that there is, by prompt and answer tokens."""
        tp = max(self.tps)
        work = {need.name: total_of(need.peak).prompt_tokens_per_s + total_of(need.peak).output_tokens_per_s for need in needs}
        total, left, shapes = sum(work.values()) or 1.0, self.gpus // tp, {}
        for name in sorted(work, key=lambda name: work[name]):
            count = min(left, round(self.gpus // tp * work[name] / total))
            left -= count
            shapes[name] = count
        if shapes:
            shapes[max(work, key=lambda name: work[name])] += left
        return Layout({name: (Shape(tp, self.top[tp], n),) if n else () for name, n in shapes.items()}, 0.0, lacks, 0.0)

    def _layout(self, found: Sharding, lacks: str) -> Layout:
        shapes = {}
        for name, shares in found.pools.items():
            by_tp: dict[int, Shape] = {}
            for share in shares:
                old = by_tp.get(share.option.tp)
                clock = max(share.option.clock_mhz, old.clock_mhz if old else 0)
                by_tp[share.option.tp] = Shape(share.option.tp, clock, share.count + (old.count if old else 0))
            shapes[name] = tuple(by_tp[tp] for tp in sorted(by_tp))
        return Layout(shapes, found.power_w, lacks)


def _less(need: Need, share: float) -> Need:
    return need if share == 1.0 else replace(need, peak=scaled(need.peak, share), mean=scaled(need.mean, share))
