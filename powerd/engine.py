"""The loop: what hw says -> leases -> reconcile -> the desired table back to hw.

House rules: one thread, one writer; the table is written whole and renewed, so that hw undoes everything by itself when this
process hangs; nothing is set unless the operator said ``control = true``; while leases live no table without them is ever sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from powerd.access import Principal
from powerd.api import LeaseChange, LeaseRequest
from powerd.clock import NS, Clock, from_seconds
from powerd.config import Config
from powerd.errors import DeviceError, RequestError, UnavailableError
from powerd.events import EventLog
from powerd.hw import frames
from powerd.hwlink import Hw
from powerd.killpoint import killpoint
from powerd.lease import Lease, LeaseEvent, advance, new_token
from powerd.leasebook import LeaseBook
from powerd.log import log
from powerd.model import Health, Outcome, Reading, Snapshot, Verdict
from powerd.node import Node, check_may_set
from powerd.plans import PlanBook
from powerd.reconcile import Reconciled
from powerd.setpoints import Setpoints, keys_of
from powerd.wants import check_request, check_specs, check_wait, lease_of, wants_of

EXPIRY_S = 10.0  # how far ahead hw may hold a setpoint without hearing from us
RENEW_S = 2.0
ATTACH_S = 5.0  # a granted lease without its connection is undone after this
_NVML_CODES = {3: "not_supported", 4: "no_permission", 15: "gpu_lost"}


class Engine:
    """Decides what is set on this node and on whose behalf."""

    def __init__(self, clock: Clock, config: Config, book: LeaseBook, events: EventLog, node: Node) -> None:
        self.clock = clock
        self.config = config
        self.book = book
        self.events = events
        self.node = node
        self.setpoints = Setpoints()
        self.plans = PlanBook(clock, book, node)
        self.hw: Hw | None = None
        self.panic = False
        self.quiesced_until_ns: int | None = None
        self.progress = 0  # completed rounds of the loop: the watchdog is fed only when it moved
        self._sent_ns: int | None = None
        self._told_hw: tuple[frames.Command, ...] = ()
        self._wake = asyncio.Event()
        self._news = asyncio.Event()  # outcomes arrived
        self._next_due_ns: int | None = None

    @property
    def leases(self) -> dict[str, Lease]:
        """The live leases."""
        return self.book.live_leases

    # --- life ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Find the leases of a powerd that ended without its will."""
        self.panic = self.book.load(self.config.daemon.control, from_seconds(self.config.daemon.reattach_s))

    async def run(self) -> None:
        """Do what time brings about until cancelled."""
        while True:
            self._wake.clear()
            self.tick()
            timeout_s = 1.0
            if self._next_due_ns is not None:
                timeout_s = min(timeout_s, max(0.0, (self._next_due_ns - self.clock.now_ns()) / NS))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._wake.wait()

    def tick(self) -> None:
        """One round: the panic file, deadlines, deferred steps, renewal of the table."""
        if not self.panic and Path(self.config.daemon.panic_file).exists():
            self.enter_panic(f"file {self.config.daemon.panic_file}")
        if self.quiesced_until_ns is not None and self.clock.now_ns() >= self.quiesced_until_ns:
            self._resume("quiesce ended by itself", panic=self.panic)
        self.book.end_due()
        self.update()
        if self.book.dirty:
            self.book.save(self.panic)
        self.progress += 1

    def stop(self, restore: bool) -> None:
        """The last word: with ``restore`` every lease ends now; else hw's grace decides and holders may come back."""
        if restore:
            self.book.end_all(LeaseEvent.REVOKE)
            self.update(force=True)
        self.book.save(self.panic)

    # --- what hw says ---------------------------------------------------------------------------

    def hw_connected(self, hello: dict[str, Any]) -> None:
        self.node.hw_connected(hello)
        self._told_hw = ()
        self.events.add("hw_connected", data={"generation": self.node.generation})

    def hw_disconnected(self, why: str) -> None:
        self.node.hw_disconnected(why)
        self.setpoints.forget_asked()
        self.plans.hw_gone()
        self._sent_ns = None
        self.events.add("hw_disconnected", detail=why)

    def hw_snapshot(self, seq: int, time_ns: int, readings: tuple[Reading, ...]) -> None:
        for reading in readings:
            if (change := self.node.health_change(reading)) is not None:
                self._health(reading.uuid, change)
        self.node.publish(Snapshot(seq, time_ns, self.clock.wall_ns() - self.clock.now_ns() + time_ns, readings))

    def hw_outcomes(self, outcomes: tuple[Outcome, ...]) -> None:
        killpoint("powerd.outcome.received")
        for outcome in outcomes:
            if self.setpoints.take(outcome):
                self.events.add_outcome(outcome)
        self._news.set()

    def hw_table(self, table: frames.Table, content: Any) -> None:
        try:
            if table is frames.Table.CAPABILITIES:
                gone = self.node.capabilities_table(content)
                for lease in [x for x in self.leases.values() if gone.intersection(x.gpus)]:
                    self.book.end(lease, LeaseEvent.GPU_GONE)
                self.update(force=True)
            elif table is frames.Table.PROCESSES:
                self.node.processes_table(content)
            elif table is frames.Table.HOST_ENERGY:
                self.node.host_energy_table(content)
            elif table is frames.Table.PLANS:
                self.plans.take(content)
            elif table is frames.Table.STATUS:
                self.node.status_table(content)
                self.update(force=True)
            elif table is frames.Table.EVENT:
                for row in content if isinstance(content, list) else [content]:
                    self._hw_event(row)
        except (frames.FrameError, TypeError, ValueError, KeyError, AttributeError) as error:
            log("hw_table_refused", table=table.name, why=error)

    def _hw_event(self, row: dict[str, Any]) -> None:
        kind, uuid, subject = str(row["kind"]), row.get("uuid"), row.get("subject")
        self.events.add(kind, uuid=uuid, subject=subject, detail=str(row.get("detail", "")), data=row.get("data") or {})
        if kind == "drift" and self.config.hw.drift == "yield":
            for lease in [x for x in self.leases.values() if (uuid, subject) in keys_of(x)]:
                self.book.end(lease, LeaseEvent.DRIFT)
            self.update()

    def _health(self, uuid: str, health: Health) -> None:
        event = LeaseEvent.GPU_BACK if health in (Health.UP, Health.SUSPECT) else LeaseEvent.GPU_LOST
        for lease in [x for x in self.leases.values() if uuid in x.gpus]:
            if (event is LeaseEvent.GPU_LOST) == (uuid not in lease.lost):
                after = self.book.put(advance(lease, event, self.clock.now_ns(), gpu=uuid))
                if after.state is not lease.state:
                    why = f"{uuid} is {health.value}"
                    self.events.add(f"lease_{after.state.value}", uuid=uuid, subject=lease.id, detail=why)
                    self.book.on_lease(after)
        self.update()

    # --- setpoints --------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether wants count now; otherwise every GPU is at baseline or nobody may set anything."""
        return self.config.daemon.control and self.node.control and not (self.panic or self.quiesced_until_ns or self.node.hold)

    def _preview(self, leases: Collection[Lease], dwell_s: float) -> Reconciled:
        unreachable = self.node.unreachable()
        wants = [w for lease in leases for w in wants_of(lease, unreachable)]
        limits, now_ns = self.config.limits, self.clock.now_ns()
        return self.setpoints.preview(wants, self.node.capabilities, limits, now_ns, from_seconds(dwell_s))

    def update(self, force: bool = False) -> None:
        """Reconcile and tell hw when something changed or the table has to be renewed."""
        self._command_state()
        if self.active and not self.node.capabilities and self.leases:
            self._plan_next(None)
            return  # the GPUs are not known yet: what hw holds for these leases stays
        result = self._preview(self.leases.values() if self.active else (), self.config.hw.min_dwell_s)
        for refusal in self.setpoints.adopt(result):
            want = refusal.want
            self.events.add("want_refused", uuid=want.uuid, subject=want.source, detail=f"{want.control.value}: {refusal.why}")
        if not self.active:
            self.setpoints.forget_asked()  # hw is at baseline by itself: it refuses tables meanwhile
        elif self.hw is not None and self.hw.connected and self.node.capabilities:
            now_ns = self.clock.now_ns()
            changed = self.setpoints.changed()
            if force or changed or self._sent_ns is None or now_ns - self._sent_ns >= from_seconds(RENEW_S):
                seq = self.hw.send_desired(self.setpoints.rows(now_ns + from_seconds(EXPIRY_S)))
                killpoint("powerd.desired.sent")
                self._sent_ns = now_ns
                self.setpoints.sent(changed, seq)
        self._plan_next(result.next_due_ns())

    def _plan_next(self, deferred_ns: int | None) -> None:
        due = [lease.next_due_ns() for lease in self.leases.values()]
        due += [t for t in (deferred_ns, self.quiesced_until_ns) if t is not None]
        soonest = min(due, default=None)
        if soonest is not None and (self._next_due_ns is None or soonest < self._next_due_ns):
            self._wake.set()
        self._next_due_ns = soonest

    def _command_state(self) -> None:
        """Tell hw of panic and quiesce, once per connection and change."""
        quiesce = (frames.Command.QUIESCE,) if self.quiesced_until_ns is not None else ()
        wanted: tuple[frames.Command, ...] = (frames.Command.PANIC,) if self.panic else quiesce
        if self.hw is None or not self.hw.connected or wanted == self._told_hw:
            return
        if not wanted:
            self.hw.command(frames.Command.RESUME)
        left_ms = max(0, (self.quiesced_until_ns or 0) - self.clock.now_ns()) // 1_000_000
        for command in wanted:
            self.hw.command(command, left_ms if command is frames.Command.QUIESCE else 0)
        self._told_hw = wanted

    # --- leases -------------------------------------------------------------------------------------

    def check_may_set(self) -> None:
        """RequestError or UnavailableError when nobody may set anything now, with what to do about it."""
        connected, quiesced = self.hw is not None and self.hw.connected, self.quiesced_until_ns is not None
        check_may_set(self.config.daemon.control, self.node, panic=self.panic, quiesced=quiesced, connected=connected)

    def _plan(self, lease: Lease, what: str) -> tuple[Outcome, ...]:
        """What would be asked of hw for a lease; RequestError(conflict) when not one of its wants could be served."""
        planned = self._preview([*(x for x in self.leases.values() if x.id != lease.id), lease], dwell_s=0.0).setpoints
        refused = self.setpoints.refusals(lease.id, planned)
        if refused and len(refused) == len(wants_of(lease, self.node.unreachable())):
            first = refused[0]
            raise RequestError(
                f"{what}: {first.control.value} on {first.uuid}: {first.why}", hint="powerctl explain", code="conflict"
            )
        return tuple(
            Outcome(*key, seq=0, requested=planned[key].value, verdict=Verdict.PENDING)
            for key in keys_of(lease)
            if key in planned
        )

    async def acquire(
        self, who: Principal, request: LeaseRequest, watch: Callable[[Lease], None] = lambda lease: None
    ) -> tuple[Lease, str | None, tuple[Outcome, ...]]:
        """Grant a lease: (lease, token, outcomes). All of it is set or none: a failed set ends the lease and is the error.

        ``watch`` is called before anything is set, so that a holder that dies at any later moment is noticed.
        """
        self.check_may_set()
        limits = self.config.leases
        check_request(request, self.node.capabilities, self.node.unreachable(), self.config.limits, limits.max_ttl_s)
        uid = -1 if who.uid is None else who.uid
        if sum(1 for x in self.leases.values() if x.uid == uid) >= limits.max_per_uid:
            raise RequestError(f"{limits.max_per_uid} leases of this user are open", hint="release some", code="too_many")
        token, hashed = new_token()
        lease = lease_of(
            request, lease_id=f"l{secrets.token_hex(6)}", token_hash=hashed, uid=uid, user=who.user, pid=who.pid,
            now_ns=self.clock.now_ns(), default_ttl_s=limits.default_ttl_s, attach_s=ATTACH_S,
        )  # fmt: skip
        planned = self._plan(lease, "cannot be granted")
        if request.dry_run:
            return lease, None, planned
        killpoint("powerd.lease.accepted")
        self.book.put(lease)
        if (error := self.book.save(self.panic)) is not None:
            self.book.drop(lease)
            raise UnavailableError(f"leases cannot be saved: {error}", hint="free space in daemon.state_dir", code="busy")
        killpoint("powerd.lease.saved")
        watch(lease)
        self.events.add(
            "lease_granted", subject=lease.id, detail=lease.reason, data={"user": lease.user, "gpus": len(lease.gpus)}
        )
        self.book.on_lease(lease)
        self.update()
        outcomes = await self._settle(lease, request.wait_s)
        if failed := next((o for o in outcomes if o.verdict is Verdict.FAILED), None):
            if lease.id in self.leases:
                self.book.end(self.leases[lease.id], LeaseEvent.REVOKE)
                self.update()
            code = _NVML_CODES.get(failed.nvml_code, "not_supported")
            message = f"{failed.control.value} on {failed.uuid}: {failed.detail or 'the driver refused'}"
            raise DeviceError(message, hint="nothing stays set", code=code, nvml_code=failed.nvml_code)
        killpoint("powerd.lease.answered")
        return self.book.find(lease.id), token, outcomes

    async def change(self, lease_id: str, request: LeaseChange) -> tuple[Lease, tuple[Outcome, ...]]:
        """Replace the wants of a live lease; when nothing of it could be served the old wants stay."""
        self.check_may_set()
        lease = self.book.live(lease_id)
        check_wait(request.wait_s)
        gpus = [self.node.capabilities[g] for g in lease.gpus if g in self.node.capabilities]
        check_specs(request.wants, gpus, self.config.limits)
        changed = advance(lease, LeaseEvent.CHANGE, self.clock.now_ns(), wants=request.wants)
        self._plan(changed, "cannot be changed")
        self.book.put(changed)
        self.update()
        self.book.save(self.panic)
        outcomes = await self._settle(changed, request.wait_s)
        return self.book.find(lease_id), outcomes

    def heartbeat(self, lease_id: str) -> Lease:
        """Renew the TTL; the file follows within a second."""
        lease = self.book.put(advance(self.book.live(lease_id), LeaseEvent.HEARTBEAT, self.clock.now_ns()))
        self.update()
        return lease

    def attach(self, lease_id: str) -> Lease:
        """Its connection has come (again)."""
        before = self.book.live(lease_id)
        if (lease := self.book.put(advance(before, LeaseEvent.ATTACH, self.clock.now_ns()))).state is not before.state:
            self.events.add("lease_reattached", subject=lease_id)
        self.update()
        return lease

    async def release(self, lease_id: str, wait_s: float = 2.0) -> tuple[Lease, tuple[Outcome, ...]]:
        """End it; returns when hw has undone the settings or handed them to the next want."""
        lease = self.book.end(self.book.live(lease_id), LeaseEvent.RELEASE)
        self.update()
        self._wake.set()
        return lease, await self._settle(lease, wait_s)

    def holder_gone(self, lease_id: str, event: LeaseEvent) -> None:
        """Its connection or its process ended: the settings are undone at once."""
        if (lease := self.leases.get(lease_id)) is not None:
            with contextlib.suppress(RequestError):
                self.book.end(lease, event)
                self.update()
                self._wake.set()

    async def _settle(self, lease: Lease, wait_s: float) -> tuple[Outcome, ...]:
        deadline_ns = self.clock.now_ns() + from_seconds(wait_s)
        while not self.setpoints.settled(lease) and (left_ns := deadline_ns - self.clock.now_ns()) > 0:
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_ns / NS):
                    await self._news.wait()
            lease = self.book.get(lease.id) or lease
        return self.setpoints.answers(lease)

    # --- panic, quiesce, reload -----------------------------------------------------------------------

    def enter_panic(self, why: str) -> None:
        """Everything to baseline now; wants are refused until ``resume``, also after a restart."""
        if not self.panic:
            self.panic = True
            self.book.end_all(LeaseEvent.PANIC)
            self.events.add("panic", detail=why)
        self._told_hw = ()
        self.update()
        self.book.save(self.panic)

    def quiesce(self, max_s: float, why: str) -> None:
        """Baseline and no NVML handle for at most ``max_s``; leases stay and are set again afterwards."""
        if not 0 < max_s <= 86_400:
            raise RequestError(f"max_s {max_s:g} is outside 0..86400", code="bad_value")
        self.quiesced_until_ns = self.clock.now_ns() + from_seconds(max_s)
        self._told_hw = ()
        self.events.add("quiesced", detail=why, data={"max_s": max_s})
        self.update()

    def resume(self, why: str = "asked") -> str:
        """End panic and quiesce; RequestError while the panic file exists. The answer says what ended."""
        if Path(self.config.daemon.panic_file).exists():
            raise RequestError("the panic file is still there", hint=f"remove {self.config.daemon.panic_file}", code="conflict")
        return self._resume(why, panic=False)

    def _resume(self, why: str, panic: bool) -> str:
        ended = [n for n, on in (("panic", self.panic and not panic), ("quiesce", self.quiesced_until_ns is not None)) if on]
        self.panic, self.quiesced_until_ns = panic, None
        if self.node.hold and not ended:
            ended = [self.node.hold]  # powerd-hw held back on its own: a crash loop, or a panic that this powerd does not know
        if ended:
            self.events.add("resumed", detail=why, data={"ended": " and ".join(ended)})
            self._told_hw = (frames.Command.REFRESH,)  # whatever it was told before, it is told anew
        self.update(force=True)
        self.book.save(self.panic)
        return " and ".join(ended) + " ended" if ended else "there was nothing to end"

    def apply_config(self, config: Config) -> None:
        """Take over a new configuration; without control every lease ends and hw gets one last, empty table."""
        before, self.config = self.config, config
        if before.daemon.control and not config.daemon.control:
            self.book.end_all(LeaseEvent.REVOKE)
            if self.hw is not None and self.hw.connected:
                self.setpoints.forget_held()
                self.hw.send_desired([])
        self.update(force=True)
