"""What Kubernetes' horizontal pod autoscaler makes of a metric: its formula, its tolerance and its scale-down window.

House rules: pure; the formula is that of an external metric with ``AverageValue``; figures that Kubernetes lets an operator set
are arguments, with its defaults.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final

TOLERANCE: Final = 0.1
SCALE_DOWN_WINDOW_S: Final = 300.0


def desired_replicas(metric: float, current: int, target: float = 1.0, tolerance: float = TOLERANCE) -> int:
    """Return the replicas that the HPA asks for: nothing changes while metric / (target x current) is 1 +- ``tolerance``.

    From zero replicas it does not start any: that is KEDA's part (``IsActive``).
    """
    if current == 0:
        return 0
    ratio = metric / (target * current)
    # Kubernetes compares floats likewise: 0.1 away is within the tolerance.
    if 1.0 - tolerance <= ratio <= 1.0 + tolerance:
        return current
    return math.ceil(metric / target)


def acted_on(desired: int, current: int, tolerance: float = TOLERANCE) -> int:
    """Return the smallest metric from ``desired`` up that the HPA does not ignore; ``desired`` itself unless it must grow.

    With a tolerance of 0.1, 11 replicas that shall be 12 stay 11; a metric of 13 makes them 13. Shrinking by less than that
    is left undone: it costs energy, not requests.
    """
    if not 0 < current < desired:
        return desired
    metric = desired
    while desired_replicas(metric, current, tolerance=tolerance) == current:
        metric += 1
    return metric


class Hpa:
    """One autoscaler over time: the formula, then the highest recommendation of the scale-down window."""

    def __init__(self, replicas: int, tolerance: float = TOLERANCE, scale_down_window_s: float = SCALE_DOWN_WINDOW_S) -> None:
        self.replicas = replicas
        self._tolerance, self._window_s = tolerance, scale_down_window_s
        self._recommended: deque[tuple[float, int]] = deque()

    def update(self, now_s: float, metric: float) -> int:
        """Take a reading and return the replicas then."""
        wanted = desired_replicas(metric, self.replicas, tolerance=self._tolerance)
        self._recommended.append((now_s, wanted))
        while self._recommended[0][0] < now_s - self._window_s:
            self._recommended.popleft()
        if wanted < self.replicas:
            wanted = min(self.replicas, max(count for _, count in self._recommended))
        self.replicas = wanted
        return wanted
