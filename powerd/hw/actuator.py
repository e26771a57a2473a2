"""THE only caller of setters: brings each (GPU, control) to what is desired, and back to baseline.

House rules: desired state in, never commands; the journal is on disk and the generation checked before every driver call; each
pair on its own, so that no failure of one keeps another from its baseline; applying twice is applying once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

from powerd.clock import NEVER_NS, NS, Clock
from powerd.config import Config
from powerd.errors import DeviceError
from powerd.hw import bounds, port, verify
from powerd.hw.fence import Fence
from powerd.hw.journal import Journal
from powerd.hw.pair import Act, Pair, decide, is_news, look
from powerd.hw.port import Device
from powerd.killpoint import killpoint
from powerd.model import Capabilities, Control, Interval, Outcome, Reading, Restart, Support, Verdict

_RETRY_NS = NS // 2
_RETRY_MAX_NS = 30 * NS
_QUIET_NS = 60 * NS  # without drift for this long, enforcing starts over with its shortest pause
_HOPELESS = frozenset({"no_permission", "not_supported", "bad_value"})  # asking again cannot help

Emit = Callable[[Outcome], None]
Tell = Callable[..., None]  # kind, uuid, subject, detail, **data


class Actuator:
    """All controls of one GPU; ``step`` runs in the GPU's setter thread, everything else in any."""

    def __init__(
        self,
        device: Device,
        capabilities: Capabilities,
        config: Config,
        clock: Clock,
        journal: Journal,
        fence: Fence,
        emit: Emit,
        tell: Tell,
    ) -> None:
        self.capabilities = capabilities
        self.uuid = device.gpu.uuid
        self.wedged = False
        self.changed: Callable[[], None] = lambda: None  # wakes the setter thread
        self._device, self._config, self._clock = device, config, clock
        self._journal, self._fence, self._emit, self._tell = journal, fence, emit, tell
        self._lock = threading.RLock()
        self._away = False
        self._busy: tuple[int, float, str, Pair] | None = None  # since, deadline_s, what, pair
        self._pairs: Mapping[Control, Pair] = {control: Pair(control) for control in Control}
        for control, pair in self._pairs.items():
            if journal.entry(self.uuid, control) is not None:
                pair.touched, pair.cause = True, Restart.JOURNAL_REPLAY

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
            pair.target = None
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
        elif pair.outcome is not None and (pair.held == pair.target or pair.yielded):
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

    def _repeat(self, pair: Pair) -> None:
        """The wish is what is held already: answer with what is known, under the new number."""
        last = pair.outcome
        if last is not None and last.verdict is not Verdict.PENDING:
            self._send(pair, replace(last, seq=pair.seq, requested=pair.wish, received_ns=pair.received_ns))

    # driver calls

    def step(self) -> int:
        """Do what is due; returns when to be called again if nothing changes before."""
        next_ns = NEVER_NS
        for pair in self._pairs.values():
            with self._lock:
                act, when_ns = (Act.NOTHING, NEVER_NS) if self._away else decide(pair, self._clock.now_ns())
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
        return next_ns

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
        killpoint("hw.intent.before")
        with self._lock:
            value, seq = pair.target, pair.seq
        if value is None:
            return
        entry = self._journal.entry(self.uuid, pair.control)
        baseline = entry.baseline if entry else self._baseline(pair)
        pair.touched = True
        self._journal.intend(self.uuid, pair.control, baseline, value)
        killpoint("hw.intent.written")
        try:
            called_ns, returned_ns = self._told(pair, value, "hw.call.before", "hw.call.returned")
        except DeviceError as error:
            if entry is None and error.code.name in _HOPELESS:  # refused at the door: nothing was changed, nothing to restore
                self._journal.restored(self.uuid, pair.control)
                pair.touched = False
            raise
        with self._lock:
            if pair.held is None or value.high < pair.held.high:
                pair.stepped_down_ns = returned_ns
            pair.held, pair.set_ns, pair.attempts, pair.retry_ns, pair.candidate = value, returned_ns, 0, 0, None
        done = Outcome(
            uuid=self.uuid, control=pair.control, seq=seq, requested=pair.wish, verdict=Verdict.PENDING, accepted=value,
            received_ns=pair.received_ns, called_ns=called_ns, returned_ns=returned_ns, detail=self._clamped(pair.wish, value),
        )  # fmt: skip
        killpoint("hw.readback.before")
        if pair.control is Control.POWER_LIMIT:
            self._watch(pair, "read power limit", self._config.hw.read_deadline_s)
            finding = verify.limit(value.high, *self._device.power_limits_mw())
            done = self._found(done, finding)
        killpoint("hw.verified")
        self._journal.done(self.uuid, pair.control, value)
        killpoint("hw.done.written")
        with self._lock:
            if pair.wish is not None and pair.target == value:
                self._send(pair, replace(done, seq=pair.seq))

    @staticmethod
    def _clamped(wish: Interval | None, value: Interval) -> str:
        return "" if wish == value or wish is None else f"{wish.low}..{wish.high} admitted as {value.low}..{value.high}"

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
            done = self._found(done, finding)
        self._journal.restored(self.uuid, pair.control)
        killpoint("hw.restore.written")
        with self._lock:
            pair.touched, pair.held, pair.attempts, pair.retry_ns = False, None, 0, 0
            pair.stepped_down_ns = 0
            cause = pair.cause
            if pair.wish is None:
                self._send(pair, replace(done, seq=pair.seq))
        value = "unlocked" if baseline is None else f"{baseline.low}..{baseline.high} {pair.control.unit}"
        if baseline is not None and baseline.low == baseline.high:
            value = f"{baseline.high} {pair.control.unit}"
        self._tell("restored", self.uuid, pair.control.value, f"{pair.control.value} back at {value}", cause=cause.value)

    def _failed(self, pair: Pair, error: DeviceError) -> None:
        with self._lock:
            pair.attempts += 1
            pair.held = None
            pause_ns = min(_RETRY_NS << min(pair.attempts - 1, 10), _RETRY_MAX_NS)
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

    # answers

    def _answer(self, pair: Pair, verdict: Verdict, *, detail: str = "", nvml_code: int = 0) -> None:
        self._send(
            pair,
            Outcome(
                uuid=self.uuid, control=pair.control, seq=pair.seq, requested=pair.wish, verdict=verdict, detail=detail,
                nvml_code=nvml_code, received_ns=pair.received_ns,
            ),
        )  # fmt: skip

    def _send(self, pair: Pair, outcome: Outcome) -> None:
        pair.outcome = outcome
        if outcome.verdict is not Verdict.PENDING:
            pair.answered = True
        self._emit(outcome)

    def _found(self, outcome: Outcome, finding: verify.Finding) -> Outcome:
        detail = "; ".join(
            part for part in (outcome.detail if finding.verdict is Verdict.PENDING else "", finding.detail) if part
        )
        return replace(
            outcome, verdict=finding.verdict, detail=detail, enforced=finding.enforced, observed=finding.observed,
            verified_ns=self._clock.now_ns(),
        )  # fmt: skip

    # what the sampler sees

    def observe(self, reading: Reading, slow_ns: int) -> None:
        """Judge every held pair by one reading (its slow part was read at ``slow_ns``): verification and drift."""
        for pair in self._pairs.values():
            if pair.held is None or pair.wish is None or pair.yielded or self._busy is not None:
                continue
            with self._lock:
                if pair.held is None or pair.held != pair.target or pair.outcome is None:
                    continue
                finding = look(pair, pair.held, reading, slow_ns)
                if finding is not None:
                    self._judge(pair, finding, reading.time_ns)

    def _judge(self, pair: Pair, finding: verify.Finding, now_ns: int) -> None:
        last = pair.outcome
        if last is None:
            return
        if finding.drift and self._drifted(pair, finding, now_ns):
            return
        if not is_news(pair, last, finding, now_ns):
            return
        self._send(pair, self._found(replace(last, seq=pair.seq), finding))

    def _drifted(self, pair: Pair, finding: verify.Finding, now_ns: int) -> bool:
        """Somebody else changed the setting: yield, warn or enforce; True when the judgement ends here."""
        policy = self._config.hw.drift
        known = pair.outcome is not None and pair.outcome.verdict is Verdict.OVERRIDDEN and pair.outcome.detail == finding.detail
        if policy == "warn":
            if not known:
                self._tell("drift", self.uuid, pair.control.value, finding.detail, policy=policy)
            return False
        if policy == "enforce":
            if now_ns < pair.retry_ns:
                return True
            pair.drifts = 1 if now_ns - pair.drift_ns > _QUIET_NS else pair.drifts + 1
            pair.drift_ns = now_ns
            pair.retry_ns = now_ns + (min(_RETRY_NS << min(pair.drifts, 10), _RETRY_MAX_NS) if pair.drifts > 1 else 0)
            pair.held = None
        else:
            pair.yielded, pair.touched, pair.held = True, False, None
            # the setting is somebody else's now: what they chose is not ours to undo
            self._journal.restored(self.uuid, pair.control)
        if pair.outcome is not None:
            self._send(pair, self._found(replace(pair.outcome, seq=pair.seq), finding))
        self._tell("drift", self.uuid, pair.control.value, finding.detail, policy=policy)
        self.changed()
        return True

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
