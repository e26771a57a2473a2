"""What one instance does in the long run at a load: batch, iteration time, latency and power, without simulating it.

House rules: closed forms only, because controllers ask thousands of times; each approximation is named where it is made; an
instance that cannot keep up says which limit it hits, and has no latency (``None``), not a large one.

Continuous batching with chunked prefill (one iteration decodes one token of every running request and computes at most
``chunk_tokens`` of waiting prompts), Poisson arrivals, first come first served. A decoding request sees itself, the ``B`` others
that run and the prompt tokens that arrive, so one iteration takes ``T = fixed + request * (1 + B) + token * (prompt rate) * T``;
by Little ``B = (output rate) * T``; hence ``T = (fixed + request) / (1 - token * prompt rate - request * output rate)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from powerd.errors import RequestError
from powerd_policies.dynamollm.cells import rows
from powerd_policies.dynamollm.classes import Classes, Slo
from powerd_policies.dynamollm.engine_model import Coefficients, EngineModel
from powerd_policies.dynamollm.profile import Profile, ProfilePoint

Limit = Literal["compute", "chunk", "running", "kv"]
#: Loads of a tabulated profile, as shares of the most that the instance takes within its SLO.
LOADS = (0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_LEAST_RPS = 0.01
_Z99 = 2.33  # standard deviations of the 99th percentile
#: Gaps of a request that may be long without touching its own P99, n = 0, 1, ...: the mean number of long gaps at which 99 of 100
#: requests have no more than n of them (Poisson).
_RARE = (0.0101, 0.149, 0.436, 0.823, 1.279, 1.785, 2.330)


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long the requests of one class are, in tokens: means, the prompt's 99th percentile and second moments."""

    prompt_tokens: float
    output_tokens: float
    prompt_p99_tokens: float
    prompt_sq: float  # mean of the square
    output_sq: float

    @classmethod
    def of(cls, prompts: Sequence[float], outputs: Sequence[float]) -> Lengths:
        """The lengths of these requests; ValueError for none."""
        if not prompts or len(prompts) != len(outputs):
            raise ValueError(f"{len(prompts)} prompts and {len(outputs)} outputs: one of each per request")
        n = len(prompts)
        p99 = sorted(prompts)[min(math.ceil(0.99 * n), n) - 1]
        return cls(sum(prompts) / n, sum(outputs) / n, p99, sum(p * p for p in prompts) / n, sum(o * o for o in outputs) / n)

    @classmethod
    def fixed(cls, prompt_tokens: float, output_tokens: float) -> Lengths:
        """Every request of the same length."""
        return cls(prompt_tokens, output_tokens, prompt_tokens, prompt_tokens**2, output_tokens**2)


@dataclass(frozen=True, slots=True)
class Work:
    """One class's part of an instance's load."""

    requests_per_s: float
    lengths: Lengths


@dataclass(frozen=True, slots=True)
class Steady:
    """One instance in the long run. Latencies are None when it cannot keep up; ``limit`` says why."""

    requests_per_s: float
    batch: float  # mean number of requests in decode
    iteration_s: float | None  # mean, as a decoding request sees it
    utilisation: float  # share of the time that something is computed
    kv_ratio: float  # of the KV cache, mean
    ttft_p50_s: Mapping[str, float] | None  # by class
    ttft_p99_s: Mapping[str, float] | None
    tbt_p99_s: float | None
    power_w: float  # of one GPU
    limit: Limit | None = None

    @property
    def feasible(self) -> bool:
        """Whether it keeps up."""
        return self.limit is None

    def meets(self, slos: Mapping[str, Slo]) -> bool:
        """Whether it keeps up and every class that it serves keeps its SLO."""
        if self.ttft_p99_s is None or self.tbt_p99_s is None or self.limit is not None:
            return False
        return all(ttft_s <= slos[name].ttft_s and self.tbt_p99_s <= slos[name].tbt_s for name, ttft_s in self.ttft_p99_s.items())


def steady(
    coefficients: Coefficients, kv_tokens: int, mix: Mapping[str, Work], chunk_tokens: int = 512, max_running: int = 256
) -> Steady:
    """Return the steady state of one instance that serves ``mix``; never raises for a load that is too high.

    Approximations: arrivals are Poisson and the number in decode is that of an infinite server; prompts wait as in M/G/1 with
    the whole chunk as server (Pollaczek-Khinchine mean, exponential tail); a P99 is the sum of means and the root of the
    summed squares of what each part's P99 adds; a request's P99 gap is an iteration with the most prompt tokens to expect.
    """
    total = _Total.of(mix, chunk_tokens)
    if total.rps <= 0.0:
        return Steady(0.0, 0.0, None, 0.0, 0.0, {}, {}, 0.0, coefficients.idle_w)
    return _steady(coefficients, kv_tokens, total, chunk_tokens, max_running)


def by_clock(
    model: EngineModel, tp: int, mix: Mapping[str, Work], chunk_tokens: int = 512, max_running: int = 256
) -> dict[int, Steady]:
    """Return ``steady`` for every SM clock of ``tp``, the highest first."""
    total = _Total.of(mix, chunk_tokens)
    clocks = model.clocks_mhz(tp)
    if total.rps <= 0.0:
        return {clock: steady(model.table[tp, clock], model.kv_tokens[tp], mix) for clock in clocks}
    return {clock: _steady(model.table[tp, clock], model.kv_tokens[tp], total, chunk_tokens, max_running) for clock in clocks}


def chunk_for(coefficients: Coefficients, tbt_s: float, running: int, most: int = 2048) -> int:
    """Return the most prompt tokens that one iteration may compute beside ``running`` decoding requests within ``tbt_s`` seconds.

    In steps of 64, ``most`` at most; 0: not even one step fits, so that no chunk keeps this pace.
    """
    c = coefficients
    room_s = tbt_s - max(c.decode_fixed_s, c.prefill_fixed_s) - c.decode_request_s * running
    if room_s <= 0.0:
        return 0
    tokens = room_s / c.prefill_token_s if c.prefill_token_s > 0.0 else math.inf
    return int(min(tokens, most)) // 64 * 64


@dataclass(frozen=True, slots=True)
class _Total:
    """What of a mix does not depend on the instance."""

    rps: float
    prompt_rate: float  # tokens per second
    output_rate: float
    prompt_sq_rate: float  # squared tokens per second
    chunk_rate: float  # chunks per second, when no two prompts share one
    context_rate: float  # tokens in the KV cache, per second of iteration time
    prompt_p99: float  # of the class with the longest prompts that makes up 1 % of the requests
    worked: tuple[tuple[str, Work], ...]

    @classmethod
    def of(cls, mix: Mapping[str, Work], chunk_tokens: int) -> _Total:
        rps = prompt = output = square = chunks = context = longest = 0.0
        worked = tuple((name, work) for name, work in mix.items() if work.requests_per_s > 0.0)
        for _, work in worked:
            rate, lengths = work.requests_per_s, work.lengths
            rps += rate
            prompt += rate * lengths.prompt_tokens
            output += rate * max(lengths.output_tokens - 1.0, 0.0)  # the first token is the prefill's
            square += rate * lengths.prompt_sq
            chunks += rate * math.ceil(lengths.prompt_tokens / chunk_tokens)
            context += rate * (lengths.prompt_tokens * lengths.output_tokens + lengths.output_sq / 2)
        for _, work in worked:
            if work.requests_per_s >= 0.01 * rps:
                longest = max(longest, work.lengths.prompt_p99_tokens)
        return cls(rps, prompt, output, square, chunks, context, longest, worked)


def _steady(c: Coefficients, kv_tokens: int, total: _Total, chunk_tokens: int, max_running: int) -> Steady:
    both_s = max(c.decode_fixed_s, c.prefill_fixed_s)
    load = c.prefill_token_s * total.prompt_rate + c.decode_request_s * total.output_rate
    if load >= 1.0:
        return _overloaded(c, total, "compute")
    # Iterations with a prompt in them cost the larger fixed time; how many there are depends on T: one correction is enough.
    iteration_s = (c.decode_fixed_s + c.decode_request_s) / (1.0 - load)
    with_prompt = -math.expm1(-total.chunk_rate * iteration_s)
    fixed_s = c.decode_fixed_s + with_prompt * (both_s - c.decode_fixed_s)
    iteration_s = (fixed_s + c.decode_request_s) / (1.0 - load)
    batch = total.output_rate * iteration_s
    base_s = both_s + c.decode_request_s * batch
    full_s = base_s + c.prefill_token_s * chunk_tokens
    token_s = full_s / chunk_tokens  # of waiting, per prompt token ahead
    prefill_load = total.prompt_rate * token_s
    if prefill_load >= 1.0:
        return _overloaded(c, total, "chunk")

    wait_s = total.prompt_sq_rate * token_s**2 / (2.0 * (1.0 - prefill_load))
    wait_p99_s = wait_s / prefill_load * math.log(100.0 * prefill_load) if prefill_load > 0.01 else 0.0
    deviation = math.sqrt(batch)
    alone_s = c.prefill_token_s * total.prompt_rate + base_s * total.chunk_rate
    present = batch + total.rps * wait_s + min(alone_s, 1.0)
    busy = max(-math.expm1(-present), load)
    prompt_hi = _prompt_beside(total, iteration_s, chunk_tokens)
    worst_s = both_s + c.prefill_token_s * prompt_hi + c.decode_request_s * (1.0 + batch + _Z99 * deviation)

    p50: dict[str, float] = {}
    p99: dict[str, float] = {}
    for name, work in total.worked:
        mean, high = work.lengths.prompt_tokens, work.lengths.prompt_p99_tokens
        own_s = math.ceil(mean / chunk_tokens) * base_s + c.prefill_token_s * mean
        own_p99_s = math.ceil(high / chunk_tokens) * base_s + c.prefill_token_s * high
        rest_s = busy * iteration_s / 2.0  # of the iteration that runs when it arrives
        p50[name] = own_s + rest_s + wait_s * math.log(2.0) * prefill_load
        added = math.hypot(max(wait_p99_s - wait_s, 0.0), own_p99_s - own_s, busy * worst_s - rest_s)
        p99[name] = own_s + rest_s + wait_s + added

    kv_mean = total.context_rate * iteration_s + total.prompt_rate * (wait_s + full_s)
    kv_ratio = kv_mean / kv_tokens if kv_tokens else math.inf
    limit: Limit | None = None
    if batch + _Z99 * deviation > max_running:
        limit = "running"
    elif kv_ratio * (1.0 + _Z99 / math.sqrt(max(batch, 1.0))) > 1.0:
        limit = "kv"
    return Steady(total.rps, batch, iteration_s, busy, kv_ratio, p50, p99, worst_s, _power_w(c, total, batch, busy), limit)


def _prompt_beside(total: _Total, iteration_s: float, chunk_tokens: int) -> float:
    """Prompt tokens in the iterations that make a request's own P99 gap: of the longest prompt and of those beside it."""
    gaps = max(total.output_rate / total.rps, 1.0)
    ignored = min(int(0.006 * gaps), len(_RARE) - 1)  # of the shorter answers of the class, which feel one long gap more
    rare = min(_RARE[ignored] / gaps, 1.0)
    arriving = total.chunk_rate * iteration_s
    mean = total.prompt_rate / total.chunk_rate
    term = math.exp(-arriving)
    above = 1.0 - term  # the share of iterations with more than ``count`` chunks
    count, tokens = 0, 0.0
    while above > rare and tokens < chunk_tokens:
        tokens += mean if count or ignored >= 2 else total.prompt_p99  # the longest prompts are among the ignored
        count += 1
        term *= arriving / count
        above -= term
    return min(tokens, chunk_tokens)


def _power_w(c: Coefficients, total: _Total, batch: float, busy: float) -> float:
    """Watts of one GPU: prefill's seconds, decode's and the idle ones, of each second."""
    prefill_s = c.prefill_token_s * total.prompt_rate + math.exp(-batch) * c.prefill_fixed_s * total.chunk_rate
    prefill_s = min(prefill_s, busy)
    decoding_w = c.decode_w + c.decode_log2_w * math.log2(1.0 + batch / busy)
    return prefill_s * c.prefill_w + (busy - prefill_s) * decoding_w + (1.0 - busy) * c.idle_w


def _overloaded(c: Coefficients, total: _Total, limit: Limit) -> Steady:
    share = min(c.prefill_token_s * total.prompt_rate, 1.0)
    power_w = share * c.prefill_w + (1.0 - share) * c.decode_w
    return Steady(total.rps, math.inf, None, 1.0, math.inf, None, None, None, power_w, limit)


def profile_of(
    model: EngineModel,
    lengths: Mapping[str, Lengths],
    classes: Classes | None = None,
    chunk_tokens: int | Mapping[int, int] = 512,
    max_running: int = 256,
    loads: Sequence[float] = LOADS,
) -> Profile:
    """Return the modelled profile of every class of ``lengths`` at every parallelism and clock of ``model``.

    ``loads`` are shares of the most requests per second at which an instance keeps the class's SLO; one infeasible point beyond
    it follows, and a cell without any such load holds one infeasible point only. ``chunk_tokens`` may differ by parallelism.
    """
    slos = (classes or Classes()).slos
    points: list[ProfilePoint] = []
    for name, own in lengths.items():
        for (tp, clock_mhz), coefficients in sorted(model.table.items()):
            chunk = chunk_tokens if isinstance(chunk_tokens, int) else chunk_tokens[tp]

            def at(rps: float, name: str = name, own: Lengths = own, c: Coefficients = coefficients, tp: int = tp,
                   chunk: int = chunk) -> Steady:  # fmt: skip
                return steady(c, model.kv_tokens[tp], {name: Work(rps, own)}, chunk, max_running)

            most = _most(lambda rps, at=at, slos=slos: at(rps).meets(slos))  # type: ignore[misc]
            # Beyond: a little more than it holds, or where it holds nothing as little as makes sense to ask for.
            for rps in (*(share * most for share in loads), 1.05 * most) if most else (_LEAST_RPS,):
                seen = at(rps)
                if seen.ttft_p99_s is None or seen.tbt_p99_s is None:
                    continue  # overloaded: there is no such steady state
                power_w = tp * seen.power_w
                points.append(
                    ProfilePoint(
                        name, tp, clock_mhz, rps, power_w / rps, seen.ttft_p99_s[name], seen.tbt_p99_s, power_w, seen.meets(slos),
                        "modelled",
                    )
                )  # fmt: skip
    return Profile(points)


def lengths_of(trace: str, classes: Classes, name: str = "trace") -> dict[str, Lengths]:
    """The lengths of each class that occurs in a trace (CSV with ``ContextTokens,GeneratedTokens``), by class.

    Requests beyond the context limit have no class and are left out. RequestError naming line and column.
    """
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows(trace, name, ("ContextTokens", "GeneratedTokens")):
        prompt, output = row.number("ContextTokens", above=0.0), row.number("GeneratedTokens", above=0.0)
        if (own := classes.name(int(prompt), int(output))) is not None:
            prompts, outputs = found.setdefault(own, ([], []))
            prompts.append(prompt)
            outputs.append(output)
    if not found:
        raise RequestError(f"{name} holds no request within the context limit", code="bad_value")
    return {own: Lengths.of(*found[own]) for own in sorted(found)}


def _most(keeps: Callable[[float], bool]) -> float:
    """The highest load, to 0.1 %, that ``keeps``, which holds from 0 up to it; 0.0: not even 0.01/s."""
    if not keeps(_LEAST_RPS):
        return 0.0
    low, high = _LEAST_RPS, 2 * _LEAST_RPS
    while keeps(high):
        low, high = high, 2 * high
    while high - low > 1e-3 * low:
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low
