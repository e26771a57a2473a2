"""Readings whose values follow from their second, in a store that is opened anew as often as a test likes."""

import time
from pathlib import Path
from typing import Any

from powerd.clock import NS, RealClock
from powerd.config import StoreConfig
from powerd.model import Health, Reading, Snapshot
from powerd.sinks.store import Store

A, B = (f"GPU-00000000-0000-0000-0000-00000000000{n}" for n in (1, 2))
T0 = 1_800_000_000 // 3600 * 3600  # a whole hour


def snapshot(second: float, gpus: tuple[str, ...] = (A, B), **fields: Any) -> Snapshot:
    ns = round((T0 + second) * NS)
    return Snapshot(0, ns, ns, tuple(Reading(uuid, ns, Health.UP, 1, **fields) for uuid in gpus))


def store(path: Path, config: StoreConfig | None = None) -> Store:
    return Store(path / "store.sqlite", config or StoreConfig(), RealClock())


def fill(target: Store, seconds: range, hz: int = 1, gpus: tuple[str, ...] = (A, B)) -> None:
    """Energy rises by 300 J a second, power is 100 W times the second's last digit."""
    for second in seconds:
        while target.stats().backlog > 2000:
            time.sleep(0.001)
        for part in range(hz):
            target.append(snapshot(second + part / hz, gpus, energy_mj=300_000 * second + part, power_mw=100_000 * (second % 10)))


def wait_until_rows(target: Store, rows: int) -> None:
    """The writer works once a second; a full batch wakes it."""
    deadline = time.monotonic() + 30
    while target.stats().rows < rows:
        assert time.monotonic() < deadline, target.stats()
        time.sleep(0.02)
