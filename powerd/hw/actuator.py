"""THE only caller of setters: brings each (GPU, control) to what is desired, and back to baseline.

House rules: desired state in, never commands; the journal is on disk and the generation checked before every driver call; each
pair on its own, so that no failure of one keeps another from its baseline; applying twice is applying once.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from dataclasses import replace

from powerd.clock import NEVER_NS, NS, Clock
from powerd.config import Config
from powerd.errors import DeviceError
from powerd.hw import bounds, port, verify
from powerd.hw.beats import GpuPlans
from powerd.hw.fence import Fence
from powerd.hw.journal import Journal
from powerd.hw.judge import RETRY_MAX_NS, RETRY_NS, TELL_NS, Emit, Judge, Tell
from powerd.hw.pair import Act, Pair, clamped, decide, found
from powerd.hw.plan import Order
from powerd.hw.port import Device
from powerd.killpoint import killpoint
from powerd.model import Capabilities, Control, Interval, Outcome, Restart, Support, Verdict

_HOPELESS = frozenset({"no_permission", "not_supported", "bad_value"})  # asking again cannot help


class Actuator(Judge):
    """All controls of one GPU; ``step`` runs in the GPU's setter thread, everything else in any."""

    def __init__(
        self, device: Device, capabilities: Capabilities, config: Config, clock: Clock, journal: Journal, fence: Fence,
        emit: Emit, tell: Tell,
    ) -> None:  # fmt: skip
        super().__init__(device.gpu.uuid, config, clock, journal, emit, tell)
        self.capabilities = capabilities
        self.wedged = False
        self.plans = GpuPlans(self.uuid, clock, tell, lambda: self.changed())  # noqa: PLW0108 (it is set later)
        self._device, self._fence = device, fence
        self._away = False

    # desired state in

    def want(self, rows: Mapping[Control, tuple[Interval | None, int, Restart]], seq: int, received_ns: int) -> None:
        """Take the rows of this GPU: control -> (value or None for baseline, dwell_ns, cause); what is absent is baseline."""
        with self._lock:
            for control, pair in self._pairs.items():
                row = rows.get(control)
                value, dwell_ns, cause = row or (None, 0, Restart.LEASE_END)
                if value is None and pair.wish is None:
                    if row and not pair.touched:
                        pair.seq, pair.received_ns = seq, received_ns
                        self._answer(pair, Verdict.APPLIED)
                    continue
                self._take(pair, value, dwell_ns, cause, seq, received_ns)
        self.changed()

    def _take(self, pair: Pair, value: Interval | None, dwell_ns: int, cause: Restart, seq: int, received_ns: int) -> None:
        new = value != pair.wish
        pair.wish, pair.seq, pair.received_ns, pair.cause = value, seq, received_ns, cause
        pair.dwell_ns = dwell_ns or round(self._config.hw.min_dwell_s * NS)
        if new:
            pair.attempts = pair.retry_ns = pair.drifts = 0
            pair.yielded, pair.refused, pair.candidate = False, None, None
            pair.target = pair.planned = None
        if value is None:
            pair.answered = False
            if not pair.touched:
                self._answer(pair, Verdict.APPLIED)
            return
        if new:
            self._admit(pair, value)
        pair.answered = False
        if pair.refused is not None:
            self._answer(pair, Verdict.FAILED, detail=str(pair.refused), nvml_code=pair.refused.nvml_code)
        elif not pair.follows and (pair.held == pair.goal or pair.yielded):
            self._repeat(pair)

    def clock_wanted(self) -> bool:
        """Whether a clock is set or being verified, so that every tick should see it."""
        return any(p.wish is not None and p.control is not Control.POWER_LIMIT for p in self._pairs.values())

    def _admit(self, pair: Pair, value: Interval) -> None:
        pair.target, pair.refused = None, None
        try:
            pair.target = bounds.admit(value, pair.control, self.capabilities, self._config.limits)
        except DeviceError as error:
            pair.refused = error

    def configure(self, config: Config) -> None:
        """A new configuration: what it still admits is not touched, the rest is cut to the new limits now or restored."""
        with self._lock:
            self._config = config
            with contextlib.suppress(DeviceError):  # no clock is left: the setpoint is refused and the plan ends with it
                self.plans.configure(self.capabilities, config.limits)
            for pair in self._pairs.values():
                refused_by_driver = pair.refused is not None and pair.target is not None
                if pair.wish is None or pair.yielded or refused_by_driver:
                    continue
                before = pair.target
                self._admit(pair, pair.wish)
                if pair.target == before:
                    continue
                pair.attempts = pair.retry_ns = pair.stepped_down_ns = 0  # a limit does not wait for the dwell
                pair.answered = False
                if pair.refused is not None:
                    self._answer(pair, Verdict.FAILED, detail=str(pair.refused), nvml_code=pair.refused.nvml_code)
        self.changed()

    def arm(self, order: Order, link: socket.socket) -> None:
        """Follow a clock plan below the setpoint of the SM clock. DeviceError, RequestError: it cannot be."""
        pair = self._pairs[Control.SM_CLOCK]
        with self._lock:
            if pair.wish is None or pair.yielded or pair.target is None:
                raise pair.refused or DeviceError("nothing holds the SM clock of this GPU", hint="hold a lease on it")
            limits = self._config.limits
        self.plans.arm(order, link, self.capabilities, limits)  # a long plan takes a while: beats of the present one go on
        self.changed()

    def _follow(self, now_ns: int) -> None:
        """What the clock plan, if there is one, makes of the setpoint now; called with the lock held."""
        pair = self._pairs[Control.SM_CLOCK]
        if self.plans.active and (pair.wish is None or pair.yielded or pair.target is None):
            self.plans.end_all(f"the setpoint of the SM clock has ended ({pair.cause.value})")
        pair.follows = self.plans.active
        pair.planned = None if pair.target is None else self.plans.follow(now_ns, pair.target)
        if pair.follows and not pair.answered and pair.held == pair.goal:
            self._repeat(pair)

    # driver calls

    def step(self) -> int:
        """Do what is due; returns when to be called again if nothing changes before."""
        next_ns = NEVER_NS
        for pair in self._pairs.values():
            with self._lock:
                now_ns = self._clock.now_ns()
                if pair.control is Control.SM_CLOCK:
                    self._follow(now_ns)
                act, when_ns = (Act.NOTHING, NEVER_NS) if self._away else decide(pair, now_ns)
                if pair.untold:
                    when_ns = min(when_ns, self._summarise(pair, now_ns))
            if act is Act.NOTHING:
                next_ns = min(next_ns, when_ns)
                continue
            try:
                (self._set if act is Act.SET else self._restore)(pair)
            except DeviceError as error:
                self._failed(pair, error)
            except OSError as error:
                self._failed(pair, DeviceError(f"journal: {error.strerror}", hint="free disk space", code="internal"))
            finally:
                self._busy, self.wedged = None, False
            with self._lock:
                next_ns = min(next_ns, decide(pair, self._clock.now_ns())[1])
                if pair.untold:
                    next_ns = min(next_ns, pair.told_ns + TELL_NS)
        return min(next_ns, self.plans.late_ns)

    def _watch(self, pair: Pair, what: str, deadline_s: float) -> int:
        now_ns = self._clock.now_ns()
        self._busy = (now_ns, deadline_s, what, pair)
        return now_ns

    def _baseline(self, pair: Pair) -> Interval | None:
        """What restored will mean, settled before the first write: declared, else the limit found now, else unlocked."""
        declared = bounds.declared_baseline(pair.control, self._config.baseline)
        if declared is not None or pair.control is not Control.POWER_LIMIT:
            return declared
        self._watch(pair, "read power limit", self._config.hw.read_deadline_s)
        requested_mw, enforced_mw = self._device.power_limits_mw()
        found_mw = requested_mw if requested_mw is not None else enforced_mw
        return None if found_mw is None else Interval(found_mw, found_mw)

    def _set(self, pair: Pair) -> None:
        with self._lock:
            value, seq, follows = pair.goal, pair.seq, pair.follows
            whole = pair.target if not follows or pair.target is None else self.plans.span(pair.target)
        if value is None or whole is None:
            return
        entry = self._journal.entry(self.uuid, pair.control)
        promised = pair.promised
        if entry is None or not follows or promised is None or promised.meet(value) != value:
            killpoint("hw.intent.before")
            baseline = entry.baseline if entry else self._baseline(pair)
            pair.touched, pair.promised = True, whole
            self._journal.intend(self.uuid, pair.control, baseline, whole)
            killpoint("hw.intent.written")
        try:
            called_ns, returned_ns = self._told(pair, value, "hw.call.before", "hw.call.returned")
        except DeviceError as error:
            if entry is None and error.code.name in _HOPELESS:  # refused at the door: nothing was changed, nothing to restore
                self._journal.restored(self.uuid, pair.control)
                pair.touched = False
            raise
        with self._lock:
            if not follows and (pair.held is None or value.high < pair.held.high):
                pair.stepped_down_ns = returned_ns
            pair.held, pair.set_ns, pair.attempts, pair.retry_ns = value, returned_ns, 0, 0
            pair.candidate = pair.candidate if follows else None
        done = Outcome(
            uuid=self.uuid, control=pair.control, seq=seq, requested=pair.wish, verdict=Verdict.PENDING, accepted=value,
            received_ns=pair.received_ns, called_ns=called_ns, returned_ns=returned_ns, detail=clamped(pair.wish, value),
        )  # fmt: skip
        if follows:
            self.plans.switched()
            killpoint("hw.plan.followed")
            self._followed(pair, done)
            return
        killpoint("hw.readback.before")
        if pair.control is Control.POWER_LIMIT:
            self._watch(pair, "read power limit", self._config.hw.read_deadline_s)
            finding = verify.limit(value.high, *self._device.power_limits_mw())
            done = found(done, finding, self._clock.now_ns())
        killpoint("hw.verified")
        self._journal.done(self.uuid, pair.control, value)
        killpoint("hw.done.written")
        with self._lock:
            if pair.wish is not None and pair.goal == value:
                self._send(pair, replace(done, seq=pair.seq))

    def _told(self, pair: Pair, value: Interval | None, before: str, after: str) -> tuple[int, int]:
        """One driver call behind the fence; ``None`` unlocks."""
        with self._fence.held():
            killpoint(before)
            called_ns = self._watch(pair, f"set {pair.control.value}", self._config.hw.write_deadline_s)
            if pair.control is Control.POWER_LIMIT:
                if value is not None:
                    self._device.set_power_limit(value.high)
            elif pair.control is Control.SM_CLOCK:
                self._device.unlock_sm_clock() if value is None else self._device.lock_sm_clock(value)
            else:
                self._device.unlock_memory_clock() if value is None else self._device.lock_memory_clock(value)
            returned_ns = self._clock.now_ns()
        killpoint(after)
        return called_ns, returned_ns

    def _restore(self, pair: Pair) -> None:
        entry = self._journal.entry(self.uuid, pair.control)
        baseline = bounds.declared_baseline(pair.control, self._config.baseline)  # it may have been declared since
        if baseline is None and entry is not None:
            baseline = entry.baseline
        if baseline is None:
            baseline = bounds.fallback_baseline(pair.control, self.capabilities, self._config.baseline)
        if baseline is not None and self.capabilities.controls[pair.control].available:
            baseline = bounds.admit(baseline, pair.control, self.capabilities, self._config.limits)
        called_ns, returned_ns = self._told(pair, baseline, "hw.restore.before", "hw.restore.called")
        done = Outcome(
            uuid=self.uuid, control=pair.control, seq=pair.seq, requested=None, verdict=Verdict.APPLIED, accepted=baseline,
            received_ns=pair.received_ns, called_ns=called_ns, returned_ns=returned_ns,
        )  # fmt: skip
        if pair.control is Control.POWER_LIMIT and baseline is not None:
            self._watch(pair, "read power limit", self._config.hw.read_deadline_s)
            finding = verify.limit(baseline.high, *self._device.power_limits_mw())
            if finding.drift:
                raise DeviceError(f"power limit not restored: {finding.detail}", code="busy")
            done = found(done, finding, self._clock.now_ns())
        self._journal.restored(self.uuid, pair.control)
        killpoint("hw.restore.written")
        with self._lock:
            pair.touched, pair.held, pair.attempts, pair.retry_ns = False, None, 0, 0
            pair.stepped_down_ns, pair.promised = 0, None
            cause = pair.cause
            if pair.wish is None:
                self._send(pair, replace(done, seq=pair.seq))
        value = bounds.shown(baseline, pair.control)
        self._tell("restored", self.uuid, pair.control.value, f"{pair.control.value} back at {value}", cause=cause.value)

    def _failed(self, pair: Pair, error: DeviceError) -> None:
        with self._lock:
            pair.attempts += 1
            pair.held = None
            pause_ns = min(RETRY_NS << min(pair.attempts - 1, 10), RETRY_MAX_NS)
            pair.retry_ns = self._clock.now_ns() + pause_ns
            if error.code.name in _HOPELESS and pair.wish is not None:
                pair.refused = error
            if error.code.name == "no_permission":
                self._learn(pair.control, str(error))
            if pair.wish is not None or pair.attempts == 1:
                self._answer(pair, Verdict.FAILED, detail=str(error), nvml_code=error.nvml_code)
        if error.code.name == "gpu_lost":
            self.lost()
        if pair.attempts == 1 or pair.wish is None:
            kind = "set_failed" if pair.wish is not None else "restore_failed"
            self._tell(kind, self.uuid, pair.control.value, str(error), nvml_code=error.nvml_code, attempt=pair.attempts)

    def _learn(self, control: Control, why: str) -> None:
        controls = {**self.capabilities.controls, control: Support(False, why)}
        self.capabilities = replace(self.capabilities, controls=controls)

    # trouble

    def overdue(self, now_ns: int) -> bool:
        """Whether a call of this GPU's setter thread has passed its deadline; answers its pair once."""
        busy = self._busy
        if busy is None or now_ns - busy[0] <= busy[1] * NS:
            return False
        if not self.wedged:
            self.wedged = True
            error = port.wedged(busy[2], busy[1])
            self._answer(busy[3], Verdict.FAILED, detail=str(error))
            self._tell("gpu_wedged", self.uuid, busy[3].control.value, str(error))
        return True

    def lost(self) -> None:
        """The GPU does not answer any more: stop asking until ``returned``."""
        with self._lock:
            if self._away:
                return
            self._away = True
            for pair in self._pairs.values():
                pair.held = None
                if pair.wish is not None:
                    self._answer(pair, Verdict.FAILED, detail="the GPU is lost", nvml_code=port.GPU_IS_LOST)

    def returned(self, device: Device) -> None:
        """The GPU is back (after a reset its settings are gone): everything is brought about anew."""
        with self._lock:
            self._device, self._away = device, False
            for pair in self._pairs.values():
                pair.held, pair.attempts, pair.retry_ns = None, 0, 0
        self.changed()

    def unsettled(self) -> list[Control]:
        """The controls that should be at baseline and are not known to be; none of a GPU that is gone (its journal stays)."""
        with self._lock:
            if self._away:
                return []
            return [c for c, p in self._pairs.items() if p.touched and p.wish is None]
