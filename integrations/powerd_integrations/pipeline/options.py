"""What a training engineer may choose; every default is meant to be kept.

House rules: refused where they are stated, not in the middle of training; units in names.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from powerd.errors import RequestError


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/powerd/profiles``: put it on storage that all nodes share, so that a job may restart anywhere."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "powerd" / "profiles"


@dataclass(frozen=True, slots=True)
class Options:
    """How Perseus conducts one job.

    ``slowdown`` is the share by which an iteration may take longer than at full clocks (0.05: five percent).
    ``background=False`` does everything in the calling thread, for stepped simulation.
    """

    slowdown: float = 0.0
    iterations_per_clock: int = 5
    settle_iterations: int = 1  # after each change of clock, not measured
    clock_stride: int = 2  # measure every second clock of the GPU's list
    lowest_clock_mhz: int | None = None
    highest_clock_mhz: int | None = None
    rises: int = 5  # stop when energy has risen so many clocks in a row
    cache: Path | None = field(default_factory=default_cache)  # None: never kept
    tolerance: float = 0.03  # what counts as slow, as a share
    patience: int = 3  # for so many exchanges in a row
    exchange_steps: int = 2  # ranks exchange their times every so many steps
    blocking_power_w: float | None = None  # None: measured
    switch_latency_s: float = 0.006  # from a beat to its clock; the driver changes one GPU's clock of a node at a time
    ranks_per_node: int = 8
    safe_clock_mhz: int | None = None  # holds when the plan does not; None: the highest
    job: str = "training"
    report: bool = True  # tell the daemon of every step, for powerctl jobs and the store
    first_step: int = 0  # training goes on after this step of an earlier start
    plan_locally: bool | None = None  # None: where powerd[plan] is installed, else the daemon plans
    background: bool = True

    def __post_init__(self) -> None:
        for name, low, high in (
            ("slowdown", 0.0, 10.0), ("iterations_per_clock", 1, 1000), ("settle_iterations", 1, 1000),
            ("clock_stride", 1, 1000), ("rises", 1, 1000), ("tolerance", 0.001, 1.0), ("patience", 1, 1000),
            ("exchange_steps", 1, 100000), ("first_step", 0, 1 << 60),
            ("switch_latency_s", 0.0, 10.0), ("ranks_per_node", 1, 1024),
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
                raise RequestError(f"{name}={value!r} is not within {low}..{high}", code="bad_value")
        if not self.job or len(self.job) > 64 or not self.job.isprintable():
            raise RequestError(f"job={self.job!r} is not a name of 1 to 64 printable characters", code="bad_value")
