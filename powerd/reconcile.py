"""Wants + capabilities + site limits + what was before -> the setpoint of every (GPU, control), with everything that led there.

House rules: pure and independent of the order of wants; a want that cannot be served is in ``refused``, never silently dropped;
no result leaves a limit of a higher class (docs/decisions/0003-reconcile-rule.md).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from powerd.config import LimitsConfig
from powerd.model import Capabilities, Control, Interval, Refusal, Setpoint, Want, WantClass

Key = tuple[str, Control]
UNBOUNDED = 0xFFFFFFFF  # NVML counts in unsigned 32-bit integers


@dataclass(frozen=True, slots=True)
class Held:
    """What the rule remembers of one (GPU, control) between two calls."""

    value: Interval | None
    sources: frozenset[str]
    last_down_ns: int | None


@dataclass(frozen=True, slots=True)
class Reconciled:
    """The setpoints and the memory for the next call."""

    setpoints: Mapping[Key, Setpoint]
    held: Mapping[Key, Held]

    def next_due_ns(self) -> int | None:
        """When a deferred step down may be taken, or ``None``."""
        return min((s.deferred_until_ns for s in self.setpoints.values() if s.deferred_until_ns is not None), default=None)


def site_interval(limits: LimitsConfig, control: Control) -> Interval | None:
    """The site's own bounds for a control in its NVML unit, or ``None`` when there are none."""
    low, high = {
        Control.POWER_LIMIT: (round(limits.power_limit_min_w * 1000), round(limits.power_limit_max_w * 1000)),
        Control.SM_CLOCK: (limits.sm_clock_min_mhz, limits.sm_clock_max_mhz),
        Control.MEMORY_CLOCK: (limits.memory_clock_min_mhz, limits.memory_clock_max_mhz),
    }[control]
    return Interval(low, high or UNBOUNDED) if low or high else None


def site_wants(limits: LimitsConfig, uuids: Iterable[str]) -> list[Want]:
    """The site's limits as wants of class SITE_LIMIT: they bound, but by themselves set nothing."""
    return [
        Want("site", uuid, control, interval, WantClass.SITE_LIMIT, "site limits")
        for uuid in uuids
        for control in Control
        if (interval := site_interval(limits, control)) is not None
    ]


def snap(interval: Interval, supported: tuple[int, ...], *, bound: bool = False) -> Interval | None:
    """The interval on supported clocks, never above its ceiling; ``None`` when there is no clock for it.

    A wish between two clocks gets the lower one; a bound (site limit) does not, because that would leave it.
    """
    above = bisect_right(supported, interval.high)
    if above == 0:
        return None
    high = supported[above - 1]
    below = bisect_left(supported, interval.low)
    low = supported[below] if below < len(supported) else high + 1
    if low <= high:
        return Interval(low, high)
    beyond = interval.low > supported[-1]  # a floor above the highest clock cannot be served
    return None if bound or beyond else Interval(high, high)


def _fit(want: Want, capabilities: Capabilities) -> Interval | None:
    device = capabilities.interval(want.control)
    if device is None:
        return None
    if want.control is Control.POWER_LIMIT:
        return want.interval.meet(device)
    table = capabilities.sm_clocks_mhz if want.control is Control.SM_CLOCK else capabilities.memory_clocks_mhz
    return snap(want.interval, table, bound=want.want_class is WantClass.SITE_LIMIT)


def _rank(want: Want) -> tuple[int, int, int, str, int, str, int]:
    # Within a class the lower ceiling goes first and so wins; the rest only makes the order total.
    dwell = -1 if want.min_dwell_ns is None else want.min_dwell_ns
    return (want.want_class, want.interval.high, want.since_ns, want.source, want.interval.low, want.reason, dwell)


def _range(interval: Interval, control: Control) -> str:
    unit, scale = ("W", 1000) if control is Control.POWER_LIMIT else ("MHz", 1)
    low, high = interval.low / scale, interval.high / scale
    return f"{high:g} {unit}" if low == high else f"{low:g}..{high:g} {unit}"


def _ceiling(value: Interval | None, capabilities: Capabilities, control: Control) -> int:
    """The upper end that a value means; the baseline (None) counts as the default limit or as unlocked."""
    if value is not None:
        return value.high
    if control is Control.POWER_LIMIT and capabilities.power_limit_default_mw is not None:
        return capabilities.power_limit_default_mw
    return UNBOUNDED


def _pin(interval: Interval, capabilities: Capabilities) -> Interval:
    """One power limit out of an interval: the one nearest to the default, so that a mere ceiling never raises a limit."""
    default = capabilities.power_limit_default_mw
    value = interval.high if default is None else min(max(default, interval.low), interval.high)
    return Interval(value, value)


def _settle(
    key: Key, wants: list[Want], capabilities: Capabilities | None, before: Held, now_ns: int, dwell_ns: int
) -> tuple[Setpoint, Held]:
    uuid, control = key
    considered = tuple(sorted(wants, key=_rank))
    support = None if capabilities is None else capabilities.controls.get(control)
    device = None if capabilities is None else capabilities.interval(control)
    if capabilities is None or support is None or not support.available or device is None:
        why = "no such GPU on this node" if capabilities is None else (support and support.reason) or "not supported by this GPU"
        refused = tuple(Refusal(w, why) for w in considered if w.want_class is not WantClass.SITE_LIMIT)
        held = Held(None, frozenset(), before.last_down_ns)
        return Setpoint(uuid, control, None, considered=considered, refused=refused, reason="baseline"), held

    interval, hard, hard_wanted = device, device, False
    refusals: list[Refusal] = []
    admitted: list[Want] = []
    winner: Want | None = None
    tight = False  # whether the winner set the ceiling; a mere floor wins only when nobody did
    shaper = "the device"  # for what losers are told
    blocked = False
    for want in considered:
        fitted = None if blocked else _fit(want, capabilities)
        met = None if fitted is None else interval.meet(fitted)
        if met is None:
            blocked = blocked or want.want_class is WantClass.SITE_LIMIT
            if blocked:
                why = f"the site limits leave nothing of {_range(interval, control)}"
            elif fitted is None:
                why = f"{_range(want.interval, control)} is outside the device's {_range(device, control)}"
            else:
                why = f"{_range(want.interval, control)} is outside the {_range(interval, control)} that {shaper} leaves"
            refusals.append(Refusal(want, why))
            continue
        if met != interval:
            shaper = f"{want.source} ({want.want_class.name.lower()}: {want.reason})"
        if want.want_class is not WantClass.SITE_LIMIT:
            admitted.append(want)
            if winner is None or met.high < interval.high or (met != interval and not tight):
                winner, tight = want, met.high < interval.high
        interval = met
        if want.want_class < WantClass.LEASE:
            hard, hard_wanted = met, hard_wanted or want.want_class is not WantClass.SITE_LIMIT
    refused = tuple(refusals)
    if winner is None:
        held = Held(None, frozenset(), before.last_down_ns)
        return Setpoint(uuid, control, None, considered=considered, refused=refused, reason="baseline"), held

    def ceiling(value: Interval | None) -> int:
        return _ceiling(value, capabilities, control)

    def settled(allowed: Interval) -> Interval:
        return _pin(allowed, capabilities) if control is Control.POWER_LIMIT else allowed

    value: Interval | None = settled(interval)
    deferred_until_ns = None
    if ceiling(value) < ceiling(before.value) and before.last_down_ns is not None:
        until_ns = before.last_down_ns + (dwell_ns if winner.min_dwell_ns is None else winner.min_dwell_ns)
        # What holds meanwhile: what is set now if somebody still backs it, and always what the hard limits alone would set.
        backed = before.value is not None and not before.sources.isdisjoint(w.source for w in considered)
        kept = before.value.meet(hard) if before.value is not None and backed else None
        meanwhile = kept or (settled(hard) if hard_wanted else None)
        if now_ns < until_ns and ceiling(meanwhile) > ceiling(value):
            deferred_until_ns, value = until_ns, meanwhile
    last_down_ns = now_ns if ceiling(value) < ceiling(before.value) else before.last_down_ns
    sources = before.sources if deferred_until_ns is not None and backed else frozenset(w.source for w in admitted)
    setpoint = Setpoint(
        uuid, control, value, winner=winner.source, reason=winner.reason, considered=considered, refused=refused,
        deferred_until_ns=deferred_until_ns,
    )  # fmt: skip
    return setpoint, Held(value, sources, last_down_ns)


def reconcile(
    wants: Iterable[Want],
    capabilities: Mapping[str, Capabilities],
    limits: LimitsConfig,
    previous: Mapping[Key, Held],
    now_ns: int,
    min_dwell_ns: int,
) -> Reconciled:
    """The setpoint of every wanted (GPU, control); a pair that is not in the result is at baseline.

    Intersects by class order (safety, site limit, budget, lease, policy, default); whoever would empty the interval is refused
    and told; within a class the lower ceiling wins; steps down wait for the dwell, steps up and hard limits never do.
    """
    by_key: dict[Key, list[Want]] = {}
    for want in wants:
        by_key.setdefault((want.uuid, want.control), []).append(want)
    site = {(w.uuid, w.control): w for w in site_wants(limits, {uuid for uuid, _ in by_key})}
    setpoints: dict[Key, Setpoint] = {}
    held: dict[Key, Held] = {}
    nothing = Held(None, frozenset(), None)
    for key in sorted(by_key):
        everything = by_key[key] + ([site[key]] if key in site else [])
        before = previous.get(key, nothing)
        setpoints[key], held[key] = _settle(key, everything, capabilities.get(key[0]), before, now_ns, min_dwell_ns)
    for key, before in previous.items():
        if key not in held and before.last_down_ns is not None and now_ns - before.last_down_ns < min_dwell_ns:
            held[key] = Held(None, frozenset(), before.last_down_ns)  # the dwell outlives a lease, or flapping would be free
    return Reconciled(setpoints, held)
