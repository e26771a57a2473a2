"""Fits of time and power against the SM clock, and how well they meet the measurements.

House rules: fits serve only where nothing was measured (below the lowest clock, other models); a measured row always
stands; `python -m powerd.sim.calibration` prints every error that the documentation quotes.

Forms: `t = a + b / min(f, f_cap)` and `P = ps + c * x * V(x)^2` with x = f / f_max, V flat below a knee.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROWS_PER_UNIT = 10.0  # the published rows hold one tenth of a microbatch


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement of one kernel: seconds per unit and watts at a locked SM clock."""

    clock_mhz: float
    time_s: float
    power_w: float


Curve = tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """A kernel's fitted time and power."""

    a_s: float
    b_s_mhz: float
    clock_cap_mhz: float
    static_w: float
    dynamic_w: float
    voltage_floor: float
    voltage_knee: float
    clock_max_mhz: float

    def time_s(self, clock_mhz: float) -> float:
        """Seconds per unit at `clock_mhz`."""
        return self.a_s + self.b_s_mhz / min(clock_mhz, self.clock_cap_mhz)

    def power_w(self, clock_mhz: float) -> float:
        """Watts at `clock_mhz`."""
        x = clock_mhz / self.clock_max_mhz
        return self.static_w + self.dynamic_w * x * voltage(x, self.voltage_floor, self.voltage_knee) ** 2


def voltage(x: float, floor: float, knee: float) -> float:
    """Voltage relative to the one at the top clock: flat up to the knee, then linear."""
    return floor if x <= knee else floor + (1.0 - floor) * (x - knee) / (1.0 - knee)


def _line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float]:
    """Least squares of relative errors: intercept, slope, sum of squares; both kept non-negative."""
    ws = [1.0 / (y * y) for y in ys]
    sw, sx, sy = (
        sum(ws),
        sum(w * x for w, x in zip(ws, xs, strict=True)),
        sum(w * y for w, y in zip(ws, ys, strict=True)),
    )
    sxx = sum(w * x * x for w, x in zip(ws, xs, strict=True))
    sxy = sum(w * x * y for w, x, y in zip(ws, xs, ys, strict=True))
    det = sw * sxx - sx * sx
    slope = (sw * sxy - sx * sy) / det if det else 0.0
    intercept = (sy - slope * sx) / sw
    if intercept < 0.0:
        intercept, slope = 0.0, sxy / sxx
    error = sum(w * (intercept + slope * x - y) ** 2 for w, x, y in zip(ws, xs, ys, strict=True))
    return intercept, slope, error


@lru_cache(maxsize=256)
def fit(curve: Curve, clock_max_mhz: float) -> Fit:
    """Fit time and power of a curve; the clock cap, voltage floor and knee are searched on a grid."""
    clocks = [p.clock_mhz for p in curve]
    times = [p.time_s for p in curve]
    powers = [p.power_w for p in curve]
    candidates = [(_line([1.0 / min(f, cap) for f in clocks], times), cap) for cap in clocks if cap >= 0.7 * clock_max_mhz]
    (a_s, b, _), cap = min(candidates, key=lambda row: row[0][2])
    best: tuple[float, float, float, float, float] | None = None
    for knee_step in range(9):
        knee = 0.60 + 0.03 * knee_step
        for floor_step in range(9):
            floor = 0.66 + 0.03 * floor_step
            xs = [f / clock_max_mhz for f in clocks]
            static, dynamic, error = _line([x * voltage(x, floor, knee) ** 2 for x in xs], powers)
            if best is None or error < best[0]:
                best = (error, static, dynamic, floor, knee)
    assert best is not None
    return Fit(a_s, b, cap, best[1], best[2], best[3], best[4], clock_max_mhz)


@lru_cache(maxsize=32)
def load_profile(path: Path) -> dict[tuple[int, str], Curve]:
    """Read a profile CSV (stage, instruction, frequency MHz, time s, energy J) as true curves, ascending in clock."""
    rows: dict[tuple[int, str], list[Point]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            time_s, energy_j = float(row["time"]), float(row["energy"])
            point = Point(float(row["frequency"]), time_s * ROWS_PER_UNIT, energy_j / time_s)
            rows.setdefault((int(row["stage"]), row["instruction"]), []).append(point)
    return {key: tuple(sorted(points, key=lambda p: p.clock_mhz)) for key, points in rows.items()}


def choose(curve: Curve, fit_on: str | Iterable[int] | None) -> Curve:
    """Keep the clocks that a simulator may know: all, every second one (with both ends), or an explicit list."""
    if fit_on is None or fit_on == "all":
        return curve
    if fit_on == "every-second":
        last = len(curve) - 1
        return tuple(p for i, p in enumerate(curve) if i % 2 == 0 or i == last)
    if isinstance(fit_on, str):
        raise ValueError(f"fit_on is 'all', 'every-second' or a list of clocks, not {fit_on!r}")
    wanted = set(fit_on)
    kept = tuple(p for p in curve if int(p.clock_mhz) in wanted)
    if len(kept) < 2:
        raise ValueError("fit_on keeps fewer than two measured clocks")
    return kept


def extend(curve: Curve, clock_min_mhz: int, clock_max_mhz: int) -> Curve:
    """Add fitted points below the lowest and up to the top clock, continuous with the measured ends."""
    fitted = fit(curve, float(clock_max_mhz))
    low, high = curve[0], curve[-1]

    def scaled(clock: float, end: Point) -> Point:
        time_s = fitted.time_s(clock) * end.time_s / fitted.time_s(end.clock_mhz)
        power_w = fitted.power_w(clock) * end.power_w / fitted.power_w(end.clock_mhz)
        return Point(clock, time_s, power_w)

    below = [float(f) for f in range(clock_min_mhz, int(low.clock_mhz), 45)]
    above = [float(f) for f in range(int(high.clock_mhz) + 15, clock_max_mhz + 1, 15)]
    return (*(scaled(f, low) for f in below), *curve, *(scaled(f, high) for f in above))


def interpolate(curve: Curve, clock_mhz: float) -> Point:
    """Read a curve between its points as the simulator does: linear in rate and in power."""
    if clock_mhz <= curve[0].clock_mhz:
        return curve[0]
    for low, high in itertools.pairwise(curve):
        if clock_mhz <= high.clock_mhz:
            share = (clock_mhz - low.clock_mhz) / (high.clock_mhz - low.clock_mhz)
            rate = (1 - share) / low.time_s + share / high.time_s
            return Point(clock_mhz, 1.0 / rate, (1 - share) * low.power_w + share * high.power_w)
    return curve[-1]


@dataclass(frozen=True, slots=True)
class Errors:
    """Mean and largest relative error of time, power and energy over some clocks."""

    clocks: int
    time_mean: float
    time_max: float
    power_mean: float
    power_max: float
    energy_mean: float
    energy_max: float


def compare(measured: Iterable[Point], predicted: Iterable[Point]) -> Errors:
    """Relative errors of predicted against measured points, clock by clock."""
    rows = [
        (
            abs(p.time_s / m.time_s - 1),
            abs(p.power_w / m.power_w - 1),
            abs(p.time_s * p.power_w / (m.time_s * m.power_w) - 1),
        )
        for m, p in zip(measured, predicted, strict=True)
    ]
    times, powers, energies = zip(*rows, strict=True)

    def both(values: Sequence[float]) -> tuple[float, float]:
        return sum(values) / len(values), max(values)

    return Errors(len(rows), *both(times), *both(powers), *both(energies))


def left_out_errors(curve: Curve) -> Errors:
    """Errors at the clocks that a table of every second clock has not seen."""
    kept = choose(curve, "every-second")
    rest = [p for p in curve if p not in kept]
    return compare(rest, [interpolate(kept, p.clock_mhz) for p in rest])


def fit_errors(curve: Curve, clock_max_mhz: float) -> Errors:
    """Errors of the fitted form at the clocks that it was fitted on."""
    fitted = fit(curve, clock_max_mhz)
    return compare(curve, [Point(p.clock_mhz, fitted.time_s(p.clock_mhz), fitted.power_w(p.clock_mhz)) for p in curve])


@dataclass(frozen=True, slots=True)
class LimitPoint:
    """A whole job under one power limit: time and energy relative to the highest limit, measured and modelled."""

    limit_w: float
    time: float
    energy: float
    modelled_time: float
    modelled_energy: float


def load_limit_sweep(path: Path) -> dict[str, list[tuple[float, float, float]]]:
    """Read a power-limit sweep as model -> (limit W, time s, energy J of all GPUs), highest limit first."""
    out: dict[str, list[tuple[float, float, float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            limits = {float(value) for key, value in row.items() if key.startswith("power_limit_")}
            if len(limits) == 1:
                out.setdefault(row["model_name"], []).append((limits.pop(), float(row["time"]), float(row["energy"])))
    return {name: sorted(rows, reverse=True) for name, rows in out.items()}


def clock_at_power(curve: Curve, power_w: float) -> float:
    """The highest clock at which a curve draws no more than `power_w` (its lowest clock if none does)."""
    low, high = curve[0].clock_mhz, curve[-1].clock_mhz
    if interpolate(curve, high).power_w <= power_w:
        return high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if interpolate(curve, middle).power_w <= power_w else (low, middle)
    return low


def limit_response(
    curve: Curve, rows: Sequence[tuple[float, float, float]], cap_target: float, blocked_w: float, busy: float
) -> list[LimitPoint]:
    """Model a job that runs one kernel for a share `busy` of the time under each limit, blocked for the rest."""
    out: list[LimitPoint] = []
    first: tuple[float, float] | None = None
    for limit_w, time_s, energy_j in rows:
        point = interpolate(curve, clock_at_power(curve, cap_target * limit_w))
        energy = (busy * point.power_w + (1 - busy) * blocked_w) * point.time_s
        first = first or (point.time_s, energy)
        modelled = (point.time_s / first[0], energy / first[1])
        out.append(LimitPoint(limit_w, time_s / rows[0][1], energy_j / rows[0][2], *modelled))
    return out


# Busy share of the published pipelines (4 and 8 stages), from mean power against the limit; the rest is bubbles.
BUSY_SHARE = {"a100-pcie": 0.93, "a40": 0.82}


def _print_profiles() -> None:
    from powerd.sim.kernels import profile_path
    from powerd.sim.models import MODELS

    head = f"{'time':>15}{'power':>15}{'energy':>15}   (mean / largest error, per cent)"
    seen: set[str] = set()
    for model in MODELS.values():
        if model.profile is None or model.profile in seen:
            continue
        seen.add(model.profile)
        print(f"{model.profile}: {head}")
        for (stage, instruction), curve in sorted(load_profile(profile_path(model.profile)).items()):
            if stage not in (0, 7):
                continue  # stages 1 to 6 hold the rows of stage 0
            for title, errors in (
                ("left-out clocks", left_out_errors(curve)),
                ("fitted form", fit_errors(curve, float(model.clock_max_mhz))),
            ):
                pairs = (
                    (errors.time_mean, errors.time_max),
                    (errors.power_mean, errors.power_max),
                    (errors.energy_mean, errors.energy_max),
                )
                cells = "".join(f"{100 * mean:8.2f} /{100 * most:5.2f}" for mean, most in pairs)
                print(f"  stage {stage} {instruction:9} {title:16} {errors.clocks:3} clocks{cells}")
            f = fit(curve, float(model.clock_max_mhz))
            share = f.a_s / f.time_s(model.clock_max_mhz)
            print(
                f"    t = {f.a_s:.3f} s + {f.b_s_mhz:.1f} / min(f, {f.clock_cap_mhz:.0f}) "
                f"(fixed share {100 * share:.0f} %), P = {f.static_w:.0f} W + {f.dynamic_w:.0f} W x V^2, "
                f"V from {f.voltage_floor:.2f} at knee {f.voltage_knee:.2f}"
            )


def _print_limits() -> None:
    from powerd.sim.kernels import generic_curve, profile_path
    from powerd.sim.models import MODELS, to_c

    for key, name in (("a100-pcie", "a100"), ("a40", "a40")):
        model = MODELS[key]
        curve, target = generic_curve(model, "gemm"), to_c(model).cap_target
        for job, rows in load_limit_sweep(profile_path(f"power_limits/power_limit_sweep_{name}.csv")).items():
            points = limit_response(curve, rows, target, model.blocked_w, BUSY_SHARE[key])
            print(f"{key}, kernel gemm against {job} (time and energy relative to {points[0].limit_w:.0f} W):")
            for p in points[1:]:
                print(
                    f"  {p.limit_w:4.0f} W  time {p.time:.3f} modelled {p.modelled_time:.3f}"
                    f"  energy {p.energy:.3f} modelled {p.modelled_energy:.3f}"
                )


def main() -> int:
    """Print the errors of tables of every second clock and of fitted forms, and of the response to power limits."""
    _print_profiles()
    _print_limits()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
