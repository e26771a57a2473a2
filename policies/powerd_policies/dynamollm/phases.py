"""Prefill and decode on separate instances, each at the clock of its own promise, beside both on one (beyond DynamoLLM).

House rules: both are judged by the same steady-state model and the same SLOs; nothing is chosen that does not meet them, and
where nothing does the answer is ``None``; moving the KV cache takes time, which is counted in the gap before the second token.

Prefill instances are judged by the TTFT alone, decode instances by the TBT alone: a decode iteration has no prompt in it and may
take as long as the SLO says, which is what a lower clock uses. What it costs is batching: the weights are read for decode only.
An answer of fewer than 100 gaps has the gap before its second token as its P99: in it are the way of the KV cache, what is left
of the iteration that it comes into, and its own first iteration.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from powerd_policies.dynamollm.classes import Classes, Slo
from powerd_policies.dynamollm.engine_model import Coefficients, EngineModel
from powerd_policies.dynamollm.fleet import Role
from powerd_policies.dynamollm.steady import Steady, Work, steady

Apart = Literal["prefill", "decode"]
GAPS: Final = 100  # between tokens: of so many, the longest is not the P99
SECOND_LATE: Final = 0.01  # of the requests may miss their TBT by the gap before the second token
UNCHUNKED: Final = 10**9  # prompts do not compete for the iterations of an instance that only decodes


@dataclass(frozen=True, slots=True)
class Side:
    """Equal instances of one role; power is of all their GPUs."""

    role: Role
    tp: int
    clock_mhz: int
    instances: int
    power_w: float

    @property
    def gpus(self) -> int:
        """GPUs of all of them."""
        return self.tp * self.instances


@dataclass(frozen=True, slots=True)
class Phases:
    """A fleet for one load: one side when mixed, prefill and decode when split."""

    sides: tuple[Side, ...]

    @property
    def power_w(self) -> float:
        """Watts of all GPUs in use."""
        return sum(side.power_w for side in self.sides)

    @property
    def gpus(self) -> int:
        """GPUs in use."""
        return sum(side.gpus for side in self.sides)


@dataclass(frozen=True, slots=True)
class Links:
    """How the KV cache of a prompt gets from a prefill to a decode instance, once all of it is computed."""

    bytes_per_token: float = 327_680.0  # Llama-2-70B: 80 layers, 8 KV heads of 128, keys and values, 2 bytes
    bytes_per_s: float = 50e9  # assumed: one 400 Gbit/s link a GPU pair
    fixed_s: float = 0.005  # assumed

    def move_s(self, tokens: float) -> float:
        """Return the seconds that the KV cache of a prompt takes."""
        return self.fixed_s + tokens * self.bytes_per_token / self.bytes_per_s


def seen_by(model: EngineModel, role: Apart) -> EngineModel:
    """Return the engine model with the times of one phase alone; watts are as they were."""
    part = _prompts_only if role == "prefill" else _answers_only
    return replace(model, table={key: part(at) for key, at in model.table.items()})


def promised(classes: Classes, role: Apart) -> Classes:
    """Return what of the promises binds one side: the TTFT where prompts are computed, the TBT where answers are written."""
    slos = {
        name: Slo(slo.ttft_s, math.inf) if role == "prefill" else Slo(math.inf, slo.tbt_s) for name, slo in classes.slos.items()
    }
    return replace(classes, slos=slos)


def second_late(tbt_s: float, output_tokens: float, move_s: float, iteration_s: float) -> float:
    """Return the share of requests that miss their TBT by the gap before the second token, which is the P99 of short answers.

    In it are the move, what is left of the iteration that the KV cache comes into (any part of it is as likely as another), and
    the iteration that makes the token.
    """
    if output_tokens > GAPS or iteration_s <= 0:
        return 0.0
    return min(1.0, max(0.0, (move_s + 2.0 * iteration_s - tbt_s) / iteration_s))


def mixed(
    model: EngineModel, load: Mapping[str, Work], gpus: int, classes: Classes | None = None, *, off_w: float = 0.0
) -> Phases | None:
    """Return the fleet of equal mixed instances that draws least, of at most ``gpus`` GPUs; None: none keeps the SLOs.

    ``off_w`` is counted for each GPU of ``gpus`` that is not used.
    """
    slos = (classes or Classes()).slos

    def fits(at: Coefficients, kv_tokens: int, part: Mapping[str, Work]) -> Steady | None:
        found = steady(at, kv_tokens, part)
        return found if found.meets(slos) else None

    return _cheapest(((side,) for side in _sides(model, load, gpus, off_w, "both", fits)), gpus, off_w)


def split(
    model: EngineModel,
    load: Mapping[str, Work],
    gpus: int,
    classes: Classes | None = None,
    *,
    links: Links | None = None,
    off_w: float = 0.0,
) -> Phases | None:
    """Return the prefill and decode instances that draw least together, of at most ``gpus`` GPUs; None: none keep the SLOs."""
    classes, links = classes or Classes(), links or Links()
    ttfts, tbts = promised(classes, "prefill").slos, promised(classes, "decode").slos

    def prefills(at: Coefficients, kv_tokens: int, part: Mapping[str, Work]) -> Steady | None:
        found = steady(_prompts_only(at), kv_tokens, {name: _answering(work, 1.0) for name, work in part.items()})
        return found if found.meets(ttfts) else None

    def decodes(at: Coefficients, kv_tokens: int, part: Mapping[str, Work]) -> Steady | None:
        found = steady(_answers_only(at), kv_tokens, part, chunk_tokens=UNCHUNKED)
        if not found.meets(tbts) or found.tbt_p99_s is None:
            return None
        for name, work in part.items():
            own = work.lengths
            late = second_late(tbts[name].tbt_s, own.output_tokens, links.move_s(own.prompt_tokens), found.tbt_p99_s)
            if late > SECOND_LATE:
                return None
        return found

    pairs = itertools.product(
        _sides(model, load, gpus, off_w, "prefill", prefills), _sides(model, load, gpus, off_w, "decode", decodes)
    )
    return _cheapest(pairs, gpus, off_w)


def better(
    model: EngineModel,
    load: Mapping[str, Work],
    gpus: int,
    classes: Classes | None = None,
    *,
    links: Links | None = None,
    off_w: float = 0.0,
) -> Phases | None:
    """Return the cheaper of mixed and split for a load; None: neither keeps the SLOs."""
    found = (mixed(model, load, gpus, classes, off_w=off_w), split(model, load, gpus, classes, links=links, off_w=off_w))
    return min((each for each in found if each is not None), key=lambda each: _cost_w(each, gpus, off_w), default=None)


_Judge = Callable[[Coefficients, int, Mapping[str, Work]], Steady | None]


def _prompts_only(at: Coefficients) -> Coefficients:
    return replace(at, decode_fixed_s=at.prefill_fixed_s, decode_request_s=0.0)


def _answers_only(at: Coefficients) -> Coefficients:
    return replace(at, prefill_fixed_s=0.0, prefill_token_s=0.0)


def _answering(work: Work, output_tokens: float) -> Work:
    lengths = work.lengths
    return Work(work.requests_per_s, replace(lengths, output_tokens=output_tokens, output_sq=output_tokens**2))


def _sides(model: EngineModel, load: Mapping[str, Work], gpus: int, off_w: float, role: Role, judge: _Judge) -> list[Side]:
    """Return for each parallelism and clock the fewest instances that the judge accepts, and more while that saves."""
    found = []
    for tp in model.tps:
        for clock in model.clocks_mhz(tp):
            best_w = math.inf
            for count in range(1, gpus // tp + 1):
                part = {
                    name: Work(work.requests_per_s / count, work.lengths)
                    for name, work in load.items()
                    if work.requests_per_s > 0.0
                }
                state = judge(model.table[tp, clock], model.kv_tokens[tp], part) if part else None
                if state is None:
                    continue
                side = Side(role, tp, clock, count, state.power_w * tp * count)
                found.append(side)
                if (net_w := side.power_w - off_w * side.gpus) >= best_w:
                    break
                best_w = net_w
    return _undominated(found, off_w)


def _undominated(sides: Iterable[Side], off_w: float) -> list[Side]:
    """Return those than which no other needs fewer GPUs and adds less power to what they would draw unused."""
    kept: list[tuple[float, Side]] = []
    for net_w, side in sorted(
        ((side.power_w - off_w * side.gpus, side) for side in sides), key=lambda pair: (pair[1].gpus, pair[0])
    ):
        if not kept or net_w < kept[-1][0]:
            kept.append((net_w, side))
    return [side for _, side in kept]


def _cost_w(phases: Phases, gpus: int, off_w: float) -> float:
    return phases.power_w + off_w * (gpus - phases.gpus)


def _cheapest(fleets: Iterable[tuple[Side, ...]], gpus: int, off_w: float) -> Phases | None:
    fitting = (each for each in map(Phases, fleets) if each.gpus <= gpus)
    return min(fitting, key=lambda each: _cost_w(each, gpus, off_w), default=None)
