"""Which value a control may really get: the wish, cut to the site's limits and snapped to what the device supports.

House rules: pure; continuous values are clamped, a control that a GPU does not have is refused; the site's limits are checked
here again whatever powerd asked for.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from powerd.config import BaselineConfig, LimitsConfig
from powerd.errors import DeviceError
from powerd.model import Capabilities, Control, Interval

_CLOCKS = {Control.SM_CLOCK: "sm_clock", Control.MEMORY_CLOCK: "memory_clock"}


def site_interval(control: Control, limits: LimitsConfig) -> Interval:
    """The site's own bounds of a control; open ends are the widest there are."""
    if control is Control.POWER_LIMIT:
        low, high = round(limits.power_limit_min_w * 1000), round(limits.power_limit_max_w * 1000)
    else:
        name = _CLOCKS[control]
        low, high = getattr(limits, f"{name}_min_mhz"), getattr(limits, f"{name}_max_mhz")
    return Interval(low, high or 2**31 - 1)


def snap(value: Interval, table: tuple[int, ...]) -> Interval:
    """The widest interval of supported clocks inside ``value``; the nearest lower clock when none lies inside."""
    high_index = max(0, bisect_right(table, value.high) - 1)
    low_index = min(bisect_left(table, value.low), high_index)
    return Interval(table[low_index], table[high_index])


def admit(wish: Interval, control: Control, capabilities: Capabilities, limits: LimitsConfig) -> Interval:
    """What the driver will be told for a wish; DeviceError when the control or any permitted value is missing."""
    support, device = capabilities.controls[control], capabilities.interval(control)
    if not support.available or device is None:
        code = "no_permission" if "CAP_SYS_ADMIN" in support.reason else "not_supported"
        raise DeviceError(f"{control.value}: {support.reason or 'not offered by this GPU'}", code=code)
    allowed = device.meet(site_interval(control, limits))
    if allowed is None:
        raise DeviceError(f"{control.value}: the site's limits and the device's range do not meet", code="bad_value")
    if control is Control.POWER_LIMIT:
        value = min(max(wish.high, allowed.low), allowed.high)
        return Interval(value, value)
    table = capabilities.sm_clocks_mhz if control is Control.SM_CLOCK else capabilities.memory_clocks_mhz
    permitted = tuple(clock for clock in table if clock in allowed)
    if not permitted:
        raise DeviceError(f"{control.value}: no supported clock lies within the site's limits", code="bad_value")
    return snap(Interval(max(wish.low, permitted[0]), max(wish.high, permitted[0])), permitted)


def declared_baseline(control: Control, baseline: BaselineConfig) -> Interval | None:
    """The baseline that the configuration declares, ``None`` when it leaves it to what is found (clocks: unlocked)."""
    if control is Control.POWER_LIMIT:
        value = round(baseline.power_limit_w * 1000)
        return Interval(value, value) if value else None
    name = _CLOCKS[control]
    low, high = getattr(baseline, f"{name}_min_mhz"), getattr(baseline, f"{name}_max_mhz")
    return Interval(low, high or 2**31 - 1) if low or high else None


def fallback_baseline(control: Control, capabilities: Capabilities, baseline: BaselineConfig) -> Interval | None:
    """Baseline when what was found is not known any more: declared, else NVML's default, never a value found now."""
    declared = declared_baseline(control, baseline)
    if declared is not None or control is not Control.POWER_LIMIT:
        return declared
    default_mw = capabilities.power_limit_default_mw
    return None if default_mw is None else Interval(default_mw, default_mw)


def shown(value: Interval | None, control: Control) -> str:
    """A value for people."""
    if value is None:
        return "unlocked"
    return f"{value.high if value.low == value.high else f'{value.low}..{value.high}'} {control.unit}"
