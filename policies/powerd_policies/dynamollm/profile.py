"""What an instance costs and keeps at a load: (class, tensor parallelism, SM clock, requests/s) -> energy, TTFT, TBT, power.

House rules: between measured points values are interpolated by a labelled additive model; beyond them the answer is
"not covered", never a guess; an infeasible point says so.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from powerd.errors import RequestError
from powerd_policies.dynamollm.classes import Slo

Source = Literal["measured", "modelled", "interpolated"]
#: Load is compared with this share of tolerance: 3 * 0.1 is not beyond 0.3.
_SLACK = 1e-9


class NotCoveredError(LookupError):
    """The profile does not hold what was asked; the message says what it holds."""


@dataclass(frozen=True, slots=True)
class ProfilePoint:
    """One instance that serves ``requests_per_s`` of one class; power is of the whole instance (all its GPUs)."""

    request_class: str
    tp: int
    clock_mhz: int
    requests_per_s: float
    energy_per_request_j: float
    ttft_p99_s: float
    tbt_p99_s: float
    power_w: float
    feasible: bool
    source: Source = "measured"


class Profile:
    """A store of profile points. Immutable; made from points of any order.

    Along load, neighbours of one (class, parallelism, clock) are joined by straight lines of TTFT, TBT, power and energy per
    second. Between clocks (additive model, labelled ``interpolated``): a clock between two measured ones is on the straight line
    between them at the same load; a clock that was measured at another parallelism only gets this parallelism's value at the
    clocks that both have, plus the other's difference. Parallelisms are never interpolated.
    """

    def __init__(self, points: Iterable[ProfilePoint]) -> None:
        rows: dict[tuple[str, int, int], dict[float, ProfilePoint]] = defaultdict(dict)
        for point in points:
            row = rows[point.request_class, point.tp, point.clock_mhz]
            if point.requests_per_s in row:
                raise _bad(f"{_say(point)} is there twice", "keep one point per load, or their median")
            row[point.requests_per_s] = point
        if not rows:
            raise _bad("the profile has no points")
        self._rows = {key: tuple(row[load] for load in sorted(row)) for key, row in rows.items()}
        self._loads = {key: [point.requests_per_s for point in row] for key, row in self._rows.items()}

    @cached_property
    def points(self) -> tuple[ProfilePoint, ...]:
        """Every point, by class, parallelism, falling clock and rising load."""
        return tuple(p for key in sorted(self._rows, key=lambda k: (k[0], k[1], -k[2])) for p in self._rows[key])

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The request classes that the profile holds."""
        return tuple(sorted({name for name, _, _ in self._rows}))

    @cached_property
    def tps(self) -> tuple[int, ...]:
        """The tensor parallelisms that the profile holds, ascending."""
        return tuple(sorted({tp for _, tp, _ in self._rows}))

    def clocks_mhz(self, tp: int) -> tuple[int, ...]:
        """The SM clocks measured at ``tp``, descending; NotCoveredError for a parallelism that the profile does not hold."""
        self._check_tp(tp)
        return self._clocks[tp]

    def at(self, request_class: str, tp: int, clock_mhz: int, requests_per_s: float) -> ProfilePoint:
        """Return the point of one class at one load; NotCoveredError, saying what is covered, beyond any measured axis."""
        key = (request_class, tp, clock_mhz)
        if key in self._rows:
            return self._along(key, requests_per_s)
        self._check(request_class, tp)
        own = self._class_clocks[request_class, tp]
        below, above = [c for c in own if c < clock_mhz], [c for c in own if c > clock_mhz]
        if below and above:
            low = self._along((request_class, tp, max(below)), requests_per_s)
            high = self._along((request_class, tp, min(above)), requests_per_s)
            share = (clock_mhz - low.clock_mhz) / (high.clock_mhz - low.clock_mhz)
            return replace(_between(low, high, share, requests_per_s), clock_mhz=clock_mhz)
        return self._additive(request_class, tp, clock_mhz, requests_per_s)

    def capacity_rps(self, request_class: str, tp: int, clock_mhz: int, slo: Slo | None = None) -> float:
        """Return the highest measured load, in requests per second, up to which an instance is feasible and keeps ``slo``.

        0.0: not even the lowest. Without ``slo`` the profile's own ``feasible`` decides alone; with one, both do.
        """
        key = (request_class, tp, clock_mhz)
        cached = self._capacities.get((*key, slo))
        if cached is None:
            row = self._rows.get(key) or self._sampled(request_class, tp, clock_mhz)
            cached = self._capacities[*key, slo] = _capacity(row, slo)
        return cached

    def power_w(self, tp: int, clock_mhz: int, loads: Mapping[str, float]) -> float:
        """Return the watts of one instance that serves several classes at once, by class requests per second.

        Additive: its utilisation u is the sum of load over capacity; each class's part of u weighs the watts of an instance that
        serves that class alone at u. Below the lowest measured load it is the watts of that load, which is never too low.
        NotCoveredError for a class that the instance cannot serve and for more than it holds.
        """
        shares: dict[str, tuple[float, float]] = {}
        for name, load in loads.items():
            if load <= 0.0:
                continue
            capacity = self.capacity_rps(name, tp, clock_mhz)
            if capacity <= 0.0:
                raise NotCoveredError(f"class {name} is infeasible at TP{tp} and {clock_mhz} MHz at every load of the profile")
            shares[name] = load / capacity, capacity
        used = sum(share for share, _ in shares.values())
        if not shares:
            return min(self._lowest(name, tp, clock_mhz).power_w for name in self.classes if (name, tp) in self._class_clocks)
        if used > 1.0 + _SLACK:
            raise NotCoveredError(f"the load is {used:.0%} of what TP{tp} at {clock_mhz} MHz holds: {_loads(loads)}")
        watts = 0.0
        for name, (share, capacity) in shares.items():
            lowest = self._lowest(name, tp, clock_mhz)
            load = min(used, 1.0) * capacity
            point = lowest if load <= lowest.requests_per_s else self.at(name, tp, clock_mhz, load)
            watts += share / used * point.power_w
        return watts

    def infeasible(self, slos: Mapping[str, Slo]) -> dict[str, str]:
        """By class whose SLO no parallelism and clock keeps at any load: what would be needed, in words. Empty when all do."""
        said: dict[str, str] = {}
        for name in self.classes:
            if name not in slos:
                continue
            slo = slos[name]
            rows = [key for key in self._rows if key[0] == name]
            if any(self.capacity_rps(*key, slo) > 0.0 for key in rows):
                continue
            points = [point for key in rows for point in self._rows[key]]
            best = min(points, key=lambda p: max(p.ttft_p99_s / slo.ttft_s, p.tbt_p99_s / slo.tbt_s))
            if best.ttft_p99_s <= slo.ttft_s and best.tbt_p99_s <= slo.tbt_s:
                said[name] = f"class {name} is marked infeasible at every load: it needs more GPUs per instance or another GPU"
            else:
                said[name] = (
                    f"class {name} cannot keep TTFT {slo.ttft_s:g} s and TBT {slo.tbt_s:g} s: the best is TP{best.tp} at"
                    f" {best.clock_mhz} MHz and {best.requests_per_s:.3g} requests/s with TTFT {best.ttft_p99_s:.3g} s and"
                    f" TBT {best.tbt_p99_s:.3g} s; allow that much, or profile a faster set-up"
                )
        return said

    def require(self, slos: Mapping[str, Slo], tps: Sequence[int] = ()) -> None:
        """Refuse to plan with a profile that cannot do: RequestError for a missing class or parallelism, or an infeasible SLO."""
        if missing := [tp for tp in tps if tp not in self.tps]:
            raise _bad(
                f"the profile does not hold TP{missing[0]}", f"it holds {_tps(self.tps)}: profile the other or leave it out"
            )
        if absent := [name for name in slos if name not in self.classes]:
            raise _bad(f"the profile does not hold class {absent[0]}", f"it holds {', '.join(self.classes)}")
        if said := self.infeasible(slos):
            raise _bad("; ".join(said.values()))

    @cached_property
    def _clocks(self) -> dict[int, tuple[int, ...]]:
        return {tp: tuple(sorted({c for _, t, c in self._rows if t == tp}, reverse=True)) for tp in self.tps}

    @cached_property
    def _class_clocks(self) -> dict[tuple[str, int], tuple[int, ...]]:
        made: dict[tuple[str, int], list[int]] = defaultdict(list)
        for name, tp, clock_mhz in sorted(self._rows, key=lambda k: -k[2]):
            made[name, tp].append(clock_mhz)
        return {key: tuple(clocks) for key, clocks in made.items()}

    @cached_property
    def _capacities(self) -> dict[tuple[str, int, int, Slo | None], float]:
        return {}

    def _along(self, key: tuple[str, int, int], load: float) -> ProfilePoint:
        row, loads = self._rows[key], self._loads[key]
        if not loads[0] * (1 - _SLACK) <= load <= loads[-1] * (1 + _SLACK):
            raise NotCoveredError(
                f"{load:g} requests/s of class {key[0]} at TP{key[1]} and {key[2]} MHz is not covered:"
                f" the profile holds {loads[0]:g} to {loads[-1]:g}"
            )
        at = bisect_left(loads, load)
        if at == len(loads) or (at == 0 and loads[0] >= load):
            return row[min(at, len(loads) - 1)]
        if loads[at] == load:
            return row[at]
        low, high = row[at - 1], row[at]
        return _between(low, high, (load - loads[at - 1]) / (loads[at] - loads[at - 1]), load)

    def _additive(self, request_class: str, tp: int, clock_mhz: int, load: float) -> ProfilePoint:
        """A clock outside of what this parallelism was measured at, by another's difference between the two clocks."""
        own = self._class_clocks[request_class, tp]
        for other in self.tps:
            theirs = self._class_clocks.get((request_class, other), ())
            shared = [c for c in theirs if c in own]
            if other == tp or clock_mhz not in theirs or not shared:
                continue
            near = min(shared, key=lambda c: abs(c - clock_mhz))
            base = self._along((request_class, tp, near), load)
            there, here = (self._along((request_class, other, c), load) for c in (clock_mhz, near))
            made = _added(base, there, here, load)
            if made is not None:
                return replace(made, clock_mhz=clock_mhz)
        raise NotCoveredError(
            f"{clock_mhz} MHz is not covered for class {request_class} at TP{tp}: the profile holds {min(own)} to {max(own)} MHz"
        )

    def _sampled(self, request_class: str, tp: int, clock_mhz: int) -> tuple[ProfilePoint, ...]:
        """The interpolated row of a clock without its own, at the loads of its class and parallelism that are covered."""
        self._check(request_class, tp)
        keys = [key for key in self._rows if key[:2] == (request_class, tp)]
        made = []
        for load in sorted(set(itertools.chain.from_iterable(self._loads[key] for key in keys))):
            try:
                made.append(self.at(request_class, tp, clock_mhz, load))
            except NotCoveredError:
                continue
        if not made:
            self.at(request_class, tp, clock_mhz, self._loads[keys[0]][0])  # says what is not covered
        return tuple(made)

    def _lowest(self, request_class: str, tp: int, clock_mhz: int) -> ProfilePoint:
        row = self._rows.get((request_class, tp, clock_mhz)) or self._sampled(request_class, tp, clock_mhz)
        return row[0]

    def _check_tp(self, tp: int) -> None:
        if tp not in self._clocks:
            raise NotCoveredError(f"the profile does not hold TP{tp}: it holds {_tps(self.tps)}")

    def _check(self, request_class: str, tp: int) -> None:
        self._check_tp(tp)
        if request_class not in self.classes:
            raise NotCoveredError(f"the profile does not hold class {request_class}: it holds {', '.join(self.classes)}")
        if (request_class, tp) not in self._class_clocks:
            held = tuple(t for name, t in self._class_clocks if name == request_class)
            raise NotCoveredError(f"the profile does not hold TP{tp} for class {request_class}: it holds {_tps(sorted(held))}")


def _between(low: ProfilePoint, high: ProfilePoint, share: float, load: float) -> ProfilePoint:
    """The point at ``share`` of the way: lines of TTFT, TBT, power and energy per second, which idles are a part of."""

    def line(a: float, b: float) -> float:
        return min(max(a + share * (b - a), min(a, b)), max(a, b))

    per_second = line(low.energy_per_request_j * low.requests_per_s, high.energy_per_request_j * high.requests_per_s)
    return replace(
        low,
        requests_per_s=load,
        energy_per_request_j=per_second / load if load > 0 else line(low.energy_per_request_j, high.energy_per_request_j),
        ttft_p99_s=line(low.ttft_p99_s, high.ttft_p99_s),
        tbt_p99_s=line(low.tbt_p99_s, high.tbt_p99_s),
        power_w=line(low.power_w, high.power_w),
        feasible=low.feasible and high.feasible,
        source="interpolated",
    )


def _added(base: ProfilePoint, there: ProfilePoint, here: ProfilePoint, load: float) -> ProfilePoint | None:
    """``base + there - here``; None where that is not above zero."""
    names = ("energy_per_request_j", "ttft_p99_s", "tbt_p99_s", "power_w")
    values = {name: getattr(base, name) + getattr(there, name) - getattr(here, name) for name in names}
    if min(values.values()) <= 0.0:
        return None
    feasible = base.feasible and there.feasible and here.feasible
    return ProfilePoint(base.request_class, base.tp, base.clock_mhz, load, feasible=feasible, source="interpolated", **values)


def _capacity(row: Sequence[ProfilePoint], slo: Slo | None) -> float:
    """The load at which the line between the last point that keeps the SLO and the first that does not crosses it."""
    kept: ProfilePoint | None = None
    for point in row:
        keeps = slo is None or (point.ttft_p99_s <= slo.ttft_s and point.tbt_p99_s <= slo.tbt_s)
        if point.feasible and keeps:
            kept = point
            continue
        if kept is None or not point.feasible or slo is None:
            break
        share = 1.0
        for low, high, limit in (
            (kept.ttft_p99_s, point.ttft_p99_s, slo.ttft_s),
            (kept.tbt_p99_s, point.tbt_p99_s, slo.tbt_s),
        ):
            if high > limit:
                share = min(share, (limit - low) / (high - low))
        return kept.requests_per_s + share * (point.requests_per_s - kept.requests_per_s)
    return 0.0 if kept is None else kept.requests_per_s


def _say(point: ProfilePoint) -> str:
    return f"class {point.request_class} at TP{point.tp}, {point.clock_mhz} MHz and {point.requests_per_s:g} requests/s"


def _tps(tps: Iterable[int]) -> str:
    return ", ".join(f"TP{tp}" for tp in tps)


def _loads(loads: Mapping[str, float]) -> str:
    return ", ".join(f"{load:g}/s of {name}" for name, load in loads.items())


def _bad(message: str, hint: str = "") -> RequestError:
    return RequestError(message, hint=hint, code="bad_value")
