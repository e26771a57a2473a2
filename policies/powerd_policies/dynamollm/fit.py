"""Makes engine models from published measurements: latency at full clock is measured, power and the clock dimension are modelled.

House rules: what is assumed is a field of ``Assumptions`` with its reason, so that a benchmark can sweep it; a measurement that
cannot have been (more tokens than fit the memory) is left out by that rule, never by its value; fits minimise relative error.

Latency (measured): one iteration prefills at most ``iteration_tokens``, so a prompt of n tokens takes
``ceil(n / iteration_tokens) * prefill_fixed_s + n * prefill_token_s``; one decode iteration takes
``decode_fixed_s + B * decode_request_s``. Clock (modelled): ``t(f) = t * (share + (1 - share) * f_max / f)``.
Power (modelled): ``P(x) = off + M + D * x * V(x)^2`` with ``x = f / f_max`` and the voltage V flat below a knee; M is the
memory's part, in proportion to its use. A power limit makes the clock of a prefill smaller than the one that was asked for.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from powerd.errors import RequestError
from powerd_policies.dynamollm import cells
from powerd_policies.dynamollm.engine_model import Coefficients, EngineModel

LATENCY_COLUMNS = (
    "hardware", "prompt_size", "batch_size", "token_size", "peak_power", "average_power", "prompt_time", "token_time",
    "tensor_parallel",
)  # fmt: skip
BATCH_COLUMNS = ("Model", "GPU", "TP", "Energy/req (J)", "Token tput (tok/s)", "Avg Output Tokens", "Avg BS (reqs)")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU: what its maker and its owners say of it."""

    name: str
    hardware: str  # as the latency data call it
    limit_w: float
    off_w: float  # no context
    context_w: float  # weights loaded, nothing to do, at the highest clock
    memory_bytes: float
    memory_bytes_per_s: float
    clocks_mhz: tuple[int, ...]  # descending


@dataclass(frozen=True, slots=True)
class Llm:
    """A language model: its weights and what one token of context takes in the KV cache."""

    name: str
    weights_bytes: int
    kv_bytes_per_token: int


H100 = Gpu("h100", "h100-80gb", 700.0, 72.0, 121.7, 80e9, 3.35e12, (*range(1980, 800, -75), 810))
A100 = Gpu("a100", "a100-80gb", 400.0, 53.7, 80.0, 80e9, 2.04e12, tuple(range(1410, 560, -60)))
GPUS: Mapping[str, Gpu] = {gpu.name: gpu for gpu in (H100, A100)}
#: Grouped-query attention: 80 layers x 8 KV heads x 128 x (key, value) x 2 bytes.
LLAMA2_70B = Llm("llama2-70b", 138_000_000_000, 327_680)


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What no measurement here says; every one can be swept."""

    sensitivity: float = 1.0  # of decode to the clock: 0 = as bad as prefill, 1 = as suggested, more = better still
    prefill_share: float = 0.03  # of a prompt token's time, that no clock changes
    decode_fixed_share: float = 0.82  # of an iteration's fixed time (weights are read); t(f_max / 2) / t(f_max) = 1.25 at B = 16
    decode_request_share: float = 0.28  # of the time per request in it; 1.4 at B = 64
    knee: float = 0.77  # of f_max: below it the voltage is flat; measured on A100-SXM, 0.65 to 0.9 elsewhere
    floor_v: float = 0.826  # the voltage there, of the one at f_max; measured on A100-SXM
    limit_ratio: float = 0.95  # of its power limit a GPU draws steadily when the limit binds; measured 0.92 to 0.97
    memory_w: float = 90.0  # of one GPU's memory at full bandwidth; no SM clock changes it
    memory_ratio: float = 0.9  # of the memory is used
    iteration_tokens: int = 2048  # prompt tokens that one iteration computes at most

    def share(self, suggested: float) -> float:
        """Return the clock-independent share of a decode time whose suggested one is given, by ``sensitivity``."""
        return min(self.prefill_share + self.sensitivity * (suggested - self.prefill_share), 1.0)

    def dynamic(self, x: float) -> float:
        """Return dynamic power at ``x`` of the highest clock, as a share of that at the highest."""
        volts = max(self.floor_v, self.floor_v + (1 - self.floor_v) * (x - self.knee) / (1 - self.knee))
        return x * volts**2


@dataclass(frozen=True, slots=True)
class Latency:
    """One measured set-up (the median of its repeats); power as a share of the GPU's limit, None: not measured."""

    hardware: str
    tp: int
    batch: int
    prompt_tokens: int
    output_tokens: int
    prompt_s: float
    token_s: float
    average_power: float | None
    peak_power: float | None

    @property
    def context_tokens(self) -> int:
        """All that is in the KV cache at the end."""
        return self.batch * (self.prompt_tokens + self.output_tokens)


@dataclass(frozen=True, slots=True)
class BatchPower:
    """Watts that one GPU of an instance drew while a service kept ``batch`` requests running."""

    model: str
    gpu: str
    tp: int
    batch: float
    power_w: float


def latencies(text: str, name: str = "data") -> tuple[Latency, ...]:
    """The measured set-ups of a CSV with ``LATENCY_COLUMNS`` (ms; others are ignored); RequestError naming line and column."""
    groups: dict[tuple[str, int, int, int, int], list[tuple[float, float, float, float]]] = defaultdict(list)
    for row in cells.rows(text, name, LATENCY_COLUMNS):
        tp, batch, prompt, output = (
            int(row.number(c, above=0.0)) for c in ("tensor_parallel", "batch_size", "prompt_size", "token_size")
        )
        prompt_ms, token_ms = row.number("prompt_time", above=0.0), row.number("token_time", above=0.0)
        groups[row.words["hardware"], tp, batch, prompt, output].append(
            (prompt_ms, token_ms, row.number("average_power"), row.number("peak_power"))
        )
    made = []
    for key, repeats in sorted(groups.items()):
        prompt_ms, token_ms, average, peak = (median(column) for column in zip(*repeats, strict=True))
        made.append(Latency(*key, prompt_ms / 1e3, token_ms / 1e3, average or None, peak or None))  # the data's 0 is "missing"
    return tuple(made)


def batch_powers(text: str, name: str = "data") -> tuple[BatchPower, ...]:
    """Watts per GPU from a CSV with ``BATCH_COLUMNS``: joules per request x requests per second / GPUs."""
    made = []
    for row in cells.rows(text, name, BATCH_COLUMNS):
        requests_per_s = row.number("Token tput (tok/s)", above=0.0) / row.number("Avg Output Tokens", above=0.0)
        tp = int(row.number("TP", above=0.0))
        made.append(
            BatchPower(
                row.words["Model"], row.words["GPU"], tp, row.number("Avg BS (reqs)", above=0.0),
                row.number("Energy/req (J)", above=0.0) * requests_per_s / tp,
            )
        )  # fmt: skip
    return tuple(sorted(made, key=lambda row: (row.model, row.gpu, row.tp, row.batch)))


def of_gpu(powers: Iterable[BatchPower], gpu: Gpu, model: str = "70B") -> tuple[BatchPower, ...]:
    """The rows of the model of that size on ``gpu``; none where it was not measured."""
    return tuple(row for row in powers if gpu.name.upper() in row.gpu and model in row.model)


def kv_tokens(gpu: Gpu, llm: Llm, tp: int, memory_ratio: float) -> int:
    """Tokens of context that fit beside the weights on ``tp`` GPUs; 0: not even the weights fit."""
    return max(int((gpu.memory_bytes * tp * memory_ratio - llm.weights_bytes) / llm.kv_bytes_per_token), 0)


def fit_prefill(rows: Iterable[Latency], iteration_tokens: int) -> tuple[float, float]:
    """(seconds per iteration, seconds per token) of prompts that were computed alone."""
    points = [(r.batch * r.prompt_tokens, r.prompt_s) for r in rows]
    return _line([(math.ceil(n / iteration_tokens), n, t) for n, t in points])


def fit_decode(rows: Iterable[Latency]) -> tuple[float, float]:
    """(seconds per iteration, seconds per request in it)."""
    return _line([(1, r.batch, r.token_s) for r in rows])


def usable(rows: Iterable[Latency], gpu: Gpu, llm: Llm, tp: int, assumed: Assumptions) -> list[Latency]:
    """What was measured on ``gpu`` at ``tp`` and fits its memory."""
    room = kv_tokens(gpu, llm, tp, assumed.memory_ratio)
    return [r for r in rows if r.hardware == gpu.hardware and r.tp == tp and r.context_tokens <= room]


def for_prefill(rows: Sequence[Latency]) -> list[Latency]:
    """The set-ups that tell prefill: one per batch and prompt, up to the longest single prompt."""
    short = min(r.output_tokens for r in rows)
    longest = max(r.prompt_tokens for r in rows)
    return [r for r in rows if r.output_tokens == short and r.batch * r.prompt_tokens <= longest]


def for_decode(rows: Sequence[Latency]) -> list[Latency]:
    """The set-ups that tell decode by batch: all of one prompt size, the one measured at most batches."""
    by_prompt = defaultdict(set)
    for r in rows:
        by_prompt[r.prompt_tokens].add(r.batch)
    prompt = max(by_prompt, key=lambda size: (len(by_prompt[size]), -size))
    short = min(r.output_tokens for r in rows)
    return [r for r in rows if r.prompt_tokens == prompt and r.output_tokens == short]


def power_shares(rows: Sequence[Latency]) -> tuple[float, float]:
    """(prefill, decode) watts as shares of the limit. Prefill draws the peak; decode what the average leaves to it.

    Of prompts whose prefill lasts long enough to be seen and is short of the run (512 to 2048 tokens for prefill, to 1024 for
    decode): over longer ones the published average drops below an idle GPU's.
    """
    seen = [r for r in rows if r.peak_power is not None and r.average_power is not None and r.batch * r.prompt_tokens >= 512]
    peaks = [r.peak_power for r in seen if r.batch * r.prompt_tokens <= 2048 and r.peak_power is not None]
    left = []
    for r in seen:
        if r.batch * r.prompt_tokens <= 1024 and r.peak_power is not None and r.average_power is not None:
            decode_s = r.token_s * r.output_tokens
            left.append((r.average_power * (r.prompt_s + decode_s) - r.peak_power * r.prompt_s) / decode_s)
    if not peaks or not left:
        raise RequestError("the data hold no power of this set-up", hint="power is measured on A100 only", code="bad_value")
    return fmean(peaks), median(left)


def build(
    rows: Sequence[Latency],
    gpu: Gpu,
    llm: Llm = LLAMA2_70B,
    assumed: Assumptions | None = None,
    batches: Sequence[BatchPower] = (),
    shape: Gpu = A100,
) -> EngineModel:
    """Return the engine model of ``llm`` on ``gpu``: every measured parallelism at every clock of ``gpu``.

    Power shares by parallelism are those of ``shape``, the GPU on which power was measured. With ``batches`` (watts of ``gpu`` at
    one parallelism, by batch) decode is scaled to them, else to the limits of both GPUs. RequestError when ``rows`` hold nothing
    of ``gpu``.
    """
    assumed = assumed or Assumptions()
    tps = sorted({r.tp for r in rows if r.hardware == gpu.hardware})
    decode = decode_power(rows, gpu, llm, assumed, batches, shape)
    table: dict[tuple[int, int], Coefficients] = {}
    for tp in tps:
        own = usable(rows, gpu, llm, tp, assumed)
        prefill_w = gpu.limit_w * power_shares(usable(rows, shape, llm, tp, assumed))[0]
        fixed_s, token_s = fit_prefill(for_prefill(own), assumed.iteration_tokens)
        decode_fixed_s, decode_request_s = fit_decode(for_decode(own))
        full = Coefficients(
            fixed_s, token_s, decode_fixed_s, decode_request_s, prefill_w, *decode[tp], idle_w=gpu.context_w
        )  # fmt: skip
        use = min(llm.weights_bytes / tp / gpu.memory_bytes_per_s / decode_fixed_s, 1.0)
        for clock_mhz in gpu.clocks_mhz:
            table[tp, clock_mhz] = at_clock(full, clock_mhz / max(gpu.clocks_mhz), gpu, assumed, use)
    if not table:
        raise RequestError(
            f"the data hold nothing of {gpu.hardware}",
            hint=f"they hold {', '.join(sorted({r.hardware for r in rows})) or 'no rows'}",
            code="bad_value",
        )
    room = {tp: kv_tokens(gpu, llm, tp, assumed.memory_ratio) for tp in tps}
    scaled = "scaled to this GPU's measured watts by batch" if batches else "scaled to this GPU's limit"
    power = f"power by parallelism fitted on {shape.name}" + ("" if shape == gpu else f", {scaled}")
    origin = (
        f"latency at {max(gpu.clocks_mhz)} MHz fitted to measurements; {power}; other clocks modelled"
        f" (sensitivity {assumed.sensitivity:g}, knee {assumed.knee:g}); iterations of {assumed.iteration_tokens} prompt tokens"
    )
    return EngineModel(f"{llm.name}_{gpu.name}", gpu.name, table, room, llm.weights_bytes, gpu.off_w, origin)


def decode_power(
    rows: Sequence[Latency], gpu: Gpu, llm: Llm, assumed: Assumptions, batches: Sequence[BatchPower], shape: Gpu = A100
) -> dict[int, tuple[float, float]]:
    """(watts, watts per log2(batch + 1)) of decode at full clock by parallelism, as ``build`` has them."""
    tps = sorted({r.tp for r in rows if r.hardware == shape.hardware})
    # What decode adds to a GPU that is off, as a share of the room below the limit.
    shares = {
        tp: (power_shares(usable(rows, shape, llm, tp, assumed))[1] * shape.limit_w - shape.off_w) / (shape.limit_w - shape.off_w)
        for tp in tps
    }
    if not batches:
        return {tp: (gpu.off_w + share * (gpu.limit_w - gpu.off_w), 0.0) for tp, share in shares.items()}
    if len({(b.model, b.gpu, b.tp) for b in batches}) > 1 or batches[0].tp not in shares:
        raise RequestError("watts by batch must be of one model, GPU and parallelism that the latencies hold", code="bad_value")
    base_w, log2_w = _line([(1, math.log2(b.batch + 1), b.power_w) for b in batches])
    anchor = shares[batches[0].tp]
    return {tp: (gpu.off_w + (base_w - gpu.off_w) * share / anchor, log2_w * share / anchor) for tp, share in shares.items()}


def at_clock(full: Coefficients, x: float, gpu: Gpu, assumed: Assumptions, memory_use: float) -> Coefficients:
    """Return what ``full`` (measured when the highest clock was asked for) becomes at ``x`` of it.

    ``full.prefill_w`` may be above the limit: then the clock that the limit allows is what was measured, and what a higher one
    gets. ``memory_use`` is the share of the memory's bandwidth that decode uses at the highest clock.
    """
    prefill_d = full.prefill_w - gpu.off_w
    allowed = (assumed.limit_ratio * gpu.limit_w - gpu.off_w) / prefill_d
    top = _highest(lambda at: assumed.dynamic(at) <= allowed)
    prefill_x = min(x, top)

    def slower(share: float, now: float, measured: float = 1.0) -> float:
        return share + (1 - share) * measured / now

    fixed = slower(assumed.share(assumed.decode_fixed_share), x)
    request = slower(assumed.share(assumed.decode_request_share), x)
    memory_w = min(assumed.memory_w * memory_use, full.decode_w - gpu.off_w)
    g = assumed.dynamic(x)
    return replace(
        full,
        # A small prompt's fixed time is the same reading of weights as a decode's.
        prefill_fixed_s=full.prefill_fixed_s * slower(assumed.share(assumed.decode_fixed_share), prefill_x, top),
        prefill_token_s=full.prefill_token_s * slower(assumed.prefill_share, prefill_x, top),
        decode_fixed_s=full.decode_fixed_s * fixed,
        decode_request_s=full.decode_request_s * request,
        prefill_w=gpu.off_w + prefill_d * assumed.dynamic(prefill_x),
        decode_w=gpu.off_w + memory_w / fixed + (full.decode_w - gpu.off_w - memory_w) * g,
        decode_log2_w=full.decode_log2_w * g,
        idle_w=gpu.off_w + (full.idle_w - gpu.off_w) * g,
    )


def _highest(fits: Callable[[float], bool]) -> float:
    """The highest share of the clock, to 1e-6, that ``fits``, which holds from 0 up to it."""
    if fits(1.0):
        return 1.0
    low, high = 0.0, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _line(points: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """(a, b), both not below zero, that make ``a * u + b * v`` nearest to t of every (u, v, t), by relative error."""
    if len({v / u for u, v, _ in points}) < 2:
        raise RequestError("a fit needs two different sizes at least", hint="measure more batches or prompts", code="bad_value")
    uu = sum((u / t) ** 2 for u, _, t in points)
    uv = sum(u * v / t**2 for u, v, t in points)
    vv = sum((v / t) ** 2 for _, v, t in points)
    u1, v1 = sum(u / t for u, _, t in points), sum(v / t for _, v, t in points)
    determinant = uu * vv - uv**2
    a, b = (u1 * vv - v1 * uv) / determinant, (v1 * uu - u1 * uv) / determinant
    if a < 0:
        return 0.0, v1 / vv
    return (a, b) if b >= 0 else (u1 / uu, 0.0)
