"""The loop: what hw says -> leases -> reconcile -> the desired table back to hw.

House rules: one thread, one writer; the table is written whole and renewed, so that hw undoes everything by itself when this
process hangs; nothing is set unless the operator said ``control = true``; while leases live no table without them is ever sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import zlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from powerd.access import Principal
from powerd.api import LeaseChange, LeaseRequest, RefusalView
from powerd.clock import NS, Clock, from_seconds
from powerd.config import Config
from powerd.errors import DeviceError, LeaseLostError, RequestError, UnavailableError
from powerd.events import EventLog
from powerd.hw import frames
from powerd.killpoint import killpoint
from powerd.lease import Lease, LeaseEvent, advance, new_token, token_matches
from powerd.leasefile import LeaseFile
from powerd.log import log
from powerd.model import Control, Health, Interval, Outcome, Reading, Setpoint, Snapshot, Verdict
from powerd.node import Node
from powerd.reconcile import Held, Key, Reconciled, reconcile
from powerd.wants import check_request, check_specs, check_wait, lease_of, wants_of

EXPIRY_S = 10.0  # how far ahead hw may hold a setpoint without hearing from us
RENEW_S = 2.0
ATTACH_S = 5.0  # a granted lease without its connection is undone after this
_ENDED_KEPT = 256
_NVML_CODES = {3: "not_supported", 4: "no_permission", 15: "gpu_lost"}


class Hw(Protocol):
    """What the engine needs of the link to powerd-hw."""

    @property
    def connected(self) -> bool: ...
    def send_desired(self, rows: list[frames.Desired]) -> int: ...
    def command(self, command: frames.Command, argument: int = 0) -> None: ...


class Engine:
    """Leases, setpoints and what became of them on this node."""

    def __init__(self, clock: Clock, config: Config, lease_file: LeaseFile, events: EventLog, node: Node) -> None:
        self.clock = clock
        self.config = config
        self.events = events
        self.node = node
        self.hw: Hw | None = None
        self.leases: dict[str, Lease] = {}
        self.ended: OrderedDict[str, Lease] = OrderedDict()
        self.setpoints: Mapping[Key, Setpoint] = {}
        self.outcomes: dict[Key, Outcome] = {}
        self.last_change_by: dict[Key, str] = {}
        self.panic = False
        self.quiesced_until_ns: int | None = None
        self.progress = 0  # completed rounds of the loop: the watchdog is fed only when it moved
        self.on_lease: Callable[[Lease], None] = lambda lease: None  # told when one changes state
        self._file = lease_file
        self._held: Mapping[Key, Held] = {}
        self._asked: dict[Key, tuple[Interval | None, int]] = {}  # the value hw was last told, and in which table
        self._refused: frozenset[tuple[str, str, Control]] = frozenset()
        self._sent_ns = 0
        self._told_hw: tuple[frames.Command, ...] = ()
        self._wake = asyncio.Event()
        self._news = asyncio.Event()  # outcomes arrived
        self._dirty = self._unsaved = False
        self._next_due_ns: int | None = None

    # --- life -------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Read the lease file: bound leases wait for their holders, the others go on by their TTL."""
        saved = self._file.load()
        now_ns = self.clock.now_ns()
        if saved.problem:
            self.events.add("lease_file_quarantined", detail=saved.problem)
        self.panic = saved.panic
        if not self.config.daemon.control:
            return
        attach_by_ns = now_ns + from_seconds(self.config.daemon.reattach_s)
        for lease in saved.leases:
            if lease.due(now_ns) is LeaseEvent.EXPIRE:
                continue
            adopted = lease if lease.detached else advance(lease, LeaseEvent.ADOPT, now_ns, attach_by_ns=attach_by_ns)
            self.leases[lease.id] = adopted
            self.events.add("lease_adopted", subject=lease.id, data={"state": adopted.state.value, "user": lease.user})
        self._dirty = True

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
        """One round: deadlines of leases, the panic file, deferred steps, renewal of the table."""
        now_ns = self.clock.now_ns()
        if not self.panic and Path(self.config.daemon.panic_file).exists():
            self.enter_panic(f"file {self.config.daemon.panic_file}")
        if self.quiesced_until_ns is not None and now_ns >= self.quiesced_until_ns:
            self.resume("quiesce ended by itself")
        for lease in list(self.leases.values()):
            if (event := lease.due(now_ns)) is not None:
                self._end(lease, event)
        self.update()
        if self._dirty:
            self._save()
        self.progress += 1

    def stop(self, restore: bool) -> None:
        """The last word to hw: with ``restore`` the settings of this process end now, else hw's grace decides."""
        if restore and self._may_set:
            for lease in list(self.leases.values()):
                self._end(lease, LeaseEvent.REVOKE)
            self.update(force=True)
        self._save()

    # --- what hw says -------------------------------------------------------------------------------------------------------

    def hw_connected(self, hello: dict[str, Any]) -> None:
        self.node.hw_connected(hello)
        self._told_hw = ()
        self.events.add("hw_connected", data={"generation": self.node.generation, "driver": self.node.driver_version})

    def hw_disconnected(self, why: str) -> None:
        self.node.hw_disconnected(why)
        self._asked.clear()
        self._sent_ns = 0
        self.events.add("hw_disconnected", detail=why)

    def hw_snapshot(self, seq: int, time_ns: int, readings: tuple[Reading, ...]) -> None:
        for reading in readings:
            if (change := self.node.health_change(reading)) is not None:
                self._health(reading.uuid, change)
        self.node.publish(Snapshot(seq, time_ns, self.clock.wall_ns() - self.clock.now_ns() + time_ns, readings))

    def hw_outcomes(self, outcomes: tuple[Outcome, ...]) -> None:
        killpoint("powerd.outcome.received")
        for outcome in outcomes:
            key = (outcome.uuid, outcome.control)
            before, self.outcomes[key] = self.outcomes.get(key), outcome
            if before is None or (before.verdict, before.requested) != (outcome.verdict, outcome.requested):
                self._tell_outcome(outcome)
        self._news.set()

    def hw_table(self, table: frames.Table, content: Any) -> None:
        try:
            if table is frames.Table.CAPABILITIES:
                gone = self.node.capabilities_table(content)
                for lease in list(self.leases.values()):
                    if gone.intersection(lease.gpus):
                        self._end(lease, LeaseEvent.GPU_GONE)
                self.update(force=True)
            elif table is frames.Table.PROCESSES:
                self.node.processes_table(content)
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
        if kind == "drift" and uuid and self.config.hw.drift == "yield":
            for lease in list(self.leases.values()):
                if uuid in lease.gpus and any(w.control == subject for w in lease.wants):
                    self._end(lease, LeaseEvent.DRIFT)
            self.update()

    def _health(self, uuid: str, health: Health) -> None:
        self.events.add(f"gpu_{health.value}", uuid=uuid)
        event = LeaseEvent.GPU_BACK if health in (Health.UP, Health.SUSPECT) else LeaseEvent.GPU_LOST
        for lease in [x for x in self.leases.values() if uuid in x.gpus]:
            if (event is LeaseEvent.GPU_LOST) == (uuid not in lease.lost):
                changed = self._put(advance(lease, event, self.clock.now_ns(), gpu=uuid))
                if changed.state is not lease.state:
                    why = f"{uuid} is {health.value}"
                    self.events.add(f"lease_{changed.state.value}", uuid=uuid, subject=lease.id, detail=why)
                    self.on_lease(changed)
        self.update()

    def _tell_outcome(self, outcome: Outcome) -> None:
        data: dict[str, str | int | float | bool | None] = {"verdict": outcome.verdict.value}
        if outcome.requested is not None:
            data |= {"low": outcome.requested.low, "high": outcome.requested.high}
        kind = "setpoint" if outcome.requested is not None else "baseline"
        self.events.add(kind, uuid=outcome.uuid, subject=outcome.control.value, detail=outcome.detail, data=data)

    # --- setpoints ------------------------------------------------------------------------------------------------------------

    @property
    def _may_set(self) -> bool:
        return self.config.daemon.control and self.hw is not None and self.hw.connected and bool(self.node.capabilities)

    def _reconciled(self, leases: Collection[Lease]) -> Reconciled:
        unreachable = self.node.unreachable()
        wants = [w for lease in leases for w in wants_of(lease, unreachable)]
        dwell_ns = from_seconds(self.config.hw.min_dwell_s)
        return reconcile(wants, self.node.capabilities, self.config.limits, self._held, self.clock.now_ns(), dwell_ns)

    def update(self, force: bool = False) -> None:
        """Reconcile and tell hw when something changed or the table has to be renewed."""
        now_ns = self.clock.now_ns()
        active = self.config.daemon.control and not self.panic and self.quiesced_until_ns is None and not self.node.hold
        if active and not self.node.capabilities and self.leases:
            self._plan_next(None)
            return  # the GPUs are not known yet: what hw holds for these leases stays
        result = self._reconciled(self.leases.values() if active else ())
        self.setpoints, self._held = result.setpoints, result.held
        self._tell_refusals()
        self._command_state()
        if not active:
            self._asked.clear()  # hw is at baseline by itself: it refuses tables meanwhile
            self._plan_next(None)
            return
        values = {key: s.value for key, s in self.setpoints.items() if s.value is not None}
        changed = [k for k in values.keys() | self._asked.keys() if self._asked.get(k, (None, 0))[0] != values.get(k)]
        renew = now_ns - self._sent_ns >= from_seconds(RENEW_S)
        if (force or changed or renew) and self._may_set:
            self._send(values, changed, now_ns)
        self._plan_next(result.next_due_ns())

    def _send(self, values: Mapping[Key, Interval], changed: Collection[Key], now_ns: int) -> None:
        assert self.hw is not None
        rows = []
        for (uuid, control), value in values.items():
            setpoint = self.setpoints[uuid, control]
            winner = next((w for w in setpoint.considered if w.source == setpoint.winner), None)
            dwell_ns = None if winner is None else winner.min_dwell_ns
            dwell_ms = 0 if dwell_ns is None else max(1, dwell_ns // 1_000_000)
            tag = zlib.crc32((setpoint.winner or "").encode())
            rows.append(frames.Desired(uuid, control, value, now_ns + from_seconds(EXPIRY_S), dwell_ms, tag))
        seq = self.hw.send_desired(rows)
        killpoint("powerd.desired.sent")
        self._sent_ns = now_ns
        for key in changed:
            self._asked[key] = (values.get(key), seq)
            chosen = self.setpoints.get(key)
            self.last_change_by[key] = (chosen.winner if chosen else None) or "baseline"

    def _plan_next(self, deferred_ns: int | None) -> None:
        due = [lease.next_due_ns() for lease in self.leases.values()]
        due += [t for t in (deferred_ns, self.quiesced_until_ns) if t is not None]
        soonest = min(due, default=None)
        if soonest is not None and (self._next_due_ns is None or soonest < self._next_due_ns):
            self._wake.set()
        self._next_due_ns = soonest

    def _tell_refusals(self) -> None:
        now_refused = {
            (r.want.source, r.want.uuid, r.want.control): r
            for s in self.setpoints.values()
            for r in s.refused
            if r.want.source in self.leases
        }
        for (source, uuid, control), refusal in now_refused.items():
            if (source, uuid, control) not in self._refused:
                self.events.add("want_refused", uuid=uuid, subject=source, detail=f"{control.value}: {refusal.why}")
        self._refused = frozenset(now_refused)

    def _command_state(self) -> None:
        """Tell hw of panic and quiesce once per connection and change."""
        wanted: tuple[frames.Command, ...] = ()
        if self.panic:
            wanted = (frames.Command.PANIC,)
        elif self.quiesced_until_ns is not None:
            wanted = (frames.Command.QUIESCE,)
        if self.hw is None or not self.hw.connected or wanted == self._told_hw:
            return
        if not wanted:
            self.hw.command(frames.Command.RESUME)
        for command in wanted:
            left_ns = max(0, (self.quiesced_until_ns or 0) - self.clock.now_ns())
            self.hw.command(command, left_ns // 1_000_000 if command is frames.Command.QUIESCE else 0)
        self._told_hw = wanted

    # --- leases ---------------------------------------------------------------------------------------------------------------

    def _put(self, lease: Lease) -> Lease:
        self.leases[lease.id] = lease
        self._dirty = True
        return lease

    def _save(self) -> OSError | None:
        """Write the lease file; a failure is logged once, tried again every round, and only refuses new leases."""
        try:
            self._file.save(self.leases.values(), self.panic)
        except OSError as error:
            if not self._unsaved:
                self.events.add("lease_file_unwritable", detail=str(error))
            self._dirty = self._unsaved = True
            return error
        self._dirty = self._unsaved = False
        return None

    def _end(self, lease: Lease, event: LeaseEvent) -> Lease:
        ended = advance(lease, event, self.clock.now_ns())
        self.leases.pop(lease.id, None)
        self.ended[lease.id] = ended
        while len(self.ended) > _ENDED_KEPT:
            self.ended.popitem(last=False)
        self._dirty = True
        self.events.add("lease_ended", subject=lease.id, detail=str(ended.end), data={"user": lease.user, "reason": lease.reason})
        self.on_lease(ended)
        return ended

    def _check_may_set(self) -> None:
        if not self.config.daemon.control:
            raise RequestError(
                "powerd only monitors", code="monitor_only", hint="set control = true in [daemon] and reload powerd"
            )
        if self.panic:
            raise UnavailableError("panic: every GPU is at baseline", hint="powerctl resume", code="busy")
        if self.quiesced_until_ns is not None:
            raise UnavailableError("quiesced for maintenance", hint="powerctl resume, or wait", code="busy")
        if self.node.hold:
            raise UnavailableError(
                f"powerd-hw keeps every GPU at baseline: {self.node.hold}", hint="powerctl resume", code="busy"
            )
        if self.hw is None or not self.hw.connected:
            raise UnavailableError("powerd-hw is not connected", hint=self.node.hw_problem or "systemctl status powerd-hw")

    def refusals(self, lease_id: str, result: Mapping[Key, Setpoint] | None = None) -> tuple[RefusalView, ...]:
        """The wants of a lease that are not served, and why."""
        source = self.setpoints if result is None else result
        return tuple(
            RefusalView(r.want.uuid, r.want.control, r.why)
            for s in source.values()
            for r in s.refused
            if r.want.source == lease_id
        )

    def _plan(self, lease: Lease, what: str) -> tuple[Outcome, ...]:
        """What would be asked of hw for a lease; RequestError(conflict) when not one of its wants could be served."""
        others = [x for x in self.leases.values() if x.id != lease.id]
        planned = self._reconciled([*others, lease]).setpoints
        refused = self.refusals(lease.id, planned)
        if refused and len(refused) == len(wants_of(lease)):
            first = refused[0]
            raise RequestError(
                f"{what}: {first.control.value} on {first.uuid}: {first.why}", hint="powerctl explain", code="conflict"
            )
        keys = [(g, w.control) for g in lease.gpus for w in lease.wants]
        return tuple(
            Outcome(*key, seq=0, requested=planned[key].value, verdict=Verdict.PENDING) for key in keys if key in planned
        )

    async def acquire(
        self, who: Principal, request: LeaseRequest, watch: Callable[[Lease], None] = lambda lease: None
    ) -> tuple[Lease, str | None, tuple[Outcome, ...]]:
        """Grant a lease: (lease, token, outcomes). All of it is set or none: a failed set ends the lease and is the error.

        ``watch`` is called before anything is set, so that a holder that dies at any later moment is noticed.
        """
        self._check_may_set()
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
        self._put(lease)
        if (error := self._save()) is not None:
            del self.leases[lease.id]
            raise UnavailableError(f"leases cannot be saved: {error}", hint="free space in daemon.state_dir", code="busy")
        killpoint("powerd.lease.saved")
        watch(lease)
        self.events.add(
            "lease_granted", subject=lease.id, detail=lease.reason, data={"user": lease.user, "gpus": len(lease.gpus)}
        )
        self.update()
        outcomes = await self._outcomes_of(lease, request.wait_s)
        if failed := next((o for o in outcomes if o.verdict is Verdict.FAILED), None):
            if lease.id in self.leases:
                self._end(self.leases[lease.id], LeaseEvent.REVOKE)
                self.update()
            code = _NVML_CODES.get(failed.nvml_code, "not_supported")
            message = f"{failed.control.value} on {failed.uuid}: {failed.detail or 'the driver refused'}"
            raise DeviceError(message, hint="nothing stays set", code=code, nvml_code=failed.nvml_code)
        killpoint("powerd.lease.answered")
        return self.find(lease.id), token, outcomes

    async def change(self, lease_id: str, request: LeaseChange) -> tuple[Lease, tuple[Outcome, ...]]:
        """Replace the wants of a live lease; when nothing of it could be served the old wants stay."""
        self._check_may_set()
        lease = self.live(lease_id)
        check_wait(request.wait_s)
        gpus = [self.node.capabilities[g] for g in lease.gpus if g in self.node.capabilities]
        check_specs(request.wants, gpus, self.config.limits)
        changed = advance(lease, LeaseEvent.CHANGE, self.clock.now_ns(), wants=request.wants)
        self._plan(changed, "cannot be changed")
        self._put(changed)
        self._save()
        self.update()
        return self.find(lease_id), await self._outcomes_of(changed, request.wait_s)

    def heartbeat(self, lease_id: str) -> Lease:
        """Renew the TTL; the file follows within a second."""
        lease = self._put(advance(self.live(lease_id), LeaseEvent.HEARTBEAT, self.clock.now_ns()))
        self.update()
        return lease

    def attach(self, lease_id: str) -> Lease:
        """Its connection has come (again)."""
        before = self.live(lease_id)
        lease = self._put(advance(before, LeaseEvent.ATTACH, self.clock.now_ns()))
        if before.state is not lease.state:
            self.events.add("lease_reattached", subject=lease_id)
            self._save()
        self.update()
        return lease

    async def release(self, lease_id: str, wait_s: float = 2.0) -> tuple[Lease, tuple[Outcome, ...]]:
        """End it; returns when hw has undone the settings or handed them to the next want."""
        lease = self._end(self.live(lease_id), LeaseEvent.RELEASE)
        self.update()
        self._wake.set()
        return lease, await self._outcomes_of(lease, wait_s)

    def holder_gone(self, lease_id: str, event: LeaseEvent) -> None:
        """Its connection or its process ended: the settings are undone at once."""
        lease = self.leases.get(lease_id)
        if lease is not None:
            with contextlib.suppress(RequestError):
                self._end(lease, event)
                self.update()
                self._wake.set()

    def find(self, lease_id: str) -> Lease:
        """A lease, live or lately ended. RequestError(not_found) otherwise."""
        lease = self.leases.get(lease_id) or self.ended.get(lease_id)
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
        return next((x for x in self.leases.values() if token_matches(x, token)), None)

    def outcomes_of(self, lease: Lease) -> tuple[Outcome, ...]:
        """The newest outcome of every (GPU, control) of a lease."""
        return tuple(self.outcomes[k] for g in lease.gpus for w in lease.wants if (k := (g, w.control)) in self.outcomes)

    def _settled(self, lease: Lease) -> bool:
        for key in ((g, w.control) for g in lease.gpus for w in lease.wants if g not in lease.lost):
            value, seq = self._asked.get(key, (None, 0))
            setpoint = self.setpoints.get(key)
            if value != (setpoint.value if setpoint else None):
                return False  # not told yet
            if setpoint is not None and setpoint.deferred_until_ns is not None and lease.live:
                return False  # a step down that waits for its dwell
            if seq == 0:
                continue  # never asked for anything: it is at baseline
            outcome = self.outcomes.get(key)
            if outcome is None or outcome.seq < seq or outcome.requested != value or outcome.verdict is Verdict.PENDING:
                return False
        return True

    async def _outcomes_of(self, lease: Lease, wait_s: float) -> tuple[Outcome, ...]:
        deadline_ns = self.clock.now_ns() + from_seconds(wait_s)
        while not self._settled(lease) and (left_ns := deadline_ns - self.clock.now_ns()) > 0:
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_ns / NS):
                    await self._news.wait()
        current = {(o.uuid, o.control): o for o in self.outcomes_of(lease)}
        answer = []
        for gpu in lease.gpus:
            for want in lease.wants:
                key = (gpu, want.control)
                value, seq = self._asked.get(key, (None, 0))
                outcome = current.get(key)
                if outcome is None or outcome.seq < seq or outcome.requested != value:
                    outcome = Outcome(*key, seq=seq, requested=value, verdict=Verdict.PENDING)
                setpoint = self.setpoints.get(key)
                if lease.live and setpoint is not None and setpoint.deferred_until_ns is not None:
                    outcome = replace(outcome, verdict=Verdict.PENDING, detail="a step down waits for the minimum dwell")
                answer.append(outcome)
        return tuple(answer)

    # --- panic, quiesce, reload -------------------------------------------------------------------------------------------------

    def enter_panic(self, why: str) -> None:
        """Everything to baseline now; wants are refused until ``resume``, also after a restart."""
        if not self.panic:
            self.panic = True
            for lease in list(self.leases.values()):
                self._end(lease, LeaseEvent.PANIC)
            self.events.add("panic", detail=why)
        self._told_hw = ()
        self.update(force=True)
        self._save()

    def quiesce(self, max_s: float, why: str) -> None:
        """Baseline and no NVML handle for at most ``max_s``; leases stay and are set again afterwards."""
        if not 0 < max_s <= 86_400:
            raise RequestError(f"max_s {max_s:g} is outside 0..86400", code="bad_value")
        self.quiesced_until_ns = self.clock.now_ns() + from_seconds(max_s)
        self._told_hw = ()
        self.events.add("quiesced", detail=why, data={"max_s": max_s})
        self.update(force=True)

    def resume(self, why: str = "asked") -> str:
        """End panic and quiesce; RequestError while the panic file exists. The answer says what ended."""
        if Path(self.config.daemon.panic_file).exists():
            raise RequestError("the panic file is still there", hint=f"remove {self.config.daemon.panic_file}", code="conflict")
        ended = [name for name, on in (("panic", self.panic), ("quiesce", self.quiesced_until_ns is not None)) if on]
        self.panic, self.quiesced_until_ns = False, None
        if ended:
            self.events.add("resumed", detail=why, data={"ended": " and ".join(ended)})
        if self.node.hold and not ended:
            ended = [self.node.hold]  # powerd-hw held back on its own: a crash loop, or a panic that this powerd does not know
        self._told_hw = (frames.Command.PANIC,) if ended else self._told_hw
        self.update(force=True)
        self._save()
        return " and ".join(ended) + " ended" if ended else "there was nothing to end"

    def apply_config(self, config: Config) -> None:
        """Take over a new configuration; without control every lease ends."""
        before, self.config = self.config, config
        if before.daemon.control and not config.daemon.control:
            for lease in list(self.leases.values()):
                self._end(lease, LeaseEvent.REVOKE)
            if self.hw is not None and self.hw.connected:
                self._held, self._asked = {}, {}
                self.hw.send_desired([])
        self.update(force=True)
