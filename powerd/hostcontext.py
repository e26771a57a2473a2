"""The host around the GPUs: CPU and memory load once a second, and whose processes the GPUs serve.

House rules: one reading a second costs less than a tick; what cannot be read is None; a process that has gone is no error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from powerd.clock import NS
from powerd.model import Snapshot
from powerd.records import GpuProcess, HostLoad


class HostContext:
    """The newest load of this host; fed by snapshots, so that it keeps the daemon's own time."""

    def __init__(self, energy_uj: Callable[[], Mapping[tuple[str, int], int]] = dict) -> None:
        import psutil

        self._energy_uj = energy_uj  # by powerd-hw: only root may read it

        self._psutil = psutil
        self._second = -1
        self.listeners: list[Callable[[HostLoad], None]] = []
        self.load: HostLoad | None = None
        psutil.cpu_percent(None)  # the first answer has nothing to compare with

    def observe(self, snapshot: Snapshot) -> None:
        """Read the host when a new second has begun; the first time only begins the comparison."""
        second = snapshot.wall_ns // NS
        if second == self._second:
            return
        first, self._second = self._second < 0, second
        if first:
            return
        self.load = self.read(snapshot.wall_ns)
        for listener in self.listeners:
            listener(self.load)

    def read(self, wall_ns: int) -> HostLoad:
        """CPU time since the last reading, memory and load now; what the system does not tell is None."""
        cpu: float | None = None
        used = size = None
        try:
            cpu = min(1.0, self._psutil.cpu_percent(None) / 100)
            memory = self._psutil.virtual_memory()
            used, size = memory.total - memory.available, memory.total
        except (OSError, self._psutil.Error):
            pass
        try:
            load = os.getloadavg()[0]
        except OSError:
            load = None
        sums: dict[str, float] = {}
        for (domain, _), value in self._energy_uj().items():
            sums[domain] = sums.get(domain, 0.0) + value / 1e6
        return HostLoad(wall_ns, cpu, load, used, size, (), sums.get("package"), sums.get("dram"))

    def processes(self, of: Mapping[str, frozenset[int]]) -> tuple[GpuProcess, ...]:
        """Who runs on which GPU, by NVML's own list of processes."""
        known: dict[int, tuple[str | None, str | None]] = {}
        for pid in set().union(*of.values()) if of else ():
            try:
                process = self._psutil.Process(pid)
                with process.oneshot():
                    known[pid] = (process.username(), process.name())
            except (self._psutil.Error, OSError, KeyError):
                known[pid] = (None, None)
        return tuple(GpuProcess(uuid, pid, *known[pid]) for uuid in sorted(of) for pid in sorted(of[uuid]))
