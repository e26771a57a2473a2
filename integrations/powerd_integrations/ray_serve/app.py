"""The application: ``serve run powerd_integrations.ray_serve.app:build config=fleet.toml``.

House rules: one deployment per group, scaled by `PowerdPolicy` alone; nothing is decided here; a replica is given as many GPUs as
its tensor parallelism and a drain as long as the file says before Serve may kill it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from powerd.errors import RequestError
from powerd_integrations.fleet import settings as configured
from powerd_integrations.fleet.settings import FleetSettings, GroupSection
from powerd_policies.dynamollm import models

if TYPE_CHECKING:
    from ray.serve import Application

POLICY = "powerd_integrations.ray_serve.policy:PowerdPolicy"


def build(args: dict[str, str]) -> Application:
    """Return the application of ``config``; RequestError when the file cannot be used."""
    if set(args) != {"config"}:
        raise RequestError(f"say config=fleet.toml and nothing else, not {sorted(args)}", code="bad_value")
    return application(configured.load(args["config"]))


def application(settings: FleetSettings) -> Application:
    """Return the router bound to an engine deployment for every group."""
    from ray import serve

    from powerd_integrations.ray_serve.router import RouterReplica

    token = Path(settings.planner.token_file).read_text().strip() if settings.planner.token_file else ""
    engines = {str(row.group): _engines(settings, row, token) for row in settings.groups}
    router = serve.deployment(
        RouterReplica,
        name="router",
        num_replicas=settings.service.routers,
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": settings.service.router_cpus},
    )
    # Files are read here: another node of the cluster need not have them.
    bound: Application = router.bind(settings, models.load(settings.planner.engine_model), engines, token)
    return bound


def _engines(settings: FleetSettings, row: GroupSection, token: str) -> Application:
    from ray import serve
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    from powerd_integrations.ray_serve.engine import EngineReplica

    service, engine = settings.service, settings.engine
    follow: dict[str, Any] = {
        "plan": service.plan or service.planner,
        "pool": row.pool,
        "tp": row.tp,
        "stale_after_s": service.stale_after_s,
    }
    deployment = serve.deployment(
        EngineReplica,
        name=f"engine-{row.group}",
        max_ongoing_requests=engine.max_ongoing_requests,
        graceful_shutdown_timeout_s=engine.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=engine.health_check_s,
        autoscaling_config=AutoscalingConfig(
            min_replicas=row.min_replicas,
            max_replicas=row.max_replicas,
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            downscale_to_zero_delay_s=0.0,
            policy=AutoscalingPolicy(policy_function=POLICY, policy_kwargs=follow),
        ),
        ray_actor_options={
            "num_cpus": engine.num_cpus,
            "num_gpus": row.tp if service.gpus_per_replica else 0,
        },
    )
    bound: Application = deployment.bind(settings, row, token)
    return bound
