"""How ranks talk: one collective call at step ends that all of them agree on.

House rules: values are what JSON can say; every rank hears the same list in the same sequence; the first of it is the planner's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Exchange(Protocol):
    """A collective: called by every rank of the job at the same step ends."""

    def gather(self, value: Any) -> Sequence[Any]:
        """Every rank's value, in the same sequence everywhere; waits for them; an exception turns this rank's conducting off."""


class Alone:
    """A job of one rank."""

    def gather(self, value: Any) -> Sequence[Any]:
        return [value]
