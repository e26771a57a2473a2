"""Weighted non-negative least squares with few unknowns, in plain Python: powers of labels from energies of intervals.

House rules: pure; sparse rows and normal equations; unknowns that the data do not tell apart stay near the mean power, with a
standard error that says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_T95 = (12.7, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # Student's t for 1, 2, ... degrees of freedom
_JITTER_S = 0.01  # what the edges of an interval are worth before the residue says better
_LEAST_W = 20.0  # spread of powers that is thought possible at least


@dataclass(frozen=True, slots=True)
class Row:
    """One interval: its energy, its length, (label, seconds) inside it, and the labels at its two edges."""

    energy_j: float
    seconds: float
    overlaps: Sequence[tuple[int, float]]
    at_begin: int
    at_end: int


@dataclass(frozen=True, slots=True)
class Fit:
    """Power of each label, half of its 95 % interval, and the weighted sum of squared residues."""

    power_w: list[float]
    half_w: list[float]
    residue: float


def _solve(matrix: list[list[float]], vector: list[float]) -> list[float]:
    """Solve a symmetric positive definite system by Cholesky's decomposition."""
    lower = _cholesky(matrix)
    n = len(vector)
    x = vector[:]
    for i in range(n):
        x[i] = (x[i] - sum(lower[i][k] * x[k] for k in range(i))) / lower[i][i]
    for i in reversed(range(n)):
        x[i] = (x[i] - sum(lower[k][i] * x[k] for k in range(i + 1, n))) / lower[i][i]
    return x


def _cholesky(matrix: list[list[float]]) -> list[list[float]]:
    n = len(matrix)
    lower = [[0.0] * n for _ in range(n)]
    for i in range(n):
        row = lower[i]
        for j in range(i + 1):
            other = lower[j]
            rest = matrix[i][j] - sum(row[k] * other[k] for k in range(j))
            row[j] = math.sqrt(max(rest, 1e-12 * matrix[i][i], 1e-300)) if i == j else rest / other[j]
    return lower


def _variances(matrix: list[list[float]]) -> list[float]:
    """The diagonal of the inverse."""
    lower = _cholesky(matrix)
    n = len(matrix)
    out = [0.0] * n
    for column in range(n):
        x = [0.0] * n
        for i in range(column, n):
            x[i] = ((1.0 if i == column else 0.0) - sum(lower[i][k] * x[k] for k in range(column, i))) / lower[i][i]
        for k in range(column, n):  # row `column` of the inverse's own factor: sums of squares of its columns
            out[column] += x[k] * x[k]
    return out


def fit(rows: Sequence[Row], width: int, *, phase: bool = True, phase_s: float = 0.03, each: float = 1.0) -> Fit:
    """Powers of ``width`` labels; with ``phase`` their errors include that of a common delay of all edges (``phase_s``).

    ``each``: so many rows tell one thing, because they overlap.
    """
    total_j, total_s = sum(r.energy_j for r in rows), sum(r.seconds for r in rows)
    if not rows or total_s <= 0:
        return Fit([0.0] * width, [math.inf] * width, math.inf)
    mean_w = total_j / total_s
    gram = [[0.0] * width for _ in range(width)]
    right = [0.0] * width
    squares = 0.0
    for row in rows:
        weight = 1 / row.seconds  # then the fitted powers add up to the counter's total
        excess = row.energy_j - mean_w * row.seconds
        squares += weight * excess * excess
        for a, seconds in row.overlaps:
            right[a] += weight * seconds * excess
            line = gram[a]
            for b, other in row.overlaps:
                line[b] += weight * seconds * other
    scale = total_s / width
    used = [n for n in range(width) if gram[n][n] > 0]
    weak = 1e-9 * scale
    x = _bounded(gram, right, [weak] * width, used, -mean_w)
    residue = max(0.0, squares - 2 * sum(x[a] * right[a] for a in used)
                  + sum(x[a] * gram[a][b] * x[b] for a in used for b in used))  # fmt: skip
    if not phase:
        return Fit([mean_w + v for v in x], [], residue)
    # One observation's worth of belief about the noise before any residue: edges are off by some milliseconds.
    freedom = max(0, round(len(rows) / each) - len(used)) + 1
    typical_s = total_s / len(rows)
    variance = (residue + 2 * (mean_w * _JITTER_S) ** 2 / typical_s) / freedom
    spread_w = max(mean_w, _LEAST_W)
    prior = variance / spread_w**2
    x = _bounded(gram, right, [prior] * width, used, -mean_w)
    power = [mean_w + v for v in x]
    half = _halves(rows, gram, used, power, prior, variance, phase_s, width)
    t95 = _T95[freedom - 1] if freedom <= len(_T95) else 1.96 + 2.4 / freedom
    return Fit(power, [t95 * h for h in half], residue)


def _bounded(gram: list[list[float]], right: list[float], ridge: list[float], used: Sequence[int], least: float) -> list[float]:
    """The least squares solution with no power below zero: what would be is held there, the rest solved again."""
    x = [0.0] * len(right)
    held: set[int] = set()
    while True:
        free = [n for n in used if n not in held]
        for n in held:
            x[n] = least
        vector = [right[a] - sum(gram[a][b] * least for b in held) for a in free]
        matrix = [[gram[a][b] + (ridge[a] if a == b else 0.0) for b in free] for a in free]
        for n, value in zip(free, _solve(matrix, vector), strict=True):
            x[n] = value
        below = [n for n in free if x[n] < least]
        if not below:
            return x
        held.update(below)


def _halves(
    rows: Sequence[Row], gram: list[list[float]], used: Sequence[int], power: list[float], prior: float, variance: float,
    phase_s: float, width: int,
) -> list[float]:  # fmt: skip
    """Standard errors of the powers, the common delay of the edges being unknown too."""
    cross, own = [0.0] * width, 0.0
    for row in rows:
        shift = power[row.at_end] - power[row.at_begin]  # joules per second of delay
        own += shift * shift / row.seconds
        for a, seconds in row.overlaps:
            cross[a] += shift * seconds / row.seconds
    matrix = [[gram[a][b] + (prior if a == b else 0.0) for b in used] + [cross[a]] for a in used]
    matrix.append([cross[b] for b in used] + [own + variance / phase_s**2])
    found = _variances(matrix)
    half = [math.inf] * width
    for n, value in zip(used, found, strict=False):
        half[n] = math.sqrt(variance * value)
    return half
