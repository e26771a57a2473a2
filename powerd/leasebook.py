"""All leases of this node: the live ones, the lately ended ones, and their file.

House rules: every change goes through the table of powerd.lease; an end is told to the holder, the log and the file.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from powerd.clock import Clock
from powerd.errors import LeaseLostError, RequestError
from powerd.events import EventLog
from powerd.lease import Lease, LeaseEvent, advance, token_matches
from powerd.leasefile import LeaseFile

_ENDED_KEPT = 256


class LeaseBook:
    """Finds, changes, ends and saves leases."""

    def __init__(self, clock: Clock, file: LeaseFile, events: EventLog) -> None:
        self.live_leases: dict[str, Lease] = {}
        self.on_lease: Callable[[Lease], None] = lambda lease: None  # told when one is granted, changes state or ends
        self.dirty = False
        self._clock = clock
        self._file = file
        self._events = events
        self._ended: OrderedDict[str, Lease] = OrderedDict()
        self._unsaved = False

    def load(self, adopt: bool, reattach_ns: int) -> bool:
        """Read the file; bound leases wait for their holders, the others go on by their TTL. True when panic was on."""
        saved = self._file.load()
        if saved.problem:
            self._events.add("lease_file_quarantined", detail=saved.problem)
        now_ns = self._clock.now_ns()
        for lease in saved.leases if adopt else ():
            if lease.due(now_ns) is LeaseEvent.EXPIRE:
                continue
            if not lease.detached and lease.pid is not None and not Path(f"/proc/{lease.pid}").exists():
                # Nobody will come back for it; a number that lives on as somebody else's only waits for the re-attach window.
                self.end(lease, LeaseEvent.HOLDER_DIED)
                continue
            back = lease if lease.detached else advance(lease, LeaseEvent.ADOPT, now_ns, attach_by_ns=now_ns + reattach_ns)
            self.live_leases[lease.id] = back
            self._events.add("lease_adopted", subject=lease.id, data={"state": back.state.value, "user": lease.user})
        self.dirty = True
        return saved.panic

    def save(self, panic: bool) -> OSError | None:
        """Write the file; a failure is told once and tried again with the next round."""
        try:
            self._file.save(self.live_leases.values(), panic)
        except OSError as error:
            if not self._unsaved:
                self._events.add("lease_file_unwritable", detail=str(error))
            self.dirty = self._unsaved = True
            return error
        self.dirty = self._unsaved = False
        return None

    def put(self, lease: Lease) -> Lease:
        """Take over a lease as it is now."""
        self.live_leases[lease.id] = lease
        self.dirty = True
        return lease

    def drop(self, lease: Lease) -> None:
        """Forget a lease that was never in force."""
        self.live_leases.pop(lease.id, None)

    def end(self, lease: Lease, event: LeaseEvent) -> Lease:
        """End a lease; its holder is told."""
        ended = advance(lease, event, self._clock.now_ns())
        self.live_leases.pop(lease.id, None)
        self._ended[lease.id] = ended
        while len(self._ended) > _ENDED_KEPT:
            self._ended.popitem(last=False)
        self.dirty = True
        data: dict[str, str | int | float | bool | None] = {"user": lease.user, "reason": lease.reason}
        self._events.add("lease_ended", subject=lease.id, detail=str(ended.end), data=data)
        self.on_lease(ended)
        return ended

    def end_all(self, event: LeaseEvent) -> None:
        """End every lease."""
        for lease in list(self.live_leases.values()):
            self.end(lease, event)

    def end_due(self) -> None:
        """End what time alone ends."""
        now_ns = self._clock.now_ns()
        for lease in list(self.live_leases.values()):
            if (event := lease.due(now_ns)) is not None:
                self.end(lease, event)

    def get(self, lease_id: str) -> Lease | None:
        """A lease, live or lately ended."""
        return self.live_leases.get(lease_id) or self._ended.get(lease_id)

    def find(self, lease_id: str) -> Lease:
        """A lease, live or lately ended. RequestError(not_found) otherwise."""
        lease = self.get(lease_id)
        if lease is None:
            raise RequestError(f"no lease {lease_id[:40]!r}", hint="powerctl lease list", code="not_found")
        return lease

    def live(self, lease_id: str) -> Lease:
        """A live lease. LeaseLostError when it has ended."""
        lease = self.find(lease_id)
        if not lease.live:
            raise LeaseLostError(f"lease {lease_id} has ended: {lease.end}", hint="acquire a new one")
        return lease

    def by_token(self, token: str) -> Lease | None:
        """The live lease that a token belongs to."""
        return next((x for x in self.live_leases.values() if token_matches(x, token)), None)
