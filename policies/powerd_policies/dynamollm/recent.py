"""What arrived in the last seconds, by class: the controllers' short memory.

House rules: only what was observed; rates are means over what was covered, so a young memory does not read as little load.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from powerd_policies.dynamollm.fleet import ClassLoad
from powerd_policies.dynamollm.predictor import Rate


class Recent:
    """Keeps ``keep_s`` seconds of arrivals."""

    def __init__(self, keep_s: float) -> None:
        self.keep_s = keep_s
        self.covered_s = 0.0
        self._windows: deque[tuple[float, float, Mapping[str, ClassLoad]]] = deque()

    def add(self, now_s: float, window_s: float, arrivals: Mapping[str, ClassLoad]) -> None:
        """Take in one window that ends at ``now_s``."""
        if window_s <= 0 or (self._windows and now_s <= self._windows[-1][0]):
            return
        self._windows.append((now_s, window_s, arrivals))
        while self._windows[0][0] <= now_s - self.keep_s:
            self._windows.popleft()
        self.covered_s += window_s

    def rates(self, span_s: float) -> dict[str, Rate]:
        """Return the mean rates of the last ``span_s`` seconds; empty before anything was seen."""
        if not self._windows:
            return {}
        end_s, covered_s = self._windows[-1][0], 0.0
        sums: dict[str, list[float]] = {}
        for now_s, window_s, arrivals in reversed(self._windows):
            if now_s <= end_s - span_s:
                break
            covered_s += window_s
            for name, load in arrivals.items():
                own = sums.setdefault(name, [0.0, 0.0, 0.0])
                own[0] += load.requests
                own[1] += load.prompt_tokens
                own[2] += load.output_tokens
        return {name: Rate(a / covered_s, b / covered_s, c / covered_s) for name, (a, b, c) in sums.items()}
