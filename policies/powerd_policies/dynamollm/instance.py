"""The instance controller (DynamoLLM section IV, every 5 s): the cheapest clock of one instance that keeps TTFT and TBT.

House rules: it decides from what an engine's own metrics say, so the same object runs in simulation and in production; what is
not known, old or impossible means the highest clock; steps up are taken at once, steps down only after a dwell in which nothing
higher was needed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from powerd_policies.dynamollm.caution import missed
from powerd_policies.dynamollm.classes import Slo
from powerd_policies.dynamollm.engine_model import EngineModel
from powerd_policies.dynamollm.fleet import InstanceLoad

KV_PRESSURE: Final = 0.9  # of the KV memory: from here on requests are about to wait for memory
CV2: Final = (
    1.5  # squared coefficient of variation of prompts: that of the published conversation trace is 1.1, of the coding one 0.9
)
MARGIN: Final = 0.95  # of the TTFT is planned for
NEAR: Final = 0.97  # of the TBT: gaps seen above make the controller careful ...
CAUTION: Final = 0.05  # ... by at most this share of it
MISSED: Final = 0.25  # and by at most this share where gaps were above it: the model is wrong by as much
GROWTH: Final = 3.0  # standard deviations of what arrives in a period are expected on top of the batch
TBT_MARGIN: Final = 0.97  # of the TBT, which depends less on chance


@dataclass(frozen=True, slots=True)
class ClockDecision:
    """The SM clock that one instance shall have, and why."""

    clock_mhz: int
    reason: str


@dataclass(frozen=True, slots=True)
class _Step:
    """One clock's coefficients, flat for the hot loop."""

    clock_mhz: int
    prefill_token_s: float
    fixed_s: float
    alone_s: float
    request_s: float
    prefill_w: float
    decode_w: float
    log2_w: float
    idle_w: float


class InstanceController:
    """Holds one instance at the clock of least power that keeps ``slo`` for what runs, waits and is to come within a period.

    ``peers`` instances share the arrivals by load, this one among them: the more there are, the less one has to keep in hand.
    ``share_late`` of the requests may miss their TTFT. ``backs_off``: gaps measured above the promise mean the highest clock,
    whatever the model says. ``floor_mhz`` is what the pool above asks for at least, ``ceiling_mhz`` what a watt budget allows at
    most; None: nothing.
    Raises ValueError when ``model`` holds no clock for ``tp``.
    """

    def __init__(
        self,
        model: EngineModel,
        tp: int,
        slo: Slo,
        *,
        chunk_tokens: int = 512,
        clocks_mhz: Sequence[int] | None = None,
        peers: int = 1,
        share_late: float = 0.01,
        prompt_tokens: float = 1024.0,
        period_s: float = 5.0,
        dwell_s: float = 10.0,
        memory_s: float = 30.0,
        stale_s: float = 10.0,
        parking: bool = True,
        scaling: bool = True,
        backs_off: bool = True,
    ) -> None:
        allowed = [c for c in model.clocks_mhz(tp) if clocks_mhz is None or c in clocks_mhz]
        if not allowed:
            raise ValueError(
                f"the model {model.name} on {model.gpu} holds no clock for tensor parallelism {tp}: it holds {model.tps}"
            )
        self.tp, self.slo, self.chunk_tokens, self.peers = tp, slo, chunk_tokens, peers
        self.share_late, self.prompt_tokens = share_late, prompt_tokens
        self.period_s, self.dwell_s, self.memory_s, self.stale_s = period_s, dwell_s, memory_s, stale_s
        self.parking, self.scaling, self.backs_off = parking, scaling, backs_off
        self.floor_mhz: int | None = None
        self.ceiling_mhz: int | None = None
        self.max_mhz = allowed[0]
        self._steps = [_step(model, tp, clock) for clock in reversed(allowed)]
        self._recent: deque[tuple[float, float, float, float]] = deque()
        self._clock_mhz = self.max_mhz
        self._lower_s: float | None = None  # since when something lower would do
        self._lower_mhz = 0
        self._caution = 0.0
        self._park_mhz = self._parking_mhz()

    @property
    def clock_mhz(self) -> int:
        """The clock decided last; the highest before the first decision."""
        return self._clock_mhz

    def clock(self, now_s: float, load: InstanceLoad) -> ClockDecision:
        """Return the clock for the next period from what is known at ``now_s``, and the reason."""
        want_mhz, reason = self._wanted(now_s, load)
        if self.floor_mhz is not None and want_mhz < self.floor_mhz:
            want_mhz, reason = min(self.max_mhz, self.floor_mhz), "the pool's clock"
        decided = self._settle(now_s, want_mhz, reason)
        if self.ceiling_mhz is not None and decided.clock_mhz > self.ceiling_mhz:
            return ClockDecision(max(self.ceiling_mhz, self._steps[0].clock_mhz), "the watt budget")
        return decided

    def _settle(self, now_s: float, want_mhz: int, reason: str) -> ClockDecision:
        """Step up at once, and down to the highest clock wanted within the dwell."""
        if want_mhz >= self._clock_mhz:
            self._lower_s, self._clock_mhz = None, want_mhz
            return ClockDecision(want_mhz, reason)
        if self._lower_s is None:
            self._lower_s, self._lower_mhz = now_s, want_mhz
        self._lower_mhz = max(self._lower_mhz, want_mhz)
        if now_s - self._lower_s < self.dwell_s:
            return ClockDecision(self._clock_mhz, "lower after the dwell")
        self._lower_s, self._clock_mhz = None, self._lower_mhz
        return ClockDecision(self._clock_mhz, reason)

    def _wanted(self, now_s: float, load: InstanceLoad) -> tuple[int, str]:
        if not self.scaling:
            return self.max_mhz, "clocks are not scaled"
        if _impossible(load):
            return self.max_mhz, "metrics are impossible"
        if load.age_s > self.stale_s:
            return self.max_mhz, f"metrics are {load.age_s:.0f} s old"
        if load.kv_used_ratio is None or load.kv_used_ratio >= KV_PRESSURE:
            return self.max_mhz, "KV memory is not known" if load.kv_used_ratio is None else "KV memory is nearly full"
        rate, prompt, output = self._remember(now_s, load)
        if self.backs_off and missed(load, self.slo):
            self._learn(load)
            return self.max_mhz, "gaps were above the promise"
        if not load.running and not load.queued:
            if not self.parking:
                return self._steps[0].clock_mhz, "nothing to do"
            return self._park_mhz, "parked: nothing to do"
        return self._cheapest(load, rate, prompt, output)

    def _remember(self, now_s: float, load: InstanceLoad) -> tuple[float, float, float]:
        """Return the highest rates of requests, prompt and output tokens within the memory; what is not known is guessed high."""
        rate = load.requests_per_s
        prompt = load.prompt_tokens_per_s
        if prompt is None:
            prompt = (load.queued if rate is None else rate) * self.prompt_tokens
        if rate is None:
            rate = prompt / self.prompt_tokens
        self._recent.append((now_s, rate, prompt, load.output_tokens_per_s or 0.0))
        while self._recent[0][0] < now_s - self.memory_s:
            self._recent.popleft()
        return (max(r[1] for r in self._recent), max(r[2] for r in self._recent), max(r[3] for r in self._recent))

    def _cheapest(self, load: InstanceLoad, rate: float, prompt: float, output: float) -> tuple[int, str]:
        """Return the feasible clock of least modelled power."""
        slo, chunk = self.slo, self.chunk_tokens
        ahead = load.queued_prompt_tokens
        tokens = float(load.queued * self.prompt_tokens if ahead is None else ahead)
        waited_s = load.oldest_wait_s or 0.0
        batch = load.running + load.queued + GROWTH * math.sqrt(rate * self.period_s)
        floor = self.floor_mhz
        mean = prompt / rate if rate > 0 else self.prompt_tokens
        limit_s = (TBT_MARGIN - self._learn(load)) * slo.tbt_s
        best, best_w, lacks = None, math.inf, "TBT"
        for step in self._steps:
            decode_s = step.fixed_s + step.request_s * batch
            room = max(1.0, chunk - batch)
            full_s = decode_s + step.prefill_token_s * room
            if full_s > limit_s:
                lacks = "TBT"
                continue
            token_s = full_s / room
            if waited_s + tokens * token_s > MARGIN * slo.ttft_s:
                lacks = "TTFT of what waits"
                continue
            if floor is not None:  # what is to come is the pool's business, which sees all of it
                if step.clock_mhz >= floor:
                    return step.clock_mhz, "the pool's clock" if step.clock_mhz == floor else "more than the pool's clock"
                continue
            if not _keeps(prompt * token_s, mean * token_s, slo.ttft_s * MARGIN - full_s, self.peers, self.share_late):
                lacks = "TTFT"
                continue
            power_w = _power_w(step, prompt, output, load.running)
            if power_w < best_w:
                best, best_w = step, power_w
        if best is None:
            return self.max_mhz, f"no clock keeps {lacks}"
        return best.clock_mhz, "least power that keeps TTFT and TBT"

    def _learn(self, load: InstanceLoad) -> float:
        """Return the share of the TBT that is kept back: more when gaps were seen close to it, forgotten slowly."""
        if load.tbt_p99_s is not None:
            over = load.tbt_p99_s / self.slo.tbt_s
            if over > NEAR:
                most = MISSED if over > 1.0 and self.backs_off else CAUTION
                self._caution = max(self._caution, min(most, self._caution + 0.25 * most))
            else:
                self._caution *= 0.99
        return self._caution

    def _parking_mhz(self) -> int:
        """The lowest clock at which a lone request of ordinary length, arriving while parked, keeps its SLO."""
        for step in self._steps:
            rounds = math.ceil(self.prompt_tokens / self.chunk_tokens)
            full_s = step.alone_s + step.prefill_token_s * self.chunk_tokens
            if rounds * full_s <= MARGIN * self.slo.ttft_s and step.fixed_s + step.request_s <= MARGIN * self.slo.tbt_s:
                return step.clock_mhz
        return self.max_mhz


def _impossible(load: InstanceLoad) -> bool:
    """Whether a figure is negative, endless or no number."""
    told: list[float | None] = [load.running, load.queued, load.queued_prompt_tokens, load.kv_used_ratio, load.oldest_wait_s]
    told += [load.requests_per_s, load.prompt_tokens_per_s, load.output_tokens_per_s, load.age_s]
    return any(figure is not None and not 0 <= figure < math.inf for figure in told)


def _step(model: EngineModel, tp: int, clock_mhz: int) -> _Step:
    c = model.table[tp, clock_mhz]
    times = (c.prefill_token_s, c.decode_fixed_s, max(c.prefill_fixed_s, c.decode_fixed_s), c.decode_request_s)
    return _Step(clock_mhz, *times, c.prefill_w, c.decode_w, c.decode_log2_w, c.idle_w)


def _keeps(busy: float, service_s: float, left_s: float, peers: int, share_late: float) -> bool:
    """Whether at most ``share_late`` of prompts wait longer than ``left_s``: a queue of ``peers`` servers (Sakasegawa's form)."""
    if left_s <= 0 or busy >= 1:
        return False
    if busy <= 0:
        return True
    waits = busy ** (math.sqrt(2.0 * (peers + 1)) - 1.0)
    scale_s = service_s * (1.0 + CV2) / (2.0 * peers * (1.0 - busy))
    return bool(waits * math.exp(-left_s / scale_s) <= share_late)


def _power_w(step: _Step, prompt: float, output: float, running: int) -> float:
    """Modelled watts of one GPU at a clock in the steady state of these rates (tokens/s)."""
    prefill = min(1.0, prompt * step.prefill_token_s)
    spare = 1.0 - prefill - output * step.request_s
    batch = max(output * step.fixed_s / spare, 1e-9) if spare > 0 else float(max(running, 1))
    busy = min(1.0 - prefill, 1.0 if batch > 8 else 1.0 - math.exp(-batch))
    decode_w = step.decode_w + step.log2_w * math.log2(max(batch, 1.0) + 1.0)
    return prefill * step.prefill_w + busy * decode_w + (1.0 - prefill - busy) * step.idle_w
