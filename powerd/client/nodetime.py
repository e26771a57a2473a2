"""The node's time as a guest process reads it: CLOCK_BOOTTIME, or a simulated node's clock inside ``powerd sim run``.

House rules: found once per process; a look costs about a microsecond and asks nobody.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache


def _boottime_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@cache
def _source() -> Callable[[], int]:
    if not os.environ.get("POWERD_SIM_STATE"):
        return _boottime_ns
    from powerd.clock import from_environment

    return from_environment().now_ns


def node_now_ns() -> int:
    """Nanoseconds of the node's CLOCK_BOOTTIME."""
    return _source()()
