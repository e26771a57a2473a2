"""The cluster controller (every 30 minutes): which pools there are, what each has to hold, and how many GPUs it may have.

House rules: pure; pools are chosen among a handful of partitions by what they would draw; load that a pool has no whole instance
for goes to the next larger pool (fragments), so that only the largest one is provided too much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from powerd_policies.dynamollm.capacity import Demand, total_of
from powerd_policies.dynamollm.fragments import PARTITIONS, Allocation, Partition, allocate
from powerd_policies.dynamollm.knobs import Knobs
from powerd_policies.dynamollm.pool import Layout, Need, PoolController
from powerd_policies.dynamollm.predictor import Rate


@dataclass(frozen=True, slots=True)
class Pools:
    """A partition and, of each pool's own load, the share that each pool serves; GPUs by pool where they are given."""

    name: str
    partition: Partition
    shares: Mapping[str, Mapping[str, float]]
    gpus: Mapping[str, int] | None = None

    def demands(self, load: Demand) -> dict[str, dict[str, Rate]]:
        """Return what each pool has to serve of ``load`` (by class), remainders moved; load is conserved."""
        found: dict[str, dict[str, Rate]] = {pool: {} for pool in self.partition}
        for owner, names in self.partition.items():
            shares = self.shares.get(owner) or {owner: 1.0}
            for name in names:
                if (rate := load.get(name)) is None or rate.requests_per_s <= 0:
                    continue
                for pool, share in shares.items():
                    part = (rate.requests_per_s * share, rate.prompt_tokens_per_s * share, rate.output_tokens_per_s * share)
                    old = found[pool].get(name, Rate())
                    found[pool][name] = Rate(
                        old.requests_per_s + part[0], old.prompt_tokens_per_s + part[1], old.output_tokens_per_s + part[2]
                    )
        return found


class ClusterController:
    """Chooses the pools for a predicted load."""

    def __init__(self, pool: PoolController, knobs: Knobs, gpus: int) -> None:
        self.pool, self.knobs, self.gpus = pool, knobs, gpus

    def plan(self, peak: Demand, mean: Demand, now: Pools | None = None) -> Pools:
        """Return the cheapest of the allowed partitions for the epoch's ``peak``; ``now`` stays unless another saves enough."""
        names = self.knobs.partitions
        if len(names) == 1 or total_of(peak).requests_per_s <= 0:
            return self._pools(names[0], peak)
        judged = [self._judge(name, peak, mean) for name in names]
        best = min(judged, key=lambda each: each[0])
        if now is not None:
            stays = next((each for each in judged if each[1].name == now.name), None)
            if stays is not None and best[0] > (1.0 - self.knobs.merge_gain) * stays[0]:
                return stays[1]
        first = judged[0]
        return first[1] if best[0] > (1.0 - self.knobs.merge_gain) * first[0] else best[1]

    def _judge(self, name: str, peak: Demand, mean: Demand) -> tuple[float, Pools]:
        pools = self._pools(name, peak)
        layout = self.layout(pools, peak, mean, {})
        over = max(0, layout.gpus - self.gpus)
        return (float("inf") if layout.lacks or over else layout.power_w, pools)

    def layout(self, pools: Pools, peak: Demand, mean: Demand, have: Mapping[str, Mapping[int, int]]) -> Layout:
        """Return the pool controller's layout of these pools."""
        return self.pool.plan(needs(pools, peak, mean, have))

    def standing(self, name: str) -> Pools:
        """Return the pools of a partition with all GPUs shared out by what is known beforehand."""
        partition, tp = PARTITIONS[name], self.knobs.tp
        allocation = self._by_work(partition)
        counts = dict(allocation.counts)
        counts[max(counts, key=lambda pool: counts[pool])] += self.gpus // tp - sum(counts.values())
        return Pools(name, partition, allocation.shares, {pool: tp * count for pool, count in counts.items()})

    def _pools(self, name: str, peak: Demand) -> Pools:
        partition = PARTITIONS[name]
        given = not self.knobs.instances or not self.knobs.joint
        if len(partition) == 1:
            (only,) = partition
            gpus = {only: self._gpus(peak) if self.knobs.instances else self.gpus} if given else None
            return Pools(name, partition, {only: {only: 1.0}}, gpus)
        allocation = self._fractions(partition, peak) if self.knobs.instances else self._by_work(partition)
        if not given:
            return Pools(name, partition, allocation.shares)
        tp = self.knobs.tp
        counts = dict(allocation.counts)
        if not self.knobs.instances:  # all GPUs stay on: those that are left go to the largest pool
            counts[max(counts, key=lambda pool: counts[pool])] += self.gpus // tp - sum(counts.values())
        return Pools(name, partition, allocation.shares, {pool: tp * count for pool, count in counts.items()})

    def _gpus(self, peak: Demand) -> int:
        """GPUs for one pool as the paper counts them: instances of the reference parallelism at the highest clock."""
        tp = self.knobs.tp
        most = self.gpus // tp
        return tp * max(1, self.pool.capacity.least(tp, self._top(), peak, most) or most)

    def _fractions(self, partition: Partition, peak: Demand) -> Allocation:
        """Return whole instances of the reference parallelism for each pool's load."""
        tp, most = self.knobs.tp, self.gpus // self.knobs.tp
        wanted: dict[str, float] = {}
        for pool, names in partition.items():
            own = {name: peak[name] for name in names if name in peak and peak[name].requests_per_s > 0}
            if not own:
                wanted[pool] = 0.0
                continue
            count = self.pool.capacity.least(tp, self._top(), own, most) or most
            wanted[pool] = count / max(1.0, self.pool.capacity.holds(tp, self._top(), count, own))
        spare = len(partition)  # whole instances need room for what is rounded up
        return allocate(wanted, max(1, most - (1 if spare > 1 else 0)))

    def _by_work(self, partition: Partition) -> Allocation:
        """Return all instances, shared out by the work that each class is known to bring: for pools that never change."""
        capacity, most = self.pool.capacity, self.gpus // self.knobs.tp
        at = capacity.model.table[self.knobs.tp, self._top()]
        token_s = at.decode_request_s + at.decode_fixed_s / 32  # of an answer, in a batch of ordinary size
        works = {
            pool: sum(
                known.share * (known.prompt_tokens * at.prefill_token_s + known.output_tokens * token_s)
                for name in names
                if (known := capacity.lengths.get(name)) is not None
            )
            for pool, names in partition.items()
        }
        total = sum(works.values()) or 1.0
        return allocate({pool: (most - 1) * work / total for pool, work in works.items()}, most)

    def _top(self) -> int:
        return self.pool.capacity.model.clocks_mhz(self.knobs.tp)[0]


def needs(pools: Pools, peak: Demand, mean: Demand, have: Mapping[str, Mapping[int, int]]) -> list[Need]:
    """Return what each pool has to hold and to do."""
    peaks, means = pools.demands(peak), pools.demands(mean)
    return [
        Need(pool, peaks[pool], means[pool], have.get(pool, {}), None if pools.gpus is None else pools.gpus.get(pool, 0))
        for pool in pools.partition
    ]
