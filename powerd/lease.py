"""The lease state machine as a table: pure, immutable, without a clock of its own.

House rules: a transition that is not in the table is an error and changes nothing; times are CLOCK_BOOTTIME nanoseconds; only the
hash of a token is kept.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from powerd.api import WantSpec
from powerd.errors import LeaseLostError, RequestError
from powerd.model import LeaseEnd, LeaseState, WantClass


class LeaseEvent(StrEnum):
    """What can happen to a lease."""

    ATTACH = "attach"  # its connection arrived (also again, after a restart of the daemon)
    HEARTBEAT = "heartbeat"
    CHANGE = "change"
    ADOPT = "adopt"  # the daemon restarted and read it from the lease file
    GPU_LOST = "gpu_lost"
    GPU_BACK = "gpu_back"
    RELEASE = "release"
    EXPIRE = "expire"
    HOLDER_DIED = "holder_died"
    CONNECTION_CLOSED = "connection_closed"
    REATTACH_ENDED = "reattach_ended"
    REVOKE = "revoke"
    PANIC = "panic"
    GPU_GONE = "gpu_gone"
    DRIFT = "drift"


_ACTIVE, _DETACHED, _SUSPENDED, _ENDED = LeaseState.ACTIVE, LeaseState.DETACHED, LeaseState.SUSPENDED, LeaseState.ENDED
_LIVE = (_ACTIVE, _DETACHED, _SUSPENDED)

#: Events that end a lease, from which states, and the reason its holder is told.
ENDINGS: Mapping[LeaseEvent, tuple[tuple[LeaseState, ...], LeaseEnd]] = {
    LeaseEvent.RELEASE: (_LIVE, LeaseEnd.RELEASED),
    LeaseEvent.EXPIRE: (_LIVE, LeaseEnd.EXPIRED),
    LeaseEvent.HOLDER_DIED: (_LIVE, LeaseEnd.HOLDER_DIED),
    LeaseEvent.CONNECTION_CLOSED: ((_ACTIVE, _SUSPENDED), LeaseEnd.CONNECTION_CLOSED),
    LeaseEvent.REATTACH_ENDED: (_LIVE, LeaseEnd.NOT_REATTACHED),
    LeaseEvent.REVOKE: (_LIVE, LeaseEnd.REVOKED),
    LeaseEvent.PANIC: (_LIVE, LeaseEnd.PANIC),
    LeaseEvent.GPU_GONE: (_LIVE, LeaseEnd.GPU_GONE),
    LeaseEvent.DRIFT: (_LIVE, LeaseEnd.DRIFT),
}

#: (state, event) -> next state for everything else. GPU_BACK stays suspended while another of its GPUs is lost.
TRANSITIONS: Mapping[tuple[LeaseState, LeaseEvent], LeaseState] = {
    (_ACTIVE, LeaseEvent.ATTACH): _ACTIVE,
    (_ACTIVE, LeaseEvent.HEARTBEAT): _ACTIVE,
    (_ACTIVE, LeaseEvent.CHANGE): _ACTIVE,
    (_ACTIVE, LeaseEvent.ADOPT): _DETACHED,
    (_ACTIVE, LeaseEvent.GPU_LOST): _SUSPENDED,
    (_DETACHED, LeaseEvent.ATTACH): _ACTIVE,
    (_DETACHED, LeaseEvent.HEARTBEAT): _DETACHED,
    (_DETACHED, LeaseEvent.ADOPT): _DETACHED,
    (_DETACHED, LeaseEvent.GPU_LOST): _DETACHED,
    (_DETACHED, LeaseEvent.GPU_BACK): _DETACHED,
    (_SUSPENDED, LeaseEvent.ATTACH): _SUSPENDED,
    (_SUSPENDED, LeaseEvent.HEARTBEAT): _SUSPENDED,
    (_SUSPENDED, LeaseEvent.CHANGE): _SUSPENDED,
    (_SUSPENDED, LeaseEvent.ADOPT): _DETACHED,
    (_SUSPENDED, LeaseEvent.GPU_LOST): _SUSPENDED,
    (_SUSPENDED, LeaseEvent.GPU_BACK): _ACTIVE,
}


@dataclass(frozen=True, slots=True)
class Lease:
    """One lease: who set what on which GPUs, why and until when; wants stay as they were asked for."""

    id: str
    token_hash: str
    uid: int
    user: str
    pid: int | None
    gpus: tuple[str, ...]
    wants: tuple[WantSpec, ...]
    reason: str
    ttl_ns: int
    created_ns: int
    expires_ns: int
    job: str | None = None
    detached: bool = False  # True: bound to its TTL only, not to a connection
    min_dwell_ns: int | None = None
    want_class: WantClass = WantClass.LEASE
    state: LeaseState = LeaseState.ACTIVE
    attach_by_ns: int | None = None  # a connection has to come until then
    lost: tuple[str, ...] = ()  # those of its GPUs that cannot be reached now
    end: LeaseEnd | None = None
    ended_ns: int | None = None

    @property
    def live(self) -> bool:
        """Whether its wants still count."""
        return self.state is not LeaseState.ENDED

    def due(self, now_ns: int) -> LeaseEvent | None:
        """The event that time alone brings about, if any."""
        if not self.live:
            return None
        if now_ns >= self.expires_ns:
            return LeaseEvent.EXPIRE
        if self.attach_by_ns is not None and now_ns >= self.attach_by_ns:
            return LeaseEvent.REATTACH_ENDED
        return None

    def next_due_ns(self) -> int:
        """When ``due`` has to be asked again at the latest."""
        return self.expires_ns if self.attach_by_ns is None else min(self.expires_ns, self.attach_by_ns)


def advance(
    lease: Lease,
    event: LeaseEvent,
    now_ns: int,
    *,
    wants: tuple[WantSpec, ...] | None = None,
    gpu: str | None = None,
    attach_by_ns: int | None = None,
) -> Lease:
    """The lease after an event. LeaseLostError when it has ended, RequestError when the event is illegal in its state."""
    if not lease.live:
        raise LeaseLostError(f"lease {lease.id} has ended: {lease.end}", hint="acquire a new one")
    if event in ENDINGS:
        states, end = ENDINGS[event]
        if lease.state not in states:
            raise RequestError(f"lease {lease.id} is {lease.state}: no {event}", code="conflict")
        return replace(lease, state=_ENDED, end=end, ended_ns=now_ns, attach_by_ns=None)
    after = TRANSITIONS.get((lease.state, event))
    if after is None:
        raise RequestError(
            f"lease {lease.id} is {lease.state}: no {event}",
            code="conflict",
            hint="attach with its token first" if lease.state is _DETACHED else "",
        )
    if event is LeaseEvent.ATTACH:
        return replace(lease, state=_SUSPENDED if lease.lost else after, attach_by_ns=None)
    if event is LeaseEvent.HEARTBEAT:
        return replace(lease, expires_ns=now_ns + lease.ttl_ns)
    if event is LeaseEvent.CHANGE:
        return replace(lease, wants=lease.wants if wants is None else wants)
    if event is LeaseEvent.ADOPT:
        return replace(lease, state=after, attach_by_ns=attach_by_ns)
    lost = {*lease.lost, gpu} if event is LeaseEvent.GPU_LOST else set(lease.lost) - {gpu}
    if event is LeaseEvent.GPU_BACK and lost:
        after = lease.state
    return replace(lease, state=after, lost=tuple(sorted(g for g in lost if g in lease.gpus)))


def new_token() -> tuple[str, str]:
    """A fresh token and the hash under which it is kept."""
    token = secrets.token_urlsafe(32)
    return token, token_hash(token)


def token_hash(token: str) -> str:
    """The hash under which a token is kept; tokens are 256 random bits, so that a plain hash is enough."""
    return hashlib.sha256(token.encode()).hexdigest()


def token_matches(lease: Lease, token: str | None) -> bool:
    """Whether this is the lease's token, in constant time."""
    return token is not None and hmac.compare_digest(lease.token_hash, token_hash(token))
