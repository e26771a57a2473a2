"""CPU and DRAM energy, read from a made-up powercap tree: this is not hardware."""

from __future__ import annotations

from pathlib import Path

import pytest

from powerd.clock import NS, RealClock
from powerd.hw.rapl import POWERCAP, HostEnergy, powercap
from powerd.node import Node
from powerd.sinks.metrics import Metrics

RANGE_UJ = 262_143_328_850


class FakePowercap:
    """A powercap tree of two sockets with DRAM, cores, the whole platform and a memory-mapped twin."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for zone, name in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core"), ("intel-rapl:0:1", "dram"),
                           ("intel-rapl:1", "package-1"), ("intel-rapl:1:0", "dram"), ("intel-rapl:2", "psys"),
                           ("intel-rapl-mmio:0", "package-0")):  # fmt: skip
            folder = root / zone
            folder.mkdir(parents=True)
            (folder / "name").write_text(name + "\n")
            (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
            self.set(zone, 1_000_000)
        (root / "intel-rapl").mkdir()

    def set(self, zone: str, energy_uj: int) -> None:
        (self.root / zone / "energy_uj").write_text(f"{energy_uj}\n")


@pytest.fixture
def tree(tmp_path: Path) -> FakePowercap:
    return FakePowercap(tmp_path / "powercap")


def read(energy: HostEnergy, second: int) -> dict[tuple[str | int, ...], str | int]:
    rows = energy.rows(second * NS)
    assert rows is not None
    return {(domain, package): value for domain, package, value in rows}


def test_packages_and_dram_are_counted_once_from_the_first_reading(tree: FakePowercap) -> None:
    energy = HostEnergy(tree.root)
    assert read(energy, 1) == {("package", 0): 0, ("dram", 0): 0, ("package", 1): 0, ("dram", 1): 0}
    tree.set("intel-rapl:0", 6_000_000)
    tree.set("intel-rapl:1:0", 1_500_000)
    for other in ("intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"):
        tree.set(other, 99_000_000)
    assert energy.rows(1 * NS + NS // 2) is None
    assert read(energy, 2) == {("package", 0): 5_000_000, ("dram", 0): 0, ("package", 1): 0, ("dram", 1): 500_000}


def test_a_counter_that_wraps_goes_on(tree: FakePowercap) -> None:
    tree.set("intel-rapl:0", RANGE_UJ - 1000)
    energy = HostEnergy(tree.root)
    read(energy, 1)
    tree.set("intel-rapl:0", 4000)
    assert read(energy, 2)["package", 0] == 5000
    tree.set("intel-rapl:0", 5000)
    assert read(energy, 3)["package", 0] == 6000


def test_what_cannot_be_read_is_absent_and_never_zero(tree: FakePowercap, tmp_path: Path) -> None:
    (tree.root / "intel-rapl:1:0" / "energy_uj").unlink()
    energy = HostEnergy(tree.root)
    assert ("dram", 1) not in read(energy, 1)
    (tree.root / "intel-rapl:0" / "energy_uj").write_text("")
    assert ("package", 0) not in read(energy, 2)
    tree.set("intel-rapl:0", 3_000_000)
    assert read(energy, 3)["package", 0] == 2_000_000  # what was used meanwhile is not lost
    assert HostEnergy(tmp_path / "nowhere").rows(NS) is None
    assert HostEnergy(None).rows(NS) is None


def test_a_simulated_node_does_not_read_this_machines_cpus() -> None:
    assert powercap("", simulated=True) is None
    assert powercap("", simulated=False) == POWERCAP
    assert powercap("/fake", simulated=True) == Path("/fake")


def test_the_sums_survive_another_powerd_hw_and_reach_the_page() -> None:
    node, metrics = Node(RealClock(), 10), Metrics()
    for value in (0, 5_000_000, 1_000_000, 2_000_000):  # it began again after 5 J
        node.host_energy_table([["package", 0, value]])
    assert node.host_energy_uj == {("package", 0): 7_000_000}
    metrics.host_energy(node.host_energy_uj)
    page = metrics.render()[0].decode()
    assert 'powerd_cpu_energy_joules_total{package="0"} 7.0' in page
    assert "powerd_dram" not in page
