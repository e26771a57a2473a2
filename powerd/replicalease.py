"""A replica's lease: granted without a want, so also where powerd only monitors; its one want is the ceiling decided last.

House rules: every change goes through the lease book and the engine, so that limits, dwell, explain, panic and restore hold
unchanged; a lease that waits for its holder wants nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace

from powerd.access import Principal
from powerd.api import LeaseRequest, WantSpec
from powerd.engine import ATTACH_S, Engine
from powerd.errors import RequestError, UnavailableError
from powerd.governor import Ceiling
from powerd.lease import Lease, LeaseEvent, advance, new_token
from powerd.model import Control, LeaseState
from powerd.replicatypes import ReplicaRequest
from powerd.wants import check_frame, lease_of

LEASE_PREFIX = "r"


def reason_of(request: ReplicaRequest, why: str = "") -> str:
    """What others read on the lease."""
    return f"replica {request.name} of pool {request.pool}{f': {why}' if why else ''}"[:200]


def grant(engine: Engine, who: Principal, request: ReplicaRequest, watch: Callable[[Lease], None]) -> tuple[Lease, str]:
    """A lease for a replica, and its token. RequestError, DeviceError or UnavailableError; then there is none."""
    try:
        engine.check_may_set()
    except RequestError as error:
        if error.code.name != "monitor_only":  # there a replica is followed and shown, and nothing is set
            raise
    limits, node = engine.config.leases, engine.node
    asked = LeaseRequest(request.gpus, (), reason_of(request), request.ttl_s, detached=request.detached)
    check_frame(asked, node.capabilities, node.unreachable(), limits.max_ttl_s)
    uid = -1 if who.uid is None else who.uid
    if sum(1 for x in engine.leases.values() if x.uid == uid) >= limits.max_per_uid:
        raise RequestError(f"{limits.max_per_uid} leases of this user are open", hint="release some", code="too_many")
    token, hashed = new_token()
    lease = lease_of(
        asked, lease_id=f"{LEASE_PREFIX}{secrets.token_hex(6)}", token_hash=hashed, uid=uid, user=who.user, pid=who.pid,
        now_ns=engine.clock.now_ns(), default_ttl_s=limits.default_ttl_s, attach_s=ATTACH_S,
    )  # fmt: skip
    engine.book.put(lease)
    if (unsaved := engine.book.save(engine.panic)) is not None:
        engine.book.drop(lease)
        raise UnavailableError(f"leases cannot be saved: {unsaved}", hint="free space in daemon.state_dir", code="busy")
    watch(lease)
    engine.events.add("lease_granted", subject=lease.id, detail=lease.reason, data={"user": lease.user, "gpus": len(lease.gpus)})
    engine.book.on_lease(lease)
    engine.update()
    return lease, token


def hold(engine: Engine, lease: Lease, request: ReplicaRequest, ceiling: Ceiling) -> None:
    """Let the lease want this ceiling, or nothing."""
    wants = () if ceiling.clock_mhz is None else (WantSpec(Control.SM_CLOCK, high=ceiling.clock_mhz),)
    if lease.wants == wants:
        return
    if lease.state is LeaseState.DETACHED:
        if wants:
            return  # its holder has to come back first
        changed = replace(lease, wants=wants)
    else:
        changed = advance(lease, LeaseEvent.CHANGE, engine.clock.now_ns(), wants=wants)
    engine.book.put(replace(changed, reason=reason_of(request, ceiling.reason)))
    engine.update()
    engine.plans.lease_changed(changed)
