"""CPU and DRAM energy from the kernel's powercap tree (RAPL), which only root may read.

House rules: a zone that cannot be read is absent, never 0; a counter that wraps goes on; a zone is counted once (psys and the
memory-mapped twins overlap with packages and are left out); what is summed up is what was seen since this process began.
"""

from __future__ import annotations

import re
from pathlib import Path

from powerd.clock import NS

POWERCAP = Path("/sys/class/powercap")
_ZONE = re.compile(r"intel-rapl:(\d+)(:\d+)?")
_PACKAGE = re.compile(r"package-(\d+)(-die-\d+)?")


def powercap(configured: str, simulated: bool) -> Path | None:
    """Where to read; a simulated node's GPUs have nothing to do with this machine's CPUs, so that there it has to be named."""
    return Path(configured) if configured else None if simulated else POWERCAP


class Zone:
    """One counter: the energy of a package or of its DRAM in microjoules since it was first read."""

    def __init__(self, folder: Path, domain: str, package: int) -> None:
        self.domain, self.package = domain, package
        self._file = folder / "energy_uj"
        self._range_uj = int((folder / "max_energy_range_uj").read_text())
        self._last_uj: int | None = None
        self._sum_uj = 0

    def read_uj(self) -> int | None:
        """What was used since the first reading; None while it cannot be read."""
        try:
            now_uj = int(self._file.read_text())
        except (OSError, ValueError):
            return None
        if self._last_uj is not None:
            step_uj = now_uj - self._last_uj
            self._sum_uj += step_uj if step_uj >= 0 else step_uj + self._range_uj
        self._last_uj = now_uj
        return self._sum_uj


def zones(root: Path) -> list[Zone]:
    """The packages and their DRAM of a powercap tree that can be read."""
    found: list[Zone] = []
    packages: dict[str, int] = {}
    try:
        folders = sorted(root.iterdir())
    except OSError:
        return found
    for folder in folders:
        match = _ZONE.fullmatch(folder.name)
        if match is None:
            continue
        try:
            name = (folder / "name").read_text().strip()
            if match[2] is None and (package := _PACKAGE.fullmatch(name)) is not None:
                packages[match[1]] = int(package[1])
                zone = Zone(folder, "package", int(package[1]))
            elif match[2] is not None and name == "dram" and match[1] in packages:
                zone = Zone(folder, "dram", packages[match[1]])
            else:
                continue
        except (OSError, ValueError):
            continue
        if zone.read_uj() is not None:
            found.append(zone)
    return found


class HostEnergy:
    """Reads all zones once a second."""

    def __init__(self, root: Path | None) -> None:
        self._zones = [] if root is None else zones(root)
        self._read_ns = 0

    def rows(self, now_ns: int) -> list[list[str | int]] | None:
        """``[domain, package, microjoules]`` of every zone, those of one package added up; None before a second has passed."""
        if not self._zones or now_ns - self._read_ns < NS:
            return None
        self._read_ns = now_ns
        sums: dict[tuple[str, int], int | None] = {}
        for zone in self._zones:
            key, value = (zone.domain, zone.package), zone.read_uj()
            before = sums.get(key, 0)
            sums[key] = None if value is None or before is None else before + value
        return [[domain, package, value] for (domain, package), value in sums.items() if value is not None]
