"""Which instances a fleet has: integer counts and load shares of least cost, by mixed-integer programming (DynamoLLM 4.2).

House rules: instances of one pool, tensor parallelism and clock are alike, so the programme counts them and does not name them:
its size does not grow with the cluster; what cannot be met is said by pool and with what would be needed; every watt, GPU and
load share in the answer adds up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

EXACT_GPUS: Final = 32  # up to here the answer is the optimum, whatever couples the pools
GAPS: Final = (1e-6, 2e-3)  # of the cost: below this two fleets are alike; up to EXACT_GPUS, and beyond
NODES: Final = 200  # beyond EXACT_GPUS, HiGHS stops here with the best that it has: the same on a busy machine
STEADY_GPUS: Final = 256  # up to here that takes less than a second
LIMIT_S: Final = 0.7  # beyond STEADY_GPUS it stops here
_STOPPED: Final = 1  # HiGHS came to its limit


@dataclass(frozen=True, slots=True)
class Option:
    """A kind of instance a pool may have: what one holds safely and what it draws, ``base_w`` unloaded and ``load_w`` per load.

    Load is in the pool's own unit (requests/s, or a share of its demand). ``have`` of them run already: each one beyond costs
    ``start_w`` more (the joules of a start over the seconds that it is expected to pay for).
    """

    tp: int
    clock_mhz: int
    holds: float
    base_w: float
    load_w: float = 0.0
    have: int = 0
    start_w: float = 0.0


@dataclass(frozen=True, slots=True)
class Pool:
    """A pool's demand and what it may be served with; ``gpus``: exactly so many, None: as many as it takes."""

    name: str
    load: float
    options: tuple[Option, ...]
    gpus: int | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """What counts how much: ``energy`` per watt, ``gpu`` per GPU that is on (a price; in watts, 0: energy alone)."""

    energy: float = 1.0
    gpu: float = 0.0


@dataclass(frozen=True, slots=True)
class Share:
    """So many instances of an option, which together take ``load``."""

    option: Option
    count: int
    load: float


@dataclass(frozen=True, slots=True)
class Sharding:
    """The answer: for each pool the instances it has. ``power_w`` is without the cost of starts."""

    pools: dict[str, tuple[Share, ...]]
    gpus: int
    power_w: float
    cost: float


class InfeasibleError(ValueError):
    """No fleet does: the message names the pool and says what would be needed."""


def optimise(pools: Sequence[Pool], gpus: int, *, budget_w: float | None = None, weights: Weights | None = None) -> Sharding:
    """Return the sharding of least cost that holds each pool's load with ``gpus`` GPUs at most and ``budget_w`` watts at most.

    Exact up to 32 GPUs, and beyond as long as pools do not compete for GPUs or watts; where many do, within 0.2 % or what HiGHS
    finds in 200 nodes, beyond 256 GPUs in a second. Raises ``InfeasibleError``.
    """
    weights = weights or Weights()
    _possible(pools, gpus)
    solved = _apart(pools, gpus, budget_w, weights) or _solve(pools, gpus, budget_w, weights)
    if solved is None:
        raise InfeasibleError(_explain(pools, gpus, budget_w, weights))
    return solved


def _possible(pools: Sequence[Pool], gpus: int) -> None:
    """Refuse what no number of GPUs would change."""
    for pool in pools:
        if pool.load > 0 and not any(option.holds > 0 for option in pool.options):
            raise InfeasibleError(f"{pool.name}: no tensor parallelism and clock keeps its SLO at any load")
    fixed = sum(pool.gpus or 0 for pool in pools)
    if fixed > gpus:
        raise InfeasibleError(f"the pools are to have {fixed} GPUs, and there are {gpus}")


def _apart(pools: Sequence[Pool], gpus: int, budget_w: float | None, weights: Weights) -> Sharding | None:
    """Return the best of each pool by itself, when together they stay within GPUs and watts: nothing can cost less."""
    if len(pools) < 2:
        return None
    own = [_solve([pool], gpus, budget_w, weights) for pool in pools]
    solved = [each for each in own if each is not None]
    used, power_w = sum(each.gpus for each in solved), sum(each.power_w for each in solved)
    if len(solved) < len(pools) or used > gpus or (budget_w is not None and power_w > budget_w):
        return None
    shares = {name: share for each in solved for name, share in each.pools.items()}
    return Sharding(shares, used, power_w, sum(each.cost for each in solved))


def _solve(pools: Sequence[Pool], gpus: int, budget_w: float | None, weights: Weights) -> Sharding | None:
    """Variables: per option a count, its load and the starts among the count; None when infeasible."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import lil_matrix

    columns = [(p, option) for p, pool in enumerate(pools) for option in pool.options]
    many = len(columns)
    if not many:
        return Sharding({pool.name: () for pool in pools}, 0, 0.0, 0.0) if all(pool.load <= 0 for pool in pools) else None
    cost, upper, whole = np.zeros(3 * many), np.full(3 * many, np.inf), np.zeros(3 * many)
    rows = lil_matrix((2 * many + len(pools) + sum(pool.gpus is not None for pool in pools) + 2, 3 * many))
    low, high = np.full(rows.shape[0], -np.inf), np.full(rows.shape[0], np.inf)
    row = 0
    for n, (p, option) in enumerate(columns):
        count, load, start = 3 * n, 3 * n + 1, 3 * n + 2
        cost[count] = weights.energy * option.base_w + weights.gpu * option.tp
        cost[load], cost[start] = weights.energy * option.load_w, weights.energy * option.start_w
        whole[count] = 1
        upper[count] = gpus // option.tp
        upper[load] = max(pools[p].load, 0.0) if option.holds > 0 else 0.0
        rows[row, load], rows[row, count], high[row] = 1.0, -option.holds, 0.0
        row += 1
        rows[row, start], rows[row, count], low[row] = 1.0, -1.0, -option.have
        row += 1
    for p, pool in enumerate(pools):
        mine = [n for n, (owner, _) in enumerate(columns) if owner == p]
        for n in mine:
            rows[row, 3 * n + 1] = 1.0
        low[row] = high[row] = max(pool.load, 0.0)
        row += 1
        if pool.gpus is not None:
            for n in mine:
                rows[row, 3 * n] = columns[n][1].tp
            low[row] = high[row] = pool.gpus
            row += 1
    for n, (_, option) in enumerate(columns):
        rows[row, 3 * n] = option.tp
        rows[row + 1, 3 * n], rows[row + 1, 3 * n + 1] = option.base_w, option.load_w
    high[row] = gpus
    if budget_w is not None:
        high[row + 1] = budget_w
    limits = LinearConstraint(rows.tocsr(), low, high)
    exact = {"mip_rel_gap": GAPS[0]}
    steady = {"mip_rel_gap": GAPS[1], "node_limit": NODES}
    hurried = {"mip_rel_gap": GAPS[1], "time_limit": LIMIT_S / (1 if len(pools) > 1 else 9)}
    options = exact if gpus <= EXACT_GPUS else steady if gpus <= STEADY_GPUS else hurried
    answer = milp(cost, constraints=limits, bounds=Bounds(0.0, upper), integrality=whole, options=options)
    if answer.x is None and answer.status == _STOPPED:  # nothing found yet does not mean that there is nothing
        answer = milp(cost, constraints=limits, bounds=Bounds(0.0, upper), integrality=whole, options={"mip_rel_gap": GAPS[1]})
    if answer.x is None:
        return None
    return _answer(pools, columns, answer.x, float(answer.fun))


def _answer(pools: Sequence[Pool], columns: list[tuple[int, Option]], x: Sequence[float], cost: float) -> Sharding:
    shares: dict[str, list[Share]] = {pool.name: [] for pool in pools}
    gpus, power_w = 0, 0.0
    for n, (p, option) in enumerate(columns):
        count, load = round(x[3 * n]), max(0.0, float(x[3 * n + 1]))
        if count:
            shares[pools[p].name].append(Share(option, count, load))
            gpus += count * option.tp
            power_w += count * option.base_w + load * option.load_w
    return Sharding({name: tuple(own) for name, own in shares.items()}, gpus, power_w, cost)


def _explain(pools: Sequence[Pool], gpus: int, budget_w: float | None, weights: Weights) -> str:
    """Say which limit is in the way, and what would do."""
    enough = 1 + sum(
        max(pool.gpus or 0, min((_need(pool, option) for option in pool.options if option.holds > 0), default=0))
        for pool in pools
    )
    for pool in pools:
        if pool.gpus is not None and (lacks := _alone(pool)):
            return lacks
    free = _solve([Pool(p.name, p.load, p.options, p.gpus) for p in pools], max(gpus, enough), None, weights)
    if free is None:
        return f"{', '.join(pool.name for pool in pools)}: no whole number of instances makes up the GPUs that they are to have"
    if free.gpus > gpus:
        least = _solve(pools, max(gpus, enough), None, Weights(0.0, 1.0))
        needed = least.gpus if least else free.gpus
        if needed > gpus:
            most = max(pools, key=lambda pool: min((_need(pool, o) for o in pool.options if o.holds > 0), default=0))
            return f"{most.name} needs most: {needed} GPUs would be needed in all, and there are {gpus}"
    frugal = _solve(pools, gpus, None, Weights(1.0, 0.0))
    watts = f"{frugal.power_w:.0f} W would be needed, and the budget is {budget_w:.0f} W" if frugal and budget_w else "no fleet"
    most = max(pools, key=lambda pool: pool.load)
    return f"{most.name}: {watts}"


def _alone(pool: Pool) -> str:
    """Say why a pool with a given number of GPUs cannot do; empty when it can."""
    if _solve([pool], pool.gpus or 0, None, Weights()) is not None:
        return ""
    least = _solve([Pool(pool.name, pool.load, pool.options)], 1 + _most(pool), None, Weights(0.0, 1.0))
    needed = f"{least.gpus} GPUs would be needed" if least else "no fleet of its options holds it"
    return f"{pool.name}: {pool.load:g} of load does not fit {pool.gpus} GPUs: {needed}"


def _need(pool: Pool, option: Option) -> int:
    """GPUs that a pool takes with one option alone."""
    return option.tp * -int(-pool.load // option.holds)


def _most(pool: Pool) -> int:
    return min((_need(pool, option) for option in pool.options if option.holds > 0), default=0) + (pool.gpus or 0)
