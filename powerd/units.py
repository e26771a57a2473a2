"""Quantities as people write them: ``300W``, ``1.2GHz``, ``500J``, ``10m`` -> numbers in powerd's units.

House rules: a plain number is refused where its unit could be misread; the message shows what to write; nothing is rounded away
in silence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from powerd.errors import RequestError

_QUANTITY = re.compile(r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*([a-zA-Zµ]*)\s*")
_POWER_MW = {"mw": 1.0, "w": 1e3, "kw": 1e6}
_CLOCK_MHZ = {"hz": 1e-6, "khz": 1e-3, "mhz": 1.0, "ghz": 1e3}
_ENERGY_J = {"mj": 1e-3, "j": 1.0, "kj": 1e3, "wh": 3600.0, "kwh": 3.6e6}
_TIME_S = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
#: Case decides here and people rarely mean the small one.
_LOOKALIKES = {"MW": "mW or kW", "MJ": "mJ or kJ", "mHz": "MHz", "M": "m (minutes)", "S": "s"}


def _parse(text: str, what: str, units: Mapping[str, float], example: str) -> float:
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise RequestError(f"{text!r} is not a {what}", hint=f"write it like {example}", code="bad_value")
    number, unit = float(match[1]), match[2]
    if not unit:
        raise RequestError(f"{text!r} has no unit: is it a {what}?", hint=f"write it like {example}", code="bad_value")
    if unit in _LOOKALIKES:
        raise RequestError(f"{text!r}: unit {unit} is ambiguous", hint=f"write {_LOOKALIKES[unit]}", code="bad_value")
    if (factor := units.get(unit.lower())) is None:
        known = ", ".join(units)
        raise RequestError(
            f"{text!r}: {unit} is no unit of a {what}", hint=f"write it like {example} ({known})", code="bad_value"
        )
    value = number * factor
    if not value > 0 or not math.isfinite(value):
        raise RequestError(f"{text!r}: a {what} is above zero", hint=f"write it like {example}", code="bad_value")
    return value


def power_mw(text: str) -> int:
    """``300W``, ``0.3kW`` -> milliwatts; RequestError for anything else."""
    return round(_parse(text, "power", _POWER_MW, "300W"))


def clock_mhz(text: str) -> int:
    """``1200MHz``, ``1.2GHz`` -> whole megahertz; RequestError for anything else."""
    value = _parse(text, "clock", _CLOCK_MHZ, "1200MHz")
    if round(value) < 1 or abs(value - round(value)) > 1e-6:
        raise RequestError(f"{text!r} is not a whole number of MHz", hint="write it like 1200MHz", code="bad_value")
    return round(value)


def energy_j(text: str) -> float:
    """``500J``, ``1kWh`` -> joules; RequestError for anything else."""
    return _parse(text, "energy", _ENERGY_J, "500J")


def duration_s(text: str) -> float:
    """``90s``, ``10m``, ``1.5h``, also added up as ``1h30m`` -> seconds; RequestError for anything else."""
    parts = re.findall(r"[\d.]+\s*[a-zA-Z]+", text)
    if len(parts) > 1 and re.sub(r"\s+", "", "".join(parts)) == re.sub(r"\s+", "", text):
        return sum(_parse(part, "duration", _TIME_S, "10m") for part in parts)
    return _parse(text, "duration", _TIME_S, "10m")


def share(text: str) -> float:
    """``5%`` or ``0.05`` -> 0.05; a plain number of 1 or more is refused as it could mean either."""
    body = text.strip()
    try:
        value = float(body[:-1]) / 100 if body.endswith("%") else float(body)
    except ValueError:
        raise RequestError(f"{text!r} is not a share", hint="write it like 5%", code="bad_value") from None
    if not 0 <= value < 1:
        raise RequestError(f"{text!r} is not a share between 0 and 100 %", hint="write it like 5%", code="bad_value")
    return value


def watts(power_mw_value: int | None) -> str:
    """Milliwatts for people, ``-`` when unknown."""
    return "-" if power_mw_value is None else f"{power_mw_value / 1000:.0f} W"


def megahertz(clock_mhz_value: int | None) -> str:
    """Megahertz for people, ``-`` when unknown."""
    return "-" if clock_mhz_value is None else f"{clock_mhz_value} MHz"


def joules(energy_j_value: float | None) -> str:
    """Joules for people in a readable scale, ``-`` when unknown."""
    if energy_j_value is None or not math.isfinite(energy_j_value):
        return "-"
    if abs(energy_j_value) >= 3.6e6:
        return f"{energy_j_value / 3.6e6:.3f} kWh"
    return f"{energy_j_value / 1000:.2f} kJ" if abs(energy_j_value) >= 10_000 else f"{energy_j_value:.1f} J"
