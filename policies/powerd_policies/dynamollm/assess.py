"""How far the engine models are off, wherever a measurement can say so: fits, what was held out, transfer, power.

House rules: every line says what was fitted on what and tested on what; an error is the mean of |model / measured - 1|, with its
worst; what no measurement here can check is listed as such, not left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from powerd_policies.dynamollm import fit
from powerd_policies.dynamollm.fit import A100, GPUS, LLAMA2_70B, Assumptions, BatchPower, Gpu, Latency, Llm

HELD_OUT_BATCHES = (16, 64)
UNCHECKED = (
    "time against the SM clock (shares of prefill and decode that no clock changes: swept by --sensitivity)",
    "power against the SM clock (knee and voltage are an A100-SXM's in training: swept by --knee)",
    "power of an H100 in prefill, and at TP2 and TP8 (the A100's shares)",
    "several chunks of prompts beside decode in one iteration (their times are added)",
)


@dataclass(frozen=True, slots=True)
class Figure:
    """One check: relative error over ``points`` measurements; ``signed`` is the mean with its sign."""

    what: str
    where: str
    points: int
    mean: float
    worst: float
    signed: float


def figures(rows: Sequence[Latency], powers: Sequence[BatchPower], llm: Llm = LLAMA2_70B) -> tuple[Figure, ...]:
    """Every check that ``rows`` and ``powers`` allow, in the order of the page."""
    assumed = Assumptions()
    made: list[Figure] = []
    for gpu in GPUS.values():
        own = {tp: fit.usable(rows, gpu, llm, tp, assumed) for tp in sorted({r.tp for r in rows if r.hardware == gpu.hardware})}
        own = {tp: found for tp, found in own.items() if found}
        for tp, found in own.items():
            made += _latency(found, f"{gpu.name} TP{tp}", assumed.iteration_tokens)
        made += _transfer(own, gpu, llm, assumed)
    return (*made, *_power(rows, powers, llm, assumed))


def table(found: Iterable[Figure]) -> str:
    """The checks and what could not be checked, as text."""
    lines = [f"{'check':66}{'where':16}{'n':>4}{'mean':>8}{'worst':>8}{'signed':>8}", "-" * 110]
    lines += [f"{f.what:66}{f.where:16}{f.points:4}{f.mean:8.1%}{f.worst:8.1%}{f.signed:+8.1%}" for f in found]
    return "\n".join([*lines, "", "not checked, for want of a measurement:", *(f"  {what}" for what in UNCHECKED)])


def _figure(what: str, where: str, pairs: Iterable[tuple[float, float]]) -> list[Figure]:
    """Of (model, measured) pairs; nothing when there are none."""
    off = [model / measured - 1 for model, measured in pairs]
    if not off:
        return []
    return [Figure(what, where, len(off), fmean(map(abs, off)), max(map(abs, off)), fmean(off))]


def _latency(own: Sequence[Latency], where: str, iteration_tokens: int) -> list[Figure]:
    prefill, decode = fit.for_prefill(own), fit.for_decode(own)
    fixed_s, token_s = fit.fit_prefill(prefill, iteration_tokens)

    def prompt_s(r: Latency) -> float:
        tokens = r.batch * r.prompt_tokens
        return math.ceil(tokens / iteration_tokens) * fixed_s + token_s * tokens

    short = [r for r in prefill if r.batch * r.prompt_tokens <= iteration_tokens]
    long = [r for r in prefill if r not in short]
    made = _figure(f"prefill, prompts to {iteration_tokens} tokens", where, ((prompt_s(r), r.prompt_s) for r in short))
    made += _figure("prefill, longer prompts, as chunks", where, ((prompt_s(r), r.prompt_s) for r in long))
    made += _figure("decode by batch", where, _decoded(fit.fit_decode(decode), decode))
    kept = [r for r in decode if r.batch not in HELD_OUT_BATCHES]
    held = [r for r in decode if r.batch in HELD_OUT_BATCHES]
    made += _figure("decode, batches 16 and 64 held out", where, _decoded(fit.fit_decode(kept), held))
    usual = min(r.output_tokens for r in own)
    unseen = [r for r in own if r.output_tokens > usual]
    made += _figure("decode, answers of 256 to 8192 tokens (none fitted)", where, _decoded(fit.fit_decode(decode), unseen))
    return made


def _decoded(line: tuple[float, float], rows: Iterable[Latency]) -> list[tuple[float, float]]:
    return [(line[0] + line[1] * r.batch, r.token_s) for r in rows]


def _transfer(own: Mapping[int, Sequence[Latency]], gpu: Gpu, llm: Llm, assumed: Assumptions) -> list[Figure]:
    """What an unmeasured parallelism would be off: from TP4 alone, prompt tokens by 1 / TP, reading weights by 1 / TP."""
    if 4 not in own:
        return []
    prefill = fit.fit_prefill(fit.for_prefill(own[4]), assumed.iteration_tokens)
    decode = fit.fit_decode(fit.for_decode(own[4]))
    made: list[Figure] = []
    for tp in (2, 8):
        if tp not in own:
            continue
        read_s = llm.weights_bytes / gpu.memory_bytes_per_s * (1 / tp - 1 / 4)
        token_s = prefill[1] * 4 / tp
        pairs = []
        for r in fit.for_prefill(own[tp]):
            tokens = r.batch * r.prompt_tokens
            chunks = math.ceil(tokens / assumed.iteration_tokens)
            pairs.append((chunks * (prefill[0] + read_s) + token_s * tokens, r.prompt_s))
        where = f"{gpu.name} TP{tp}"
        made += _figure("prefill, moved from TP4", where, pairs)
        made += _figure("decode, moved from TP4", where, _decoded((decode[0] + read_s, decode[1]), fit.for_decode(own[tp])))
    return made


def _power(rows: Sequence[Latency], powers: Sequence[BatchPower], llm: Llm, assumed: Assumptions) -> list[Figure]:
    made: list[Figure] = []
    shares = fit.decode_power(rows, A100, llm, assumed, ())
    for tp, (watts, _) in shares.items():
        seen = [
            r for r in fit.usable(rows, A100, llm, tp, assumed)
            if r.average_power is not None and 512 <= r.batch * r.prompt_tokens <= 1024
        ]  # fmt: skip
        peak = fit.power_shares(fit.usable(rows, A100, llm, tp, assumed))[0] * A100.limit_w
        pairs = []
        for r in seen:
            decode_s = r.token_s * r.output_tokens
            model_w = (peak * r.prompt_s + watts * decode_s) / (r.prompt_s + decode_s)
            pairs.append((model_w, (r.average_power or 0.0) * A100.limit_w))
        made += _figure("power of whole runs, prompts to 1024 tokens", f"a100 TP{tp}", pairs)
    h100 = GPUS["h100"]
    own = fit.of_gpu(powers, h100)
    if own:
        where = f"h100 TP{own[0].tp}"

        def watts_of(fitted: Sequence[BatchPower], tested: Iterable[BatchPower]) -> list[tuple[float, float]]:
            watts, log2_w = fit.decode_power(rows, h100, llm, assumed, fitted)[own[0].tp]
            return [(watts + log2_w * math.log2(b.batch + 1), b.power_w) for b in tested]

        small = [b for b in own if b.batch < 200]
        large = [b for b in own if b.batch >= 200]
        made += _figure("power in service, the A100's shares of the limit (not shipped)", where, watts_of((), own))
        made += _figure("power in service, by measured batches (shipped)", where, watts_of(own, own))
        made += _figure("power in service, batches above 200 held out", where, watts_of(small, large))
    return made
