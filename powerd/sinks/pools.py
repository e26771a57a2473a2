"""Pools of inference replicas: what the Prometheus page shows of them, and their rows for InfluxDB.

House rules: a figure of a pool is of those of its replicas whose metrics are believed; latencies with the same buckets are put
together, else the worst stands for all; energy is of all, and of several promises the strictest is the pool's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from powerd.enginepage import Histogram
from powerd.sinks.lines import InferenceRow
from powerd.sinks.metrics import Metrics

if TYPE_CHECKING:
    from powerd.engineload import Figures
    from powerd.replica import Replica

Pool = tuple[str, ...]  # pool, tensor parallelism
_KEPT = 256


def _sum(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) if known else None


def _worst(values: Iterable[float | None]) -> float | None:
    return max((v for v in values if v is not None), default=None)


def _least(values: Iterable[float | None]) -> float | None:
    return min((v for v in values if v is not None), default=None)


def _edge(figures: Sequence[Figures], of: str, share: float) -> float | None:
    """The edge that ``share`` of the observations of a latency (ttft, tbt) lie below."""
    seen = [h for f in figures if (h := getattr(f, f"{of}_seen")) is not None and h.total > 0]
    together: Histogram | None = seen[0] if seen else None
    for other in seen[1:]:
        together = None if together is None else together.plus(other)
    if together is None:
        return _worst(edge[0] for h in seen if (edge := h.upper_edge(share)) is not None)
    edge = together.upper_edge(share)
    return None if edge is None else edge[0]


class Pools:
    """Sums over replicas, those that have left too."""

    def __init__(self) -> None:
        self._left_j: dict[Pool, float] = {}
        self._told_j: dict[str, float] = {}

    def leave(self, replica: Replica) -> None:
        """A replica is gone: what it used stays in its pool's sum."""
        key = replica.request.pool, str(replica.request.tp)
        if key in self._left_j or len(self._left_j) < _KEPT:
            self._left_j[key] = self._left_j.get(key, 0.0) + replica.joules.total_j

    def rows(self, replicas: Iterable[Replica], wall_ns: int) -> list[InferenceRow]:
        """How each pool did since the last time."""
        pools: dict[str, list[Replica]] = {}
        for replica in replicas:
            pools.setdefault(replica.request.pool, []).append(replica)
        rows = [self._row(pool, members, wall_ns) for pool, members in pools.items()]
        self._told_j = {r.lease or "": r.joules.total_j for members in pools.values() for r in members}
        return rows

    def _row(self, pool: str, members: list[Replica], wall_ns: int) -> InferenceRow:
        figures = _figures(members)
        clocks = [r.joules.sm_clock_mhz for r in members if r.joules.sm_clock_mhz is not None]
        parallel = {r.request.tp for r in members}
        queued, running = _sum(f.page.waiting for f in figures), _sum(f.page.running for f in figures)
        used = [r.joules.total_j - self._told_j.get(r.lease or "", 0.0) for r in members if r.joules.known]
        return InferenceRow(
            pool, wall_ns, replicas=len(members), tensor_parallel=parallel.pop() if len(parallel) == 1 else None,
            sm_clock_mhz=round(sum(clocks) / len(clocks)) if clocks else None,
            requests_per_s=_sum(f.requests_per_s for f in figures), queued=None if queued is None else int(queued),
            ttft_p50_s=_edge(figures, "ttft", 0.5), ttft_p99_s=_edge(figures, "ttft", 0.99),
            tbt_p50_s=_edge(figures, "tbt", 0.5), tbt_p99_s=_edge(figures, "tbt", 0.99),
            energy_j=sum(used) if used else None, slo_share=_least(s for f in figures for s in (f.ttft.share, f.tbt.share)),
            fresh_replicas=sum(r.fresh for r in members), running=None if running is None else int(running),
            power_w=_sum(r.joules.power_w for r in members),
            ttft_slo_s=_least(r.request.slo.ttft_s for r in members), tbt_slo_s=_least(r.request.slo.tbt_s for r in members),
        )  # fmt: skip

    def count(self, metrics: Metrics, replicas: Sequence[Replica]) -> None:
        """What the Prometheus page says of pools and replicas."""
        pools: dict[Pool, list[Replica]] = {}
        for replica in replicas:
            pools.setdefault((replica.request.pool, str(replica.request.tp)), []).append(replica)
        energy = dict(self._left_j)
        for key, members in pools.items():
            if key in energy or len(energy) < _KEPT:
                energy[key] = energy.get(key, 0.0) + sum(r.joules.total_j for r in members)
        metrics.replace("powerd_pool_energy_joules", energy)
        metrics.replace("powerd_pool_replicas", {key: len(members) for key, members in pools.items()})
        columns: dict[str, dict[Pool, float | None]] = {
            "fresh_replicas": {k: sum(r.fresh for r in m) for k, m in pools.items()},
            "ttft_slo_seconds": {k: _least(r.request.slo.ttft_s for r in m) for k, m in pools.items()},
            "tbt_slo_seconds": {k: _least(r.request.slo.tbt_s for r in m) for k, m in pools.items()},
            "requests_running": {k: _sum(f.page.running for f in _figures(m)) for k, m in pools.items()},
            "requests_waiting": {k: _sum(f.page.waiting for f in _figures(m)) for k, m in pools.items()},
            "ttft_p99_seconds": {k: _edge(_figures(m), "ttft", 0.99) for k, m in pools.items()},
            "tbt_p99_seconds": {k: _edge(_figures(m), "tbt", 0.99) for k, m in pools.items()},
            "clock_hertz": {k: _clock_hz(m) for k, m in pools.items()},
            "power_watts": {k: _sum(r.joules.power_w for r in m) for k, m in pools.items()},
        }
        for name, column in columns.items():
            metrics.replace(f"powerd_pool_{name}", {k: v for k, v in column.items() if v is not None})
        names = {(r.request.pool, r.request.name): r for r in replicas}
        metrics.replace("powerd_replica_fresh", {k: float(r.fresh) for k, r in names.items()})
        kept = {k: r.figures.within_slo for k, r in names.items() if r.fresh and r.figures is not None}
        metrics.replace("powerd_replica_within_slo", {k: float(v) for k, v in kept.items() if v is not None})


def _figures(members: Iterable[Replica]) -> list[Figures]:
    return [r.figures for r in members if r.fresh and r.figures is not None]


def _clock_hz(members: Iterable[Replica]) -> float | None:
    clocks = [r.joules.sm_clock_mhz for r in members if r.joules.sm_clock_mhz is not None]
    return sum(clocks) / len(clocks) * 1e6 if clocks else None
