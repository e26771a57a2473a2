"""Whether a change of the fleet pays: its saving over the time that it will last against what it costs.

House rules: pure; the answer says both sums, so that an operator can check it; a change that the SLO needs is never asked here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from powerd_policies.dynamollm.overheads import Overheads
from powerd_policies.dynamollm.pool import Shape
from powerd_policies.dynamollm.reshard import plan_reshard

RESHARD_EVERY_S: Final = 300.0  # at most one re-shard of an instance in this time


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether to act, and the sums behind it."""

    act: bool
    saves_j: float
    costs_j: float
    why: str


@dataclass(slots=True)
class Gate:
    """Lets a change pass that saves ``factor`` times its cost within ``horizon_s``, not sooner than the last one allows."""

    horizon_s: float = 600.0
    factor: float = 1.0
    every_s: float = RESHARD_EVERY_S
    _last_s: dict[str, float] = field(default_factory=dict)

    def ask(self, now_s: float, subject: str, saves_w: float, costs_j: float) -> Verdict:
        """Judge a change of ``subject`` that saves ``saves_w`` watts from then on; nothing is remembered."""
        saves_j = saves_w * self.horizon_s
        since = now_s - self._last_s.get(subject, -1e18)
        if since < self.every_s:
            return Verdict(False, saves_j, costs_j, f"changed {since:.0f} s ago, at most once in {self.every_s:.0f} s")
        if saves_j <= self.factor * costs_j:
            return Verdict(
                False,
                saves_j,
                costs_j,
                f"saves {saves_j / 1e3:.0f} kJ within {self.horizon_s:.0f} s, costs {costs_j / 1e3:.0f} kJ",
            )
        return Verdict(
            True, saves_j, costs_j, f"saves {saves_j / 1e3:.0f} kJ within {self.horizon_s:.0f} s for {costs_j / 1e3:.0f} kJ"
        )

    def did(self, now_s: float, subject: str) -> None:
        """Remember that ``subject`` was changed."""
        self._last_s[subject] = now_s


def reshard_j(
    have: Mapping[str, Mapping[int, int]],
    want: Mapping[str, Sequence[Shape]],
    gpus: int,
    overheads: Overheads,
    weights_bytes: int,
    gpu_w: float,
) -> float:
    """Return the joules of getting from ``have`` (pool: parallelism: count) to ``want`` with ``gpus`` GPUs of ``gpu_w`` watts.

    New instances start on GPUs that are free; those for which there are none take over GPUs, and move the bytes that a matching
    of GPUs and ranks leaves to be moved.
    """
    olds, news = [], []
    for pool in {*have, *want}:
        now, then = have.get(pool, {}), {shape.tp: shape.count for shape in want.get(pool, ())}
        for tp in sorted({*now, *then}):
            change = then.get(tp, 0) - now.get(tp, 0)
            olds += [tp] * -change
            news += [tp] * change
    free = gpus - sum(tp * count for own in have.values() for tp, count in own.items())
    joules, turned = 0.0, []
    for tp in sorted(news):
        if tp <= free:
            free -= tp
            joules += tp * gpu_w * overheads.start_s()
        else:
            turned.append(tp)
    if turned and olds:
        layout = tuple(tuple(f"{n}/{rank}" for rank in range(tp)) for n, tp in enumerate(olds))
        plan = plan_reshard(layout, turned, weights_bytes=weights_bytes, spare=[f"free/{n}" for n in range(free)])
        takes_s = max(overheads.reshard_s(old, new, plan.busiest_bytes) for old in olds for new in turned)
        joules += sum(turned) * gpu_w * takes_s
    return joules
