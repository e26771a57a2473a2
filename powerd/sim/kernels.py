"""The kernels a simulated node knows: measured stage profiles, and generic shapes for every model.

House rules: a kernel is a table clock -> (units per second, watts), compiled here, only interpolated by the driver;
generic kernels are fitted or assumed forms scaled to the model and are labelled so; names are `profile/stage/part`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from powerd.resources import folder
from powerd.sim.calibration import Curve, Point, choose, extend, load_profile, voltage
from powerd.sim.layout import NAME, POINTS, Kernel
from powerd.sim.models import GpuModel

# name -> (clock-independent share of time, share of the stress power, share of time waiting for memory). Assumed.
GENERIC: dict[str, tuple[float, float, float]] = {
    "gemm": (0.05, 1.0, 0.1),
    "prefill": (0.03, 0.95, 0.1),
    "decode": (0.77, 0.45, 0.8),
    "mixed": (0.4, 0.7, 0.5),
}


def profile_path(name: str) -> Path:
    """A shipped profile, in a checkout or in an installed wheel; raises FileNotFoundError."""
    path = folder("profiles") / name
    if not path.is_file():
        raise FileNotFoundError(f"there is no profile {name} in {path.parent}")
    return path


def generic_curve(model: GpuModel, name: str) -> Curve:
    """A generic kernel of a model: one unit takes one second at the top clock."""
    fixed, power_share, _ = GENERIC[name]
    top, floor, knee = model.clock_max_mhz, model.voltage_floor, model.voltage_knee
    clocks = range(model.clock_min_mhz, top + 1, model.clock_step_mhz)
    full_w = model.context_idle_w + power_share * (model.stress_w - model.context_idle_w)
    static_w = model.static_w
    points = []
    for clock in clocks:
        x = clock / top
        time_s = fixed + (1 - fixed) / x
        points.append(Point(float(clock), time_s, static_w + (full_w - static_w) * x * voltage(x, floor, knee) ** 2))
    return tuple(points)


def compile_kernel(name: str, curve: Curve, memory_share: float) -> Kernel:
    """Turn a curve into the table that the driver reads; raises ValueError if it does not fit."""
    if len(name.encode()) >= NAME or not 2 <= len(curve) <= POINTS:
        raise ValueError(f"kernel {name!r}: a name under {NAME} bytes and 2..{POINTS} clocks are needed")
    out = Kernel(name=name.encode(), points=len(curve), memory_share=memory_share)
    for index, point in enumerate(curve):
        out.clock_mhz[index] = point.clock_mhz
        out.units_per_s[index] = 1.0 / point.time_s
        out.power_w[index] = point.power_w
    return out


def node_curves(
    model: GpuModel, profiles: dict[str, Path] | None = None, fit_on: str | Iterable[int] | None = None
) -> dict[str, tuple[Curve, float]]:
    """Return every kernel of a node: name -> (curve over the model's whole clock range, memory share)."""
    fit_on = fit_on if fit_on is None or isinstance(fit_on, str) else tuple(fit_on)
    out = {name: (generic_curve(model, name), row[2]) for name, row in GENERIC.items()}
    shipped = {"gpt3-175b": profile_path(model.profile)} if model.profile else {}
    for profile, path in {**shipped, **(profiles or {})}.items():
        for (stage, instruction), curve in load_profile(path).items():
            whole = extend(choose(curve, fit_on), model.clock_min_mhz, model.clock_max_mhz)
            out[f"{profile}/{stage}/{instruction}"] = (whole, 0.1)
    return out
