"""The campaign itself: what it calls a broken promise, and what it does not."""

from __future__ import annotations

import time
from typing import Any, cast

import pytest

from tests.faults.campaign import hold
from tests.faults.rig import BASELINE, LIVE_CLOCKS, LIVE_LIMITS, BrokenPromiseError

LIMIT, CLOCK = min(set(LIVE_LIMITS) - {BASELINE[0]}), min(c for c in LIVE_CLOCKS if c != BASELINE[1])


class Looked:
    """A node that is read as ``found``, one after the other, the last for ever."""

    def __init__(self, leases: int, *found: tuple[Any, Any]) -> None:
        self._leases, self._found = leases, list(found)

    def read(self) -> tuple[Any, Any]:
        return self._found.pop(0) if len(self._found) > 1 else self._found[0]

    def live_leases(self) -> int:
        return self._leases

    def truth(self) -> str:
        return "as read"


def look(*found: tuple[Any, Any], leases: int) -> None:
    hold(cast(Any, Looked(leases, *found)), time.monotonic(), 0.0)


def test_baseline_and_the_values_of_a_live_lease_are_as_promised() -> None:
    look(BASELINE, leases=0)
    look((LIMIT, CLOCK), leases=1)


def test_a_lease_that_ends_at_that_moment_has_its_own_time_to_be_undone() -> None:
    look((LIMIT, BASELINE[1]), (LIMIT, BASELINE[1]), BASELINE, leases=0)


@pytest.mark.parametrize(("found", "leases"), [((LIMIT, CLOCK), 0), ((LIMIT, BASELINE[1]), 0), ((1, BASELINE[1]), 1)])
def test_what_nobody_holds_and_nobody_undoes_is_a_broken_promise(found: tuple[Any, Any], leases: int) -> None:
    with pytest.raises(BrokenPromiseError):
        look(found, leases=leases)
