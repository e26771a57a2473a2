"""Pools of replicas on the Prometheus page and as rows: what is put together, what is left out, what goes on counting."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from powerd.clock import NS
from powerd.config import ReplicasConfig
from powerd.model import Health, Reading, Snapshot
from powerd.replica import Replica
from powerd.replicatypes import ReplicaRequest, SloSpec
from powerd.scrape import NoPageError
from powerd.sinks.lines import Lines
from powerd.sinks.metrics import Metrics
from powerd.sinks.pools import Pools
from tests.replicas.engine import Engine
from tests.sinks.test_metrics import page as shown

A, B = (f"GPU-00000000-0000-0000-0000-00000000000{n}" for n in (1, 2))
CONFIG = ReplicasConfig(good_scrapes=1, window_s=10)


class Clock:
    """A clock that a test sets."""

    simulated, scale = False, 1.0
    at_ns = 0

    def now_ns(self) -> int:
        return self.at_ns


class Card:
    """Two GPUs at 300 W and 400 W."""

    def __init__(self) -> None:
        self.epoch, self.lost_mj = 1, 0
        self.clock = Clock()

    def snapshot(self) -> Snapshot:
        now_ns = self.clock.at_ns
        ms = now_ns // 1_000_000
        readings = tuple(
            Reading(uuid, now_ns, Health.UP, self.epoch, ms * watts - self.lost_mj, now_ns, watts * 1000, sm_clock_mhz=mhz)
            for uuid, watts, mhz in ((A, 300, 1200), (B, 400, 1400))
        )
        return Snapshot(1, now_ns, now_ns, readings)


class Told:
    """Answers instead of an engine's socket."""

    def __init__(self, engine: Engine) -> None:
        self.engine: Engine | None = engine

    async def read(self) -> str:
        if self.engine is None:
            raise NoPageError("gone")
        return self.engine.page()


def make(card: Card, engine: Engine, name: str, gpus: tuple[str, ...], tp: int = 1) -> tuple[Replica, Told]:
    request = ReplicaRequest(name, "chat", gpus, "http://127.0.0.1:1/", SloSpec(0.5, 0.1), tp)
    clock: Any = card.clock
    replica = Replica(request, 0, (600, 1200, 1800), clock, CONFIG, card.snapshot)
    told = Told(engine)
    replica._reader = told  # type: ignore[assignment]
    replica.lease = name
    return replica, told


def test_a_pool_is_its_replicas_put_together() -> None:
    card, one, two, pools = Card(), Engine(running=3), Engine(running=1, waiting=2), Pools()
    first, _ = make(card, one, "a", (A,))
    second, told = make(card, two, "b", (B,))
    for second_s in range(1, 4):
        card.clock.at_ns = second_s * NS
        one.ttft += [0.2] * 99
        two.ttft += [0.3] * 2
        one.gaps += [0.03] * 500
        for replica in (first, second):
            asyncio.run(replica.look())
    metrics = Metrics()
    pools.count(metrics, [first, second])
    samples = shown(metrics)
    values = {name: value for (name, labels), value in samples.items() if dict(labels).get("pool") == "chat"}
    assert values == {
        "powerd_pool_replicas": 2, "powerd_pool_requests_running": 4, "powerd_pool_requests_waiting": 2,
        "powerd_pool_ttft_p99_seconds": 0.5, "powerd_pool_tbt_p99_seconds": 0.05, "powerd_pool_clock_hertz": 1.3e9,
        "powerd_pool_power_watts": 700, "powerd_pool_energy_joules_total": 1400, "powerd_replica_fresh": 1,
        "powerd_replica_within_slo": 1,
    }  # fmt: skip
    (row,) = pools.rows([first, second], 5 * NS)
    assert (row.replicas, row.tensor_parallel, row.sm_clock_mhz, row.queued, row.energy_j) == (2, 1, 1300, 2, 1400)
    assert (row.ttft_p50_s, row.ttft_p99_s, row.tbt_p99_s, row.slo_share) == (0.25, 0.5, 0.05, 1.0)
    assert row.requests_per_s == pytest.approx(101)
    line = Lines("h", sample_hz=1, every=True).inference(row)[0]
    assert line.startswith("inference,host=h,pool=chat ")
    assert "energy_joules=1400" in line

    told.engine = None  # its figures are nobody's; its GPU still draws
    card.clock.at_ns = 9 * NS
    for replica in (first, second):
        asyncio.run(replica.look())
    pools.count(metrics, [first, second])
    samples = shown(metrics)
    assert samples["powerd_pool_requests_waiting", (("pool", "chat"), ("tp", "1"))] == 0
    assert samples["powerd_replica_fresh", (("pool", "chat"), ("replica", "b"))] == 0
    assert pools.rows([first, second], 10 * NS)[0].energy_j == 6 * 700

    pools.leave(second)
    pools.count(metrics, [first])
    samples = shown(metrics)
    assert samples["powerd_pool_energy_joules_total", (("pool", "chat"), ("tp", "1"))] == 8 * 700, "what it used stays"
    assert samples["powerd_pool_replicas", (("pool", "chat"), ("tp", "1"))] == 1
    assert ("powerd_replica_fresh", (("pool", "chat"), ("replica", "b"))) not in samples


def test_a_counter_that_restarts_adds_nothing_and_loses_nothing() -> None:
    card = Card()
    replica, _ = make(card, Engine(running=1), "a", (A,))
    for second_s in (1, 2):
        card.clock.at_ns = second_s * NS
        asyncio.run(replica.look())
    card.epoch, card.lost_mj = 2, 500_000
    for second_s in (3, 4):
        card.clock.at_ns = second_s * NS
        asyncio.run(replica.look())
    assert replica.joules.total_j == 600


def test_different_buckets_are_not_put_together_and_the_worst_stands() -> None:
    card, one, two, pools = Card(), Engine(running=1), Engine(running=1), Pools()
    first, _ = make(card, one, "a", (A,), tp=1)
    second, _ = make(card, two, "b", (B,), tp=2)
    plain = two.page

    def other() -> str:
        return plain().replace('le="0.25"', 'le="0.3"')

    two.page = other  # type: ignore[method-assign]
    for second_s in (1, 2):
        card.clock.at_ns = second_s * NS
        one.ttft += [0.2] * 1000
        two.ttft += [0.2]
        for replica in (first, second):
            asyncio.run(replica.look())
    (row,) = pools.rows([first, second], 5 * NS)
    assert row.ttft_p99_s == 0.3
    assert row.tensor_parallel is None
