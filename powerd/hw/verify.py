"""From readings to verdicts: did a setting take effect, who overrides it, has somebody else changed it.

House rules: pure; NVML_SUCCESS proves nothing; a clock is only judged under load and after it had time to settle.
"""

from __future__ import annotations

from dataclasses import dataclass

from powerd.clock import NS
from powerd.hw.port import REASON_IDLE
from powerd.model import Interval, Reading, Verdict, reason_names

SETTLE_NS = NS // 10  # a clock switch took at most a few tens of milliseconds on every GPU measured
PATIENCE_NS = 2 * NS  # a clock outside its lock for this long, under load, is a fact
_CLOCK_SLACK_MHZ = 20  # real clocks differ a step from their table entry
_LIMIT_SLACK_MW = 1_000


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look at the GPU says; ``drift`` means that the setting itself is gone."""

    verdict: Verdict
    detail: str = ""
    enforced: int | None = None
    observed: int | None = None
    drift: bool = False


def limit(value_mw: int, requested_mw: int | None, enforced_mw: int | None) -> Finding:
    """Judge a power limit by what the driver reads back."""
    if requested_mw is None and enforced_mw is None:
        return Finding(Verdict.PENDING, "the driver does not read limits back")
    if requested_mw is not None and abs(requested_mw - value_mw) > _LIMIT_SLACK_MW:
        return Finding(Verdict.OVERRIDDEN, f"limit reads {requested_mw} mW: changed by another program", enforced_mw, drift=True)
    if enforced_mw is not None and abs(enforced_mw - value_mw) > _LIMIT_SLACK_MW:
        return Finding(Verdict.OVERRIDDEN, f"out of band: the board enforces {enforced_mw} mW", enforced_mw)
    return Finding(Verdict.APPLIED, "", enforced_mw)


def _under_load(reading: Reading) -> bool:
    if reading.clock_event_reasons is not None and reading.clock_event_reasons & REASON_IDLE:
        return False
    return reading.utilization_percent is None or reading.utilization_percent > 0


def clock(value: Interval, observed_mhz: int | None, reading: Reading, set_ns: int) -> Finding:
    """Judge a clock lock by one reading; only a reading taken under load and after SETTLE_NS says anything."""
    if observed_mhz is None or reading.time_ns < set_ns + SETTLE_NS or not _under_load(reading):
        return Finding(Verdict.PENDING_LOAD, "no load to observe it by")
    if value.low - _CLOCK_SLACK_MHZ <= observed_mhz <= value.high + _CLOCK_SLACK_MHZ:
        return Finding(Verdict.APPLIED, observed=observed_mhz)
    settled = reading.time_ns >= set_ns + PATIENCE_NS
    if observed_mhz > value.high:
        if not settled:
            return Finding(Verdict.PENDING_LOAD, "the clock is still moving", observed=observed_mhz)
        detail = f"runs at {observed_mhz} MHz: the lock is gone, removed by another program or a driver reload"
        return Finding(Verdict.OVERRIDDEN, detail, observed=observed_mhz, drift=True)
    who = [n for n in reason_names(reading.clock_event_reasons or 0) if n not in ("gpu_idle", "applications_clocks")]
    if not who and not settled:
        return Finding(Verdict.PENDING_LOAD, "the clock is still moving", observed=observed_mhz)
    return Finding(Verdict.OVERRIDDEN, f"by {', '.join(who) or 'a limit that NVML does not name'}", observed=observed_mhz)
