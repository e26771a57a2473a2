"""What is known of this node: its GPUs, who runs on them, the newest snapshot, and whether hw is there.

House rules: one writer (the link to hw), immutable snapshots, one swapped reference; a quantised copy is swapped once a second.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from powerd.clock import NS, Clock
from powerd.errors import RequestError, UnavailableError
from powerd.hw.tables import capabilities_of, processes_of
from powerd.log import log
from powerd.model import Capabilities, Health, Reading, Snapshot

_UNREACHABLE = (Health.LOST, Health.WEDGED)


def quantise(reading: Reading) -> Reading:
    """What a caller sees of a GPU that it merely shares: whole watts, joules and seconds."""

    def whole(value: int | None, unit: int) -> int | None:
        return None if value is None else round(value / unit) * unit

    return replace(
        reading,
        time_ns=reading.time_ns // NS * NS,
        energy_time_ns=None if reading.energy_time_ns is None else reading.energy_time_ns // NS * NS,
        energy_mj=whole(reading.energy_mj, 1000),
        power_mw=whole(reading.power_mw, 1000),
        power_average_mw=whole(reading.power_average_mw, 1000),
    )


def _uid_of(pid: int) -> int | None:
    """Whose process this is, safe against the reuse of its number."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return None
    try:
        uid = os.stat(f"/proc/{pid}").st_uid
        return uid if alive(descriptor) else None
    except OSError:
        return None
    finally:
        os.close(descriptor)


def alive(pidfd: int) -> bool:
    """Whether the process behind a pidfd still runs."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return not poll.poll(0)


class Node:
    """The facts of this node as hw last told them."""

    def __init__(self, clock: Clock, sample_hz: float) -> None:
        self._clock = clock
        self.capabilities: Mapping[str, Capabilities] = {}
        self.processes: Mapping[str, frozenset[int]] = {}
        self.users: Mapping[str, frozenset[int]] = {}
        self.status: Mapping[str, Any] = {}
        self.host_energy_uj: dict[tuple[str, int], int] = {}  # (package or dram, number): since powerd started or earlier
        self._host_base_uj: dict[tuple[str, int], tuple[int, int]] = {}  # of earlier powerd-hw, and what this one said last
        self.connected = False
        self.hw_problem = ""
        self._hw_error = ""  # why hw cannot serve, in its own words: worth more than "not connected"
        self.generation: int | None = None
        self.driver_version: str | None = None
        self.sample_hz = sample_hz
        self.simulated = False
        self.snapshot: Snapshot | None = None
        self.slow_snapshot: Snapshot | None = None
        self.listeners: list[Callable[[Snapshot], None]] = []
        self._health: dict[str, Health] = {}

    def hw_connected(self, hello: Mapping[str, Any]) -> None:
        self.connected, self.hw_problem = True, self._hw_error
        self._generation(hello)
        driver = hello.get("driver")
        self.driver_version = driver if isinstance(driver, str) and driver else self.driver_version
        self.sample_hz = float(hello.get("sample_hz") or self.sample_hz)
        self.simulated = bool(hello.get("simulated", self.simulated))

    def _generation(self, content: Mapping[str, Any]) -> None:
        generation = content.get("generation")
        self.generation = generation if isinstance(generation, int) else self.generation

    def hw_disconnected(self, why: str) -> None:
        self.connected, self.hw_problem = False, self._hw_error or why
        self.status = {}
        self.processes, self.users = {}, {}  # proof of ownership does not outlive its witness

    def capabilities_table(self, rows: list[Mapping[str, Any]]) -> set[str]:
        """Take over the table; answers the GPUs that are no longer there."""
        known = {c.gpu.uuid: c for c in map(capabilities_of, rows)}
        gone = set(self.capabilities) - set(known)
        self.capabilities = dict(sorted(known.items(), key=lambda item: item[1].gpu.index))
        for capabilities in known.values():
            self.driver_version = capabilities.driver_version or self.driver_version
            self.simulated = self.simulated or capabilities.simulated
        for uuid in gone:
            self._health.pop(uuid, None)
        return gone

    def processes_table(self, content: Mapping[str, Any]) -> None:
        processes = {uuid: frozenset(p.pid for p in rows) for uuid, rows in processes_of(content).items()}
        uids = {pid: _uid_of(pid) for pids in processes.values() for pid in pids}
        self.processes = processes
        self.users = {uuid: frozenset(uid for pid in pids if (uid := uids[pid]) is not None) for uuid, pids in processes.items()}

    def host_energy_table(self, rows: list[list[Any]]) -> None:
        """CPU and DRAM energy as powerd-hw counts it from its own start: goes on when another one begins again."""
        for domain, package, value in rows:
            key, now_uj = (str(domain), int(package)), int(value)
            base, last = self._host_base_uj.get(key, (0, 0))
            base += last if now_uj < last else 0
            self._host_base_uj[key] = base, now_uj
            self.host_energy_uj[key] = base + now_uj

    @property
    def control(self) -> bool:
        """Whether hw's own configuration lets anything be set; taken for granted until it says no."""
        return bool(self.status.get("control", True))

    @property
    def hold(self) -> str:
        """Why hw refuses wants (panic, quiesced, safe_mode, shutdown); empty when it does not."""
        return str(self.status.get("hold") or "")

    def status_table(self, content: Mapping[str, Any]) -> None:
        self.status = dict(content)
        self._generation(content)
        if error := content.get("error"):
            self._hw_error = str(error)
        elif content.get("serving"):
            self._hw_error = ""
        self.hw_problem = self._hw_error

    def health_change(self, reading: Reading) -> Health | None:
        """The new health of a GPU if it differs from the last one; a GPU is taken for up at first."""
        before = self._health.get(reading.uuid, Health.UP)
        self._health[reading.uuid] = reading.health
        return reading.health if reading.health is not before else None

    def unreachable(self) -> frozenset[str]:
        """GPUs on which nothing can be set now."""
        return frozenset(uuid for uuid, health in self._health.items() if health in _UNREACHABLE)

    def health(self, uuid: str) -> Health:
        """The last known health of a GPU."""
        return self._health.get(uuid, Health.UP)

    def publish(self, snapshot: Snapshot) -> None:
        """Swap the snapshot and tell everybody; a listener that fails is a bug that stops nobody else."""
        self.snapshot = snapshot
        slow = self.slow_snapshot
        if slow is None or snapshot.time_ns // NS != slow.time_ns // NS:
            readings = tuple(quantise(r) for r in snapshot.readings)
            second_ns = snapshot.time_ns // NS * NS
            wall_ns = snapshot.wall_ns // NS * NS
            self.slow_snapshot = Snapshot(second_ns // NS & 0xFFFFFFFF, second_ns, wall_ns, readings)
        for listener in self.listeners:
            try:
                listener(snapshot)
            except Exception as error:
                log("listener_failed", listener=getattr(listener, "__qualname__", listener), why=repr(error))

    def age_s(self) -> float | None:
        """How old the newest snapshot is."""
        return None if self.snapshot is None else max(0.0, (self._clock.now_ns() - self.snapshot.time_ns) / NS)


def check_may_set(control: bool, node: Node, *, panic: bool, quiesced: bool, connected: bool) -> None:
    """RequestError or UnavailableError when nobody may set anything on this node now, with what to do about it."""
    if not (control and node.control):
        raise RequestError("powerd only monitors", code="monitor_only", hint="set control = true in [daemon] and reload powerd")
    if panic:
        raise UnavailableError("panic: every GPU is at baseline", hint="powerctl resume", code="busy")
    if quiesced:
        raise UnavailableError("quiesced for maintenance", hint="powerctl resume, or wait", code="busy")
    if node.hold:
        raise UnavailableError(f"powerd-hw keeps every GPU at baseline: {node.hold}", hint="powerctl resume", code="busy")
    if not connected:
        raise UnavailableError("powerd-hw is not connected", hint=node.hw_problem or "systemctl status powerd-hw")
