"""How much a fleet of like instances holds together: pooled, because requests go to whichever instance has least to do.

House rules: closed forms only (no simulation, no search in time), so that a planner may ask thousands of times; every request
has to keep its own TTFT and TBT, so the answer is the share that does, by class; rates are per second, powers of all GPUs.

What is modelled: iterations carry a full chunk of some prompt beside the decoding batch, and such an iteration is the gap that
the SLO of TBT sees; prompts wait for their turn as in a queue with as many servers as there are instances (Sakasegawa's form of
the M/G/n queue), so the headroom shrinks with the square root of the fleet; the batch fluctuates as in a system without queue.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from powerd_policies.dynamollm.classes import NAMES, Classes
from powerd_policies.dynamollm.engine_model import Coefficients, EngineModel
from powerd_policies.dynamollm.predictor import Rate

KV_SAFE: Final = 0.85  # of the KV memory is planned with
SPREAD: Final = 2.0  # standard deviations of all batches together that are kept in hand
UNEVEN: Final = 0.7  # and of each by itself: requests are shared out by their prompts, not by how many decode where


Demand = Mapping[str, Rate]  # by class


def total_of(demand: Demand) -> Rate:
    """Return the load of all classes together."""
    requests = prompt = output = 0.0
    for rate in demand.values():
        requests += rate.requests_per_s
        prompt += rate.prompt_tokens_per_s
        output += rate.output_tokens_per_s
    return Rate(requests, prompt, output)


def scaled(demand: Demand, factor: float) -> dict[str, Rate]:
    """Return ``factor`` times the demand."""
    return {
        name: Rate(rate.requests_per_s * factor, rate.prompt_tokens_per_s * factor, rate.output_tokens_per_s * factor)
        for name, rate in demand.items()
    }


@dataclass(frozen=True, slots=True)
class Lengths:
    """What is known beforehand of one class: mean tokens, prompts as (weight, tokens) pairs, and its share of all requests."""

    prompt_tokens: float
    output_tokens: float
    prompts: tuple[tuple[float, float], ...]  # weights add up to 1
    share: float = 1 / 9


def measured(classes: Classes, requests: Iterable[tuple[int, int]]) -> dict[str, Lengths]:
    """Return the lengths of each class in a past trace of (prompt tokens, output tokens); of those it has."""
    seen: dict[str, list[tuple[int, int]]] = {}
    for prompt, output in requests:
        name = classes.name(prompt, output)
        if name is not None:
            seen.setdefault(name, []).append((prompt, output))
    total = sum(map(len, seen.values()))
    found = {}
    for name, pairs in seen.items():
        prompts = sorted(prompt for prompt, _ in pairs)
        at = [(weight, float(prompts[min(len(prompts) - 1, int(q * len(prompts)))])) for weight, q in _QUANTILES]
        outputs = sum(output for _, output in pairs)
        found[name] = Lengths(sum(prompts) / len(pairs), outputs / len(pairs), tuple(at), len(pairs) / total)
    return found


_QUANTILES: Final = ((0.5, 0.3), (0.35, 0.75), (0.1, 0.93), (0.05, 0.98))  # weight of a band of prompts, and the quantile for it


def assumed(classes: Classes) -> dict[str, Lengths]:
    """Return lengths from the classes' bounds alone, for a service of which nothing is known: the middle and the end of each."""
    low_in, high_in = (32, *classes.prompt_bounds[:2]), classes.prompt_bounds
    low_out, high_out = (16, *classes.output_bounds), (*classes.output_bounds, 2 * classes.output_bounds[1])
    found = {}
    for n, name in enumerate(NAMES):
        low, high = low_in[n // 3], high_in[n // 3] - 1
        mean = math.sqrt(low * high)  # lengths fall off towards long ones
        out = (low_out[n % 3] + high_out[n % 3]) / 2
        found[name] = Lengths(mean, out, ((0.85, mean), (0.15, float(high))))
    return found


@dataclass(frozen=True, slots=True)
class Service:
    """What ``n`` instances of one kind do with a demand; ``power_w`` is of all their GPUs."""

    feasible: bool
    lacks: str  # what fails first and for which class; empty when feasible
    late: float  # share of all requests that miss
    batch: float  # requests in decode per instance
    iteration_s: float  # with a full chunk, at a high batch
    busy: float  # share of the prompt capacity in use
    power_w: float


@dataclass(frozen=True, slots=True)
class _Known:
    ttft_s: float  # planned with
    tbt_s: float
    prompts: tuple[tuple[float, float], ...]
    second: float  # mean square of its prompts


@dataclass(frozen=True)
class Capacity:
    """Answers what a fleet of one model holds.

    ``share_late`` of all requests and ``class_late`` of each class may miss; ``margin`` of TTFT, which depends on chance, and
    ``tbt_margin`` of TBT, which does not, are planned with.
    """

    model: EngineModel
    classes: Classes
    lengths: Mapping[str, Lengths]
    chunk_tokens: int = 512  # of one iteration: first those that decode, the rest is of prompts
    share_late: float = 0.005
    class_late: float = 0.03
    margin: float = 0.95
    tbt_margin: float = 0.985
    uneven: float = UNEVEN  # 0 where requests are shared out by how many decode where
    _known: dict[str, _Known] = field(default_factory=dict, repr=False, compare=False)

    def _of(self, name: str) -> _Known:
        """Return what the inner loop needs of a class, worked out once."""
        found = self._known.get(name)
        if found is None:
            slo, prompts = self.classes.slos[name], self.lengths[name].prompts
            second = sum(weight * tokens * tokens for weight, tokens in prompts)
            found = _Known(self.margin * slo.ttft_s, self.tbt_margin * slo.tbt_s, prompts, second)
            self._known[name] = found
        return found

    def serve(self, tp: int, clock_mhz: int, n: int, demand: Demand) -> Service:
        """Return how ``n`` instances at ``tp`` and ``clock_mhz`` serve ``demand``; KeyError when the model has no such point."""
        at = self.model.table[tp, clock_mhz]
        total = total_of(demand)
        idle = Service(True, "", 0.0, 0.0, at.decode_fixed_s, 0.0, n * tp * at.idle_w)
        if total.requests_per_s <= 0:
            return idle
        if n <= 0:
            return replace(idle, feasible=False, lacks=f"an instance for {min(demand)}", late=1.0)
        prompt, output = total.prompt_tokens_per_s / n, total.output_tokens_per_s / n
        spare = 1.0 - prompt * at.prefill_token_s - output * at.decode_request_s
        if spare <= 0.02:
            power_w = n * tp * max(at.prefill_w, at.decoding_w(64))
            return Service(False, "throughput for all classes", 1.0, math.inf, math.inf, 1.0, power_w)
        batch = output * at.decode_fixed_s / spare
        high = batch + (SPREAD / math.sqrt(n) + self.uneven) * math.sqrt(batch)
        decode_s = at.decode_fixed_s + at.decode_request_s * high
        room = max(1.0, self.chunk_tokens - high)
        full_s = decode_s + at.prefill_token_s * room
        busy = prompt * full_s / room
        power_w = n * tp * steady_w(at, prompt, output)
        lacks, late = self._late(at, n, demand, total, decode_s, room, busy)
        mean = total.prompt_tokens_per_s / total.requests_per_s + 0.5 * total.output_tokens_per_s / total.requests_per_s
        if not lacks and high * mean > KV_SAFE * self.model.kv_tokens[tp]:
            lacks, late = f"KV memory: {high * mean:.0f} tokens of {self.model.kv_tokens[tp]}", 1.0
        return Service(not lacks, lacks, late, batch, full_s, busy, power_w)

    def _late(
        self, at: Coefficients, n: int, demand: Demand, total: Rate, decode_s: float, room: float, busy: float
    ) -> tuple[str, float]:
        """Return what fails first and the share of all requests that miss."""
        if busy >= 0.98:
            return "throughput of prompts for all classes", 1.0
        full_s = decode_s + at.prefill_token_s * room
        square = 0.0
        for name, rate in demand.items():
            if rate.requests_per_s > 0:
                known = self._of(name)
                if full_s > known.tbt_s:
                    return f"TBT of {name}: an iteration takes {1e3 * full_s:.0f} ms", 1.0
                square += rate.requests_per_s * known.second
        mean = total.prompt_tokens_per_s / total.requests_per_s
        cv2 = max(0.2, square / total.requests_per_s / (mean * mean) - 1.0) if mean > 0 else 1.0
        waits = busy ** (math.sqrt(2.0 * (n + 1)) - 1.0)
        per_s = 2.0 * n * (1.0 - busy) / ((1.0 + cv2) * max(mean * full_s / room, 1e-6))
        lacks, late, exp, token_s, half_s = "", 0.0, math.exp, at.prefill_token_s, 0.5 * decode_s
        for name, rate in demand.items():
            if rate.requests_per_s <= 0:
                continue
            known, missed = self._of(name), 0.0
            for weight, tokens in known.prompts:
                rounds = -int(-tokens // room) or 1
                left_s = known.ttft_s - rounds * decode_s - tokens * token_s - half_s
                missed += weight * (waits * exp(-left_s * per_s) if left_s > 0 else 1.0)
            if missed > self.class_late and not lacks:
                lacks = f"TTFT of {name}: {100 * missed:.1f} % miss"
            late += missed * rate.requests_per_s / total.requests_per_s
        if late > self.share_late and not lacks:
            lacks = f"TTFT of all classes: {100 * late:.1f} % miss"
        return lacks, late

    def least(self, tp: int, clock_mhz: int, demand: Demand, most: int) -> int | None:
        """Return the fewest instances that keep ``demand``, None when ``most`` do not."""
        if not self.serve(tp, clock_mhz, most, demand).feasible:
            return None
        low, high = 0, most  # the fewest is above low and at most high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.serve(tp, clock_mhz, middle, demand).feasible else (middle, high)
        return high if total_of(demand).requests_per_s > 0 else 0

    def holds(self, tp: int, clock_mhz: int, n: int, demand: Demand) -> float:
        """Return the largest multiple of ``demand`` that ``n`` instances keep (0: none at all)."""
        low, high = 0.0, 1.0
        while high < 4096 and self.serve(tp, clock_mhz, n, scaled(demand, high)).feasible:
            low, high = high, 2.0 * high
        for _ in range(20):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self.serve(tp, clock_mhz, n, scaled(demand, middle)).feasible else (low, middle)
        return low


def steady_w(at: Coefficients, prompt: float, output: float) -> float:
    """Return the watts of one GPU of an instance in the steady state of ``prompt`` and ``output`` tokens per second."""
    prefill = min(1.0, prompt * at.prefill_token_s)
    spare = 1.0 - prefill - output * at.decode_request_s
    batch = output * at.decode_fixed_s / spare if spare > 1e-3 else 256.0
    decoding = (1.0 - prefill) * (1.0 if batch > 12 else 1.0 - math.exp(-batch))
    return prefill * at.prefill_w + decoding * at.decoding_w(max(1, round(batch))) + (1.0 - prefill - decoding) * at.idle_w
