"""The autoscaling policy of one deployment: as many replicas as the plan wants.

House rules: Serve's controller calls it about ten times a second and waits for it, so it only reads a plan that is there already;
without a plan, or when the plan does not know the deployment, the count stays; a plan whose planner is silent may raise the count
but never lower it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from powerd_integrations.fleet.published import PlanMirror

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext


class PowerdPolicy:
    """Follows ``desired_replicas`` of one pool at one tensor parallelism.

    ``plan``: the planner's URL, or the path of its plan file. ``stale_after_s``: a plan that was not renewed for so long takes no
    replicas away any more.
    """

    def __init__(self, plan: str, pool: str, tp: int, stale_after_s: float = 30.0) -> None:
        self._where, self._pool, self._tp, self._stale_after_s = plan, pool, tp, stale_after_s
        self._source = PlanMirror(plan)

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return the replicas wanted, and why, as Serve keeps it in ``policy_state``."""
        now = ctx.target_num_replicas
        plan = self._source.plan()
        wanted = None if plan is None else plan.replicas(self._pool, self._tp)
        if plan is None or wanted is None:
            return now, {"why": "no plan yet" if plan is None else "the plan does not know this deployment"}
        age_s = plan.age_s(time.time())
        state: dict[str, Any] = {"plan_version": plan.version, "plan_age_s": round(age_s, 1), "wanted": wanted}
        if wanted < now and age_s > self._stale_after_s:
            return now, {**state, "why": f"the planner has been silent for {age_s:.0f} s: nothing shrinks"}
        if wanted == 0 and ctx.total_queued_requests > 0:
            return 1, {**state, "why": "somebody still waits here"}
        return wanted, {**state, "why": plan.held}

    def __reduce__(self) -> tuple[type[PowerdPolicy], tuple[str, str, int, float]]:
        """Travel to Serve's controller by name: threads do not."""
        return PowerdPolicy, (self._where, self._pool, self._tp, self._stale_after_s)
