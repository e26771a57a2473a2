"""What is known of the controls of one GPU: what powerd is told, what the sampler sees of them, who has changed them.

House rules: nothing here calls the driver; what was settled is told anew under a new number, never asked anew; while a clock plan
moves a clock its outcome is told once in a while, a failure at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

from powerd.clock import NEVER_NS, NS, Clock
from powerd.config import Config
from powerd.hw import verify
from powerd.hw.journal import Journal
from powerd.hw.pair import Pair, failed, found, is_news, look
from powerd.model import Control, Outcome, Reading, Restart, Verdict

RETRY_NS = NS // 2
RETRY_MAX_NS = 30 * NS
TELL_NS = NS  # of a clock that a plan moves
_QUIET_NS = 60 * NS  # without drift for this long, enforcing starts over with its shortest pause

Emit = Callable[[Outcome], None]
Tell = Callable[..., None]  # kind, uuid, subject, detail, **data


class Judge:
    """The pairs of one GPU with their outcomes."""

    def __init__(self, uuid: str, config: Config, clock: Clock, journal: Journal, emit: Emit, tell: Tell) -> None:
        self.uuid = uuid
        self.changed: Callable[[], None] = lambda: None  # wakes the setter thread
        self._config, self._clock, self._journal, self._emit, self._tell = config, clock, journal, emit, tell
        self._lock = threading.RLock()
        self._busy: tuple[int, float, str, Pair] | None = None  # since, deadline_s, what, pair
        self._pairs: Mapping[Control, Pair] = {control: Pair(control) for control in Control}
        for control, pair in self._pairs.items():
            if journal.entry(uuid, control) is not None:
                pair.touched, pair.cause = True, Restart.JOURNAL_REPLAY

    # answers

    def _answer(self, pair: Pair, verdict: Verdict, *, detail: str = "", nvml_code: int = 0) -> None:
        self._send(pair, failed(pair, self.uuid, verdict, detail, nvml_code))

    def _send(self, pair: Pair, outcome: Outcome) -> None:
        pair.outcome, pair.untold, pair.told_ns = outcome, False, self._clock.now_ns()
        if outcome.verdict is not Verdict.PENDING:
            pair.answered = True
        self._emit(outcome)

    def _repeat(self, pair: Pair) -> None:
        """The wish is what is held already: answer with what is known, under the new number."""
        last = pair.outcome
        if last is not None and last.verdict is not Verdict.PENDING:
            self._send(pair, replace(last, seq=pair.seq, requested=pair.wish, received_ns=pair.received_ns))

    # what the sampler sees

    def observe(self, reading: Reading, slow_ns: int) -> None:
        """Judge every held pair by one reading (its slow part was read at ``slow_ns``): verification and drift."""
        for pair in self._pairs.values():
            if pair.held is None or pair.wish is None or pair.yielded or self._busy is not None:
                continue
            with self._lock:
                if pair.held is None or pair.held != pair.goal or pair.outcome is None:
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
        self._send(pair, found(replace(last, seq=pair.seq), finding, self._clock.now_ns()))

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
            pair.retry_ns = now_ns + (min(RETRY_NS << min(pair.drifts, 10), RETRY_MAX_NS) if pair.drifts > 1 else 0)
            pair.held = None
        else:
            pair.yielded, pair.touched, pair.held, pair.promised = True, False, None, None
            # the setting is somebody else's now: what they chose is not ours to undo
            self._journal.restored(self.uuid, pair.control)
        if pair.outcome is not None:
            self._send(pair, found(replace(pair.outcome, seq=pair.seq), finding, self._clock.now_ns()))
        self._tell("drift", self.uuid, pair.control.value, finding.detail, policy=policy)
        self.changed()
        return True

    # a clock that a plan moves

    def _followed(self, pair: Pair, done: Outcome) -> None:
        """A clock of a plan is set: what was known of the setpoint stays known, and is told once in a while."""
        with self._lock:
            last = pair.outcome
            if last is not None and last.requested == pair.wish and last.verdict is not Verdict.FAILED:
                done = replace(done, verdict=last.verdict, observed=last.observed, verified_ns=last.verified_ns)
            pair.outcome, pair.untold = replace(done, detail="set by a clock plan"), True

    def _summarise(self, pair: Pair, now_ns: int) -> int:
        """Tell the newest outcome of a clock that a plan moves, unless one was told a moment ago; when to ask again."""
        if now_ns < pair.told_ns + TELL_NS:
            return pair.told_ns + TELL_NS
        if pair.outcome is not None and pair.wish is not None:
            self._send(pair, replace(pair.outcome, seq=pair.seq))
        pair.untold = False
        return NEVER_NS
