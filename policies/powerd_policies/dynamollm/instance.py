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
from powerd_policies.dynamollm.classes import PromptSlo, Slo
from powerd_policies.dynamollm.engine_model import EngineModel
from powerd_policies.dynamollm.fleet import InstanceLoad
from powerd_policies.dynamollm.waits import CV2, MARGIN, Promised, Queue, mean_tokens, promised, spread

KV_PRESSURE: Final = 0.9  # of the KV memory: from here on requests are about to wait for memory
NOISE: Final = 1.0  # standard deviations of what arrives in the memory are expected on top of its mean
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


@dataclass(frozen=True, slots=True)
class _Coming:
    """What is to be expected of prompts, and who is promised what."""

    classes: tuple[Promised, ...]
    tokens_per_s: float
    mean_tokens: float  # of one prompt
    cv2: float
    ahead_tokens: float  # that wait already


class InstanceController:
    """Holds one instance at the clock of least power that keeps ``slo`` for what runs, waits and is to come within a period.

    ``classes``, the shortest prompts first, have TTFTs of their own: that of ``slo`` is then that of all longer ones. Each class
    is judged by the lengths that the load tells of it, or all by the strictest TTFT where it tells none. Infinite: no promise.
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
        classes: Sequence[PromptSlo] = (),
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
        self._classes = (*classes, PromptSlo(None, slo.ttft_s)) if math.isfinite(slo.ttft_s) else ()
        self._strictest_s = min((each.ttft_s for each in self._classes), default=math.inf)
        self._unknown = tuple(Promised(each.ttft_s, ((1.0, 1.0),)) for each in self._classes)  # whose lengths are not known
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
        if not self._classes and load.queued > load.running:  # no TTFT is promised, but neither shall a queue grow for ever
            return self.max_mhz, "more requests wait than run"
        return self._cheapest(now_s, load, rate, prompt, output)

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

    def _cheapest(self, now_s: float, load: InstanceLoad, rate: float, prompt: float, output: float) -> tuple[int, str]:
        """Return the feasible clock of least modelled power."""
        slo, chunk = self.slo, self.chunk_tokens
        coming = self._coming(now_s, load, rate, prompt)
        waited_s = load.oldest_wait_s or 0.0
        batch = load.running + load.queued + GROWTH * math.sqrt(rate * self.period_s)
        floor = self.floor_mhz
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
            if waited_s + coming.ahead_tokens * token_s > MARGIN * self._strictest_s:
                lacks = "TTFT of what waits"
                continue
            if floor is not None:  # what is to come is the pool's business, which sees all of it
                if step.clock_mhz >= floor:
                    return step.clock_mhz, "the pool's clock" if step.clock_mhz == floor else "more than the pool's clock"
                continue
            queue = Queue(coming.tokens_per_s * token_s, coming.mean_tokens * token_s, self.peers, coming.cv2)
            if any(each.late(queue, room, full_s, decode_s) > self.share_late for each in coming.classes):
                lacks = "TTFT"
                continue
            power_w = _power_w(step, prompt, output, load.running)
            if power_w < best_w:
                best, best_w = step, power_w
        if best is None:
            return self.max_mhz, f"no clock keeps {lacks}"
        return best.clock_mhz, "least power that keeps TTFT and TBT"

    def _coming(self, now_s: float, load: InstanceLoad, rate: float, prompt: float) -> _Coming:
        """Return what is to be expected of prompts, ``rate`` and ``prompt`` being the highest rates within the memory.

        To take the highest rate of a few seconds for that of all times asks for more than is needed, but who does not know how
        long prompts are has no better guard. Who knows expects the mean of the memory, and what chance may add to it.
        """
        bands, ahead = load.prompt_bands, load.queued_prompt_tokens
        if not bands:
            waits = load.queued * self.prompt_tokens if ahead is None else ahead
            mean = prompt / rate if rate > 0 else self.prompt_tokens
            return _Coming(self._unknown, prompt, mean, CV2, float(waits))
        seen = len(self._recent)
        rate, prompt = sum(r[1] for r in self._recent) / seen, sum(r[2] for r in self._recent) / seen
        requests = max(1.0, rate * (now_s - self._recent[0][0]))
        cv2, mean = spread(bands), prompt / rate if rate > 0 else self.prompt_tokens
        if ahead is None:  # those that wait and one that is in prefill, as long as prompts are now
            _, rate_now, prompt_now, _ = self._recent[-1]
            ordinary = max(mean_tokens(bands), prompt_now / rate_now if rate_now > 0 else 0.0)
            waits = (load.queued + 1) * ordinary if load.queued else 0.0
        else:
            waits = ahead
        more = NOISE * math.sqrt((1.0 + cv2) / requests)
        return _Coming(promised(self._classes, bands), prompt * (1.0 + more), mean, cv2, float(waits))

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
        """The lowest clock at which a lone request of ordinary length, of each class, that arrives while parked keeps its SLO."""
        for step in self._steps:
            full_s = step.alone_s + step.prefill_token_s * self.chunk_tokens
            rounds = [(ttft_s, math.ceil(tokens / self.chunk_tokens)) for ttft_s, tokens in self._lone()]
            in_time = all(count * full_s <= MARGIN * ttft_s for ttft_s, count in rounds)
            if in_time and step.fixed_s + step.request_s <= MARGIN * self.slo.tbt_s:
                return step.clock_mhz
        return self.max_mhz

    def _lone(self) -> list[tuple[float, float]]:
        """(TTFT, tokens) of one prompt of each class, as near to an ordinary one as the class allows."""
        found, over = [], 0
        for each in self._classes:
            upto = math.inf if each.max_prompt_tokens is None else each.max_prompt_tokens
            found.append((each.ttft_s, min(max(over + 1, self.prompt_tokens), upto)))
            over = each.max_prompt_tokens or 0
        return found


def _impossible(load: InstanceLoad) -> bool:
    """Whether a figure is negative, endless or no number."""
    told: list[float | None] = [load.running, load.queued, load.queued_prompt_tokens, load.kv_used_ratio, load.oldest_wait_s]
    told += [load.requests_per_s, load.prompt_tokens_per_s, load.output_tokens_per_s, load.age_s]
    return any(figure is not None and not 0 <= figure < math.inf for figure in told)


def _step(model: EngineModel, tp: int, clock_mhz: int) -> _Step:
    c = model.table[tp, clock_mhz]
    times = (c.prefill_token_s, c.decode_fixed_s, max(c.prefill_fixed_s, c.decode_fixed_s), c.decode_request_s)
    return _Step(clock_mhz, *times, c.prefill_w, c.decode_w, c.decode_log2_w, c.idle_w)


def _power_w(step: _Step, prompt: float, output: float, running: int) -> float:
    """Modelled watts of one GPU at a clock in the steady state of these rates (tokens/s)."""
    prefill = min(1.0, prompt * step.prefill_token_s)
    spare = 1.0 - prefill - output * step.request_s
    batch = max(output * step.fixed_s / spare, 1e-9) if spare > 0 else float(max(running, 1))
    busy = min(1.0 - prefill, 1.0 if batch > 8 else 1.0 - math.exp(-batch))
    decode_w = step.decode_w + step.log2_w * math.log2(max(batch, 1.0) + 1.0)
    return prefill * step.prefill_w + busy * decode_w + (1.0 - prefill - busy) * step.idle_w
