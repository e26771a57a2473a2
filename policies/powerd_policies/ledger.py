"""A saving that is measured: interleaved blocks of baseline and optimised work, and what their differences prove.

House rules: pure, nothing is installed; neighbours are compared, so that what is common to them (a sensor's gain, a slow drift)
cancels; an interval that holds zero is answered with "not proven"; a block that was not measured is left out, never guessed.

Model: ln(energy per unit of work) of block i = arm + gain + drift(i) + noise(i). Gain is any constant, drift is slow against two
blocks, noise may be correlated in time. Of neighbouring blocks of different arms the difference is taken; a straight drift is a
term of its own (the order within a pair), and what correlation is left widens the interval.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

BASELINE: Final = "baseline"
CONFIDENCE: Final = 0.99  # of every interval: an A/A comparison is called proven in one of a hundred
MIN_PAIRS: Final = 6
MAX_BLOCK_STEPS: Final = 50
Order = Literal["random", "abba"]
Outcome = Literal["saving", "costs more", "not proven"]


@dataclass(frozen=True, slots=True)
class Block:
    """A stretch of work under one arm: seconds and joules of ``work`` units (steps, tokens); ``energy_j`` None: not measured."""

    arm: str
    begin_s: float
    time_s: float
    work: float
    energy_j: float | None

    @property
    def usable(self) -> bool:
        """Whether both figures of it are known and make sense."""
        energy = self.energy_j
        known = energy is not None and math.isfinite(energy) and energy > 0
        return known and all(math.isfinite(v) and v > 0 for v in (self.time_s, self.work)) and math.isfinite(self.begin_s)


@dataclass(frozen=True, slots=True)
class Share:
    """A relative change with its interval: 0.03 is 3 %."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f}..{100 * self.high:.1f})"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the blocks prove; ``saving`` and ``slowdown`` are None when there are too few pairs for any interval."""

    outcome: Outcome
    baseline: str
    optimised: str
    pairs: int  # neighbouring blocks of both arms that were compared
    blocks: int  # given
    unmeasured: int  # blocks among them that could not be used
    confidence: float
    saving: Share | None = None  # of energy per unit of work; above zero: less energy
    slowdown: Share | None = None  # of time per unit of work; above zero: slower
    why: str = ""  # not proven
    method: str = field(default="differences of neighbouring blocks, Student's t", kw_only=True)

    @property
    def proven(self) -> bool:
        """Whether less energy was proven."""
        return self.outcome == "saving"

    def __str__(self) -> str:
        if self.saving is None or self.slowdown is None:
            return f"not proven: {self.why}"
        if self.outcome == "saving":
            return f"saving {self.saving}, slowdown {self.slowdown}"
        if self.outcome == "costs more":
            flipped = Share(-self.saving.value, -self.saving.high, -self.saving.low)
            return f"costs {flipped} more energy, slowdown {self.slowdown}"
        return f"not proven: {self.why}; saving {self.saving}, slowdown {self.slowdown}"


def schedule(pairs: int, seed: int, order: Order = "random", arms: tuple[str, str] = (BASELINE, "optimised")) -> tuple[str, ...]:
    """In which order to run ``2 * pairs`` blocks: each pair holds both arms, either first in half of the pairs.

    ``random``: which pairs these are is drawn, so that nothing in the machine's life can go along with it; ``abba``: every other.
    """
    if pairs < 1 or arms[0] == arms[1]:
        raise ValueError(f"a schedule has at least one pair of two different arms: {pairs}, {arms}")
    dice = random.Random(seed)  # noqa: S311 (an order of blocks, not a secret)
    first = dice.random() < 0.5
    flips = [first ^ bool(number % 2) for number in range(pairs)]
    if order == "random":
        dice.shuffle(flips)
    return tuple(arm for flip in flips for arm in (reversed(arms) if flip else arms))


def assess(
    blocks: Iterable[Block],
    baseline: str = BASELINE,
    optimised: str | None = None,
    *,
    confidence: float = CONFIDENCE,
    min_pairs: int = MIN_PAIRS,
) -> Verdict:
    """What these blocks prove of ``optimised`` (default: the only other arm) against ``baseline``; any order of input.

    Blocks of a third arm and unmeasured ones keep their place: what lies on both sides of them is no neighbour. ValueError when
    ``optimised`` is not given and there are several other arms.
    """
    if not 0.5 < confidence < 1 or min_pairs < 3:
        raise ValueError("confidence lies between 0.5 and 1, and a comparison needs three pairs at least")
    ordered = sorted(blocks, key=lambda b: b.begin_s)
    others = sorted({b.arm for b in ordered} - {baseline})
    if optimised is None and len(others) > 1:
        raise ValueError(f"several arms beside {baseline}: {', '.join(others)}; say which")
    optimised = optimised or (others[0] if others else "optimised")
    unmeasured = sum(not b.usable for b in ordered)
    pairs = list(_pairs(ordered, baseline, optimised))

    def answer(outcome: Outcome, saving: Share | None = None, slowdown: Share | None = None, why: str = "") -> Verdict:
        return Verdict(outcome, baseline, optimised, len(pairs), len(ordered), unmeasured, confidence, saving, slowdown, why)

    if len(pairs) < min_pairs:
        return answer("not proven", why=f"{len(pairs)} pairs of neighbouring blocks, {min_pairs} are needed")
    signs = [1.0 if first.arm == baseline else -1.0 for first, _ in pairs]
    if len(set(signs)) < 2:
        return answer("not proven", why="one arm always came first: a drift would look the same")
    energy = _fit(
        [s * _ln(_energy(second), _energy(first)) for s, (first, second) in zip(signs, pairs, strict=True)], signs, confidence
    )
    time = _fit(
        [s * _ln(_time(second), _time(first)) for s, (first, second) in zip(signs, pairs, strict=True)], signs, confidence
    )
    saving = Share(*(-math.expm1(energy[i]) for i in (0, 2, 1)))
    slowdown = Share(*(math.expm1(time[i]) for i in (0, 1, 2)))
    if saving.low > 0:
        return answer("saving", saving, slowdown)
    if saving.high < 0:
        return answer("costs more", saving, slowdown)
    return answer("not proven", saving, slowdown, "no saving lies within the interval too")


def _energy(block: Block) -> float:
    return (block.energy_j or 0.0) / block.work


def _time(block: Block) -> float:
    return block.time_s / block.work


def _ln(of: float, to: float) -> float:
    return math.log(of) - math.log(to)


def _pairs(ordered: Sequence[Block], baseline: str, optimised: str) -> Iterator[tuple[Block, Block]]:
    """Neighbours of different arms, each block in one pair at most."""
    at = 0
    while at + 1 < len(ordered):
        first, second = ordered[at], ordered[at + 1]
        if first.usable and second.usable and {first.arm, second.arm} == {baseline, optimised}:
            yield first, second
            at += 2
        else:
            at += 1


def _fit(differences: Sequence[float], signs: Sequence[float], confidence: float) -> tuple[float, float, float]:
    """Mean, low and high of differences = effect + sign x drift, by least squares."""
    n, s = len(differences), math.fsum(signs)
    total, signed = math.fsum(differences), math.fsum(d * g for d, g in zip(differences, signs, strict=True))
    determinant = n * n - s * s
    effect, drift = (n * total - s * signed) / determinant, (n * signed - s * total) / determinant
    residues = [d - effect - g * drift for d, g in zip(differences, signs, strict=True)]
    squares = math.fsum(r * r for r in residues)
    if squares <= 0.0:
        return effect, effect, effect
    # Neighbouring pairs that go together tell less than their number says.
    together = max(0.0, math.fsum(a * b for a, b in itertools.pairwise(residues)) / squares)
    wider = (1 + together) / max(1e-3, 1 - together)
    variance = squares / (n - 2) * n / determinant * wider
    half = t_quantile(0.5 + confidence / 2, n - 2) * math.sqrt(variance)
    return effect, effect - half, effect + half


def t_quantile(p: float, freedom: int) -> float:
    """Student's t: the value below which a share ``p`` >= 0.5 lies, for whole degrees of freedom; to 1e-9."""
    low, high = 0.0, 1.0
    while _t_share(high, freedom) < p:
        high *= 2
        if high > 1e12:
            return high
    while high - low > 1e-9 * max(1.0, high):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_share(middle, freedom) < p else (low, middle)
    return (low + high) / 2


def _t_share(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0, by the finite series in the angle (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    cos, sin = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term, sum_ = (cos if odd else 1.0), 0.0
    for k in range(1 if odd else 0, freedom - 1, 2):
        sum_ += term
        term *= cos * cos * (k + 1) / (k + 2)
    two_sided = 2 / math.pi * (angle + sin * sum_) if odd else sin * sum_
    return 0.5 + two_sided / 2


def pairs_needed(effect: float, block_noise: float, *, power: float = 0.9, confidence: float = CONFIDENCE) -> int:
    """How many pairs find a true saving ``effect`` with this power when one block scatters by ``block_noise`` (both shares).

    The pair's difference scatters by sqrt(2) x block_noise; n is the least for which (t of the interval + t of the power)
    standard errors fit into the effect, a fifth more for the allowance for correlation, and at least MIN_PAIRS. What changes from
    one block to its neighbour without being drawn anew (drift, correlated noise) belongs into ``block_noise``.
    """
    if not (0 < effect < 1 and block_noise >= 0 and 0.5 <= power < 1):
        raise ValueError(f"no such comparison: effect {effect}, noise {block_noise}, power {power}")
    spread, wanted = math.sqrt(2) * block_noise, -math.log1p(-effect)
    for n in range(MIN_PAIRS, 10_000):
        if (t_quantile(0.5 + confidence / 2, n - 2) + t_quantile(power, n - 2)) * spread / math.sqrt(n / 1.2) <= wanted:
            return n
    raise ValueError(f"more than 10,000 pairs for {effect:.3%} under {block_noise:.3%} of noise")


# --- where blocks come from ---------------------------------------------------------------------------------------------------


class Step(Protocol):
    """A training step as the daemon stores it (powerd.api.JobStepRow is one)."""

    @property
    def plan(self) -> str | None: ...
    @property
    def begin_ns(self) -> int: ...
    @property
    def end_ns(self) -> int: ...
    @property
    def time_s(self) -> float: ...
    @property
    def energy_j(self) -> float | None: ...


def blocks_of_steps(steps: Iterable[Step], *, skip: int = 1) -> tuple[Block, ...]:
    """Steps of a job as blocks: one run of steps under one plan after another, the arm is its plan.

    The first ``skip`` steps of a run are left out (clocks were being changed). A run between two others is cut in the middle, so
    that each half has a neighbour; halves are shortened at their far ends to the median half (50 steps at most), so that compared
    blocks weigh alike. Runs of less than half of that only keep their place. A block with an unmeasured step is unmeasured.
    """
    runs: list[list[Step]] = []
    for step in sorted(steps, key=lambda s: s.begin_ns):
        if runs and runs[-1][-1].plan == step.plan:
            runs[-1].append(step)
        else:
            runs.append([step])
    kept = [run[skip:] for run in runs]
    lengths = [len(run) // 2 for run in kept if len(run) >= 4]
    size = min(MAX_BLOCK_STEPS, statistics.median_low(lengths)) if lengths else 2
    out: list[Block] = []
    for number, run in enumerate(kept):
        arm = runs[number][0].plan or "full clock"
        if len(run) < max(4, size):
            out.append(Block(arm, runs[number][0].begin_ns / 1e9, 0.0, 0.0, None))
            continue
        half = min(size, len(run) // 2)
        out += [_block(arm, run[:half]), _block(arm, run[-half:])]
    return tuple(out)


def _block(arm: str, steps: Sequence[Step]) -> Block:
    energies = [s.energy_j for s in steps]
    known = [e for e in energies if e is not None]
    energy = math.fsum(known) if len(known) == len(energies) else None
    return Block(arm, steps[0].begin_ns / 1e9, math.fsum(s.time_s for s in steps), float(len(steps)), energy)


class Figure(Protocol):
    """The energy of one GPU."""

    @property
    def energy_j(self) -> float | None: ...


class Window(Protocol):
    """An energy window that has ended (powerd.api.WindowView is one)."""

    @property
    def begin_ns(self) -> int: ...
    @property
    def duration_s(self) -> float | None: ...
    @property
    def figures(self) -> Sequence[Figure]: ...


def block_of_window(arm: str, window: Window, work: float = 1.0) -> Block:
    """An energy window as a block: the energies of all its GPUs together, or unmeasured when one of them is not known."""
    energies = [f.energy_j for f in window.figures]
    known = [e for e in energies if e is not None]
    energy = math.fsum(known) if energies and len(known) == len(energies) else None
    return Block(arm, window.begin_ns / 1e9, window.duration_s or 0.0, work, energy)
