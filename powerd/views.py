"""What the daemon knows -> what a caller reads: lease, node and explain views.

House rules: pure reading of engine and node, no decision about permission; seconds and names for people are made here.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable

from powerd import __version__
from powerd.api import API_VERSION, ControlExplain, Explain, LeaseView, NodeView
from powerd.clock import NS, seconds
from powerd.config import BaselineConfig
from powerd.engine import Engine
from powerd.lease import Lease
from powerd.model import Capabilities, Control, Interval, Outcome, Reading, reason_names
from powerd.reconcile import UNBOUNDED, site_interval


def lease_view(
    engine: Engine, lease: Lease, *, outcomes: tuple[Outcome, ...] | None = None, token: str | None = None, dry_run: bool = False
) -> LeaseView:
    """A lease as its readers see it."""
    until_ns = lease.ended_ns if lease.ended_ns is not None else engine.clock.now_ns()
    return LeaseView(
        id=lease.id, state=lease.state, want_class=lease.want_class, uid=lease.uid, user=lease.user, pid=lease.pid,
        gpus=lease.gpus, wants=lease.wants, reason=lease.reason, job=lease.job, detached=lease.detached,
        ttl_s=seconds(lease.ttl_ns), expires_in_s=max(0.0, seconds(lease.expires_ns - until_ns)) if lease.live else 0.0,
        age_s=seconds(until_ns - lease.created_ns),
        outcomes=engine.setpoints.answers(lease) if outcomes is None else outcomes,
        refused=engine.setpoints.refusals(lease.id), end=lease.end, token=token, dry_run=dry_run, plans=engine.plans.of(lease.id),
    )  # fmt: skip


def control_why(engine: Engine) -> str:
    """Why nothing can be set, in one line; empty when it can."""
    node = engine.node
    if not engine.config.daemon.control:
        return "monitor only: set control = true in [daemon] and reload powerd"
    if not node.control:
        return "monitor only: powerd-hw's own configuration says control = false: set it there and reload powerd-hw"
    if engine.panic:
        return "panic: powerctl resume ends it"
    if engine.quiesced_until_ns is not None:
        left_s = max(0, (engine.quiesced_until_ns - engine.clock.now_ns()) // NS)
        return f"quiesced for maintenance, {left_s} s left"
    if node.hold:
        return f"powerd-hw keeps every GPU at baseline ({node.hold}): powerctl resume"
    if not node.connected:
        return f"powerd-hw is not connected: {node.hw_problem or 'not yet'}"
    if not node.capabilities:
        return "no GPU: " + str(node.status.get("error") or "no NVIDIA driver was found")
    offered = [s for c in node.capabilities.values() for s in c.controls.values()]
    if offered and not any(s.available for s in offered):
        return offered[0].reason or "this driver lets powerd set nothing"
    return ""


def node_view(engine: Engine, *, time_scale: float | None, started_wall_ns: int, reload_ok: bool, reload_error: str) -> NodeView:
    """``GET /v1/node``."""
    node, why = engine.node, control_why(engine)
    return NodeView(
        version=__version__, api_version=f"{API_VERSION[0]}.{API_VERSION[1]}", hostname=socket.gethostname(),
        simulated=node.simulated, time_scale=time_scale, control=not why, control_why=why,
        panic=engine.panic or node.hold == "panic",
        quiesced=engine.quiesced_until_ns is not None, driver_version=node.driver_version, hw_connected=node.connected,
        hw_generation=node.generation, sample_hz=node.sample_hz, started_wall_ns=started_wall_ns, config_reload_ok=reload_ok,
        config_error=reload_error, gpus=tuple(node.capabilities.values()),
    )  # fmt: skip


def baseline_interval(config: BaselineConfig, capabilities: Capabilities, control: Control) -> Interval | None:
    """What "restored" means as far as it is known here: declared, else the default limit; ``None``: clocks unlocked."""
    if control is Control.POWER_LIMIT:
        value = round(config.power_limit_w * 1000) or capabilities.power_limit_default_mw
        return None if value is None else Interval(value, value)
    name = control.value
    low, high = int(getattr(config, f"{name}_min_mhz")), int(getattr(config, f"{name}_max_mhz"))
    return Interval(low, high or UNBOUNDED) if low or high else None


def explain_view(engine: Engine, uuid: str, reading: Reading | None, leases: Iterable[Lease]) -> Explain:
    """``GET /v1/explain/{uuid}``: requested, accepted, enforced, observed, winner, losers, limits and reasons."""
    node, config = engine.node, engine.config
    capabilities = node.capabilities[uuid]
    controls = []
    for control in Control:
        support = capabilities.controls.get(control)
        key, device = (uuid, control), capabilities.interval(control)
        site = site_interval(config.limits, control)
        controls.append(
            ControlExplain(
                control=control, available=support is not None and support.available,
                unavailable_reason="not supported by this GPU" if support is None else support.reason,
                baseline=baseline_interval(config.baseline, capabilities, control), device=device,
                site=site.meet(device) or site if site is not None and device is not None else site,
                setpoint=engine.setpoints.current.get(key), outcome=engine.setpoints.outcomes.get(key),
                last_change_by=engine.setpoints.last_change_by.get(key),
            )
        )  # fmt: skip
    bits = reading.clock_event_reasons if reading is not None else None
    holders = tuple(lease_view(engine, lease) for lease in leases if uuid in lease.gpus)
    return Explain(
        uuid=uuid, index=capabilities.gpu.index, name=capabilities.gpu.name, health=node.health(uuid).value, reading=reading,
        clock_event_reasons=() if bits is None else reason_names(bits), controls=tuple(controls),
        leases=holders, recent_events=engine.events.of(uuid),
        plans=tuple(plan for holder in holders for plan in holder.plans if plan.uuid == uuid),
    )  # fmt: skip
