"""The order in which each pipeline rank runs its instructions, for the schedules that training frameworks use.

House rules: an order is data (lists of Instruction), never code that runs; ``stage`` counts virtual stages through the whole
model, and whose list an instruction is in says which rank runs it; every schedule takes any number of ranks and microbatches.

Papers: GPipe (arXiv 1811.06965), 1F1B (PipeDream-Flush, 2006.09503), interleaved 1F1B (Megatron-LM, 2104.04473, section 2.2.2),
zero bubble H1 and ZB-V (2401.10241, sections 2.3 and 6). Where frameworks vary, the order is torch.distributed.pipelining's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from powerd.errors import RequestError
from powerd_policies.perseus.problem import Instruction, Kind, Order

Steps = list[Instruction]
F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.INPUT, Kind.WEIGHT  # noqa: E741 the papers' letters


def order(name: str, stages: int, microbatches: int, chunks: int = 1, recompute: bool = False) -> Order:
    """The order of one iteration of a named schedule: one list of instructions per pipeline rank.

    ``stages`` is the number of pipeline ranks; with ``chunks`` > 1 each holds that many virtual stages (``interleaved`` and
    ``zb-h1``: stage ``c * stages + rank``; ``zbv``: always two, stages ``rank`` and ``2 * stages - 1 - rank``).
    With ``recompute`` activations are recomputed in front of every backward, as an instruction that waits for nothing but its own
    rank; a framework that recomputes inside backward measures it there and needs no ``recompute``.
    RequestError for an unknown name and for numbers below one.
    """
    build = SCHEDULES.get(name)
    if build is None:
        raise RequestError(f"schedule {name!r} is not known", hint=f"one of {', '.join(SCHEDULES)}", code="bad_value")
    for what, value in (("stages", stages), ("microbatches", microbatches), ("chunks", chunks)):
        if value < 1:
            raise RequestError(f"{what} is at least 1, not {value}", code="bad_value")
    if name in ("gpipe", "1f1b") and chunks != 1:
        raise RequestError(f"{name} has one stage per rank", hint="chunks are for interleaved and zb-h1", code="bad_value")
    if name == "zbv" and chunks not in (1, 2):
        raise RequestError("zbv has two stages per rank", hint="leave chunks out", code="bad_value")
    made = [build(rank, stages, microbatches, chunks) for rank in range(stages)]
    return [_recomputing(steps) for steps in made] if recompute else made


def stage_count(name: str, stages: int, chunks: int = 1) -> int:
    """How many (virtual) stages, thus profile stages, a schedule over ``stages`` ranks has."""
    return stages * (2 if name == "zbv" else chunks)


def _recomputing(steps: Steps) -> Steps:
    made: Steps = []
    for step in steps:
        if step.kind in (B, I):
            made.append(Instruction(step.stage, Kind.RECOMPUTE, step.microbatch))
        made.append(step)
    return made


def _gpipe(rank: int, ranks: int, microbatches: int, chunks: int) -> Steps:
    return [Instruction(rank, kind, m) for kind in (F, B) for m in range(microbatches)]


def _one_f_one_b(rank: int, ranks: int, microbatches: int, chunks: int) -> Steps:
    forwards = [Instruction(rank, F, m) for m in range(microbatches)]
    backwards = [Instruction(rank, B, m) for m in range(microbatches)]
    ahead = min(microbatches, ranks - rank)  # so many microbatches are in flight from here to the last stage
    return _alternate(forwards, backwards, ahead, backward_first=True)


def _alternate(forwards: Steps, backwards: Steps, ahead: int, *, backward_first: bool) -> Steps:
    """``ahead`` forwards, then pairs until the forwards are used up, then the remaining backwards."""
    made = forwards[:ahead]
    rest = forwards[ahead:]
    for forward, backward in zip(rest, backwards, strict=False):
        made += (backward, forward) if backward_first else (forward, backward)
    return made + backwards[len(rest) :]


def _groups(ranks: int, microbatches: int) -> list[range]:
    """Rounds of about as many microbatches as ranks, never fewer where there are enough; earlier rounds take the rest."""
    rounds = max(1, microbatches // ranks)
    size, longer = divmod(microbatches, rounds)
    ends = [size * (r + 1) + min(r + 1, longer) for r in range(rounds)]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _rounds(rank: int, ranks: int, microbatches: int, chunks: int) -> tuple[Steps, list[tuple[int, int]], int]:
    """Forwards, (stage, microbatch) of the backwards, and the microbatches of the longest round."""
    groups = _groups(ranks, microbatches)
    forwards = [Instruction(c * ranks + rank, F, m) for group in groups for c in range(chunks) for m in group]
    backwards = [(c * ranks + rank, m) for group in groups for c in reversed(range(chunks)) for m in group]
    return forwards, backwards, max(len(group) for group in groups)


def _interleaved(rank: int, ranks: int, microbatches: int, chunks: int) -> Steps:
    forwards, backwards, longest = _rounds(rank, ranks, microbatches, chunks)
    ahead = min(len(forwards), (chunks - 1) * longest + 2 * (ranks - 1 - rank))
    return _alternate(forwards, [Instruction(s, B, m) for s, m in backwards], ahead, backward_first=False)


def _zero_bubble(rank: int, ranks: int, microbatches: int, chunks: int) -> Steps:
    """1F1B with the gradients of weights put off by as many backwards as the rank is from the first: its memory is 1F1B's."""
    forwards, backwards, longest = _rounds(rank, ranks, microbatches, chunks)
    ahead = min(len(forwards), (chunks - 1) * longest + ranks - 1 - rank)
    made = forwards[:ahead]
    for step, (stage, microbatch) in enumerate(backwards):
        made += forwards[ahead + step : ahead + step + 1]
        made.append(Instruction(stage, I, microbatch))
        if step >= rank:
            made.append(Instruction(backwards[step - rank][0], W, backwards[step - rank][1]))
    done = max(0, len(backwards) - rank)
    return made + [Instruction(stage, W, microbatch) for stage, microbatch in backwards[done:]]


def _zbv(rank: int, ranks: int, microbatches: int, chunks: int) -> Steps:
    """The V: a rank holds one stage on the way down and one on the way up; laid out for a full pipeline, then cut to size."""
    down, up = rank, 2 * ranks - 1 - rank
    full = max(2 * ranks - 1, microbatches)
    made: Steps = []
    count: dict[tuple[int, Kind], int] = {}

    def add(stage: int, *kinds: Kind) -> None:
        for kind in kinds:
            microbatch = count.get((stage, kind), 0)
            count[stage, kind] = microbatch + 1
            if microbatch < microbatches:
                made.append(Instruction(stage, kind, microbatch))

    for _ in range(2 * (ranks - rank) - 1):
        add(down, F)
    for _ in range(rank):
        add(up, F)
        add(down, F)
    for _ in range(ranks - rank):
        add(up, F, I, W)
    while count[up, F] < count[down, F] or count[down, F] < full:
        if count[down, F] < full:
            add(down, F)
        add(down, I, W)
        add(up, F, I, W)
    for _ in range(rank):
        add(down, I)
        add(up, I)
    for _ in range(ranks - rank):
        add(down, I, W)
    for stage in (up, down):
        for _ in range(count[stage, I] - count.get((stage, W), 0)):
            add(stage, W)
    return made


#: name -> (rank, ranks, microbatches, chunks) -> what that rank runs
SCHEDULES: Final[dict[str, Callable[[int, int, int, int], Steps]]] = {
    "gpipe": _gpipe, "1f1b": _one_f_one_b, "interleaved": _interleaved, "zb-h1": _zero_bubble, "zbv": _zbv,
}  # fmt: skip


def microbatches_of(steps: Sequence[Instruction]) -> int:
    """How many microbatches a rank's list touches."""
    return len({step.microbatch for step in steps})
