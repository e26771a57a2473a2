"""What reading the host costs, and how often the savings ledger errs.

House rules: as benchmarks.cases; the powercap tree is made up and lies in a temporary folder, which is said.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from pathlib import Path

from benchmarks.report import Progress, Report, percentile
from powerd.clock import NS
from powerd.hostcontext import HostContext
from powerd.hw.rapl import HostEnergy
from powerd_policies import ledger


def host(report: Report, progress: Progress) -> None:
    """CPU, memory and RAPL once a second."""
    report.title = "reading the host: once a second"
    context, took = HostContext(), list[float]()
    for number in range(2000):
        begin = time.perf_counter()
        context.read(number)
        took.append((time.perf_counter() - begin) * 1e3)
    report.add("CPU, load and memory, p50", percentile(took, 0.5), "ms", "< 5")
    report.add("CPU, load and memory, p99", percentile(took, 0.99), "ms")
    progress(0.5)
    with tempfile.TemporaryDirectory(prefix="pb-") as folder:
        for package in range(2):
            for zone, name in ((f"intel-rapl:{package}", f"package-{package}"), (f"intel-rapl:{package}:0", "dram")):
                place = Path(folder) / zone
                place.mkdir()
                for file, text in (("name", name), ("max_energy_range_uj", "262143328850"), ("energy_uj", "1000")):
                    (place / file).write_text(text)
        energy, took = HostEnergy(Path(folder)), []
        for number in range(1, 2000):
            begin = time.perf_counter()
            energy.rows(number * NS)
            took.append((time.perf_counter() - begin) * 1e3)
    report.add("energy of two packages and their DRAM, p50", percentile(took, 0.5), "ms", "< 1")
    report.notes.append("The powercap tree is made up of plain files: what the kernel adds for reading a real one is not in it.")


def savings(report: Report, progress: Progress) -> None:
    """How often the ledger is right."""
    report.title, report.simulated = "the savings ledger on drawn blocks: 20 pairs, 1,000 comparisons each", False
    for number, (saving, wanted) in enumerate(((0.0, ">= 95"), (0.03, ">= 90"))):
        for place, order in enumerate(("random", "abba")):
            verdicts = [ledger.assess(_blocks(seed, saving, order)) for seed in range(1000)]  # type: ignore[arg-type]
            covered = sum(v.saving is not None and v.saving.low <= saving <= v.saving.high for v in verdicts)
            right = sum(v.proven if saving else v.outcome == "not proven" for v in verdicts)
            what = f"true saving of {100 * saving:g} % is found" if saving else "a comparison with itself is not proven"
            report.add(f"{order}: {what}", right / 10, "%", wanted)
            report.add(f"{order}: the interval holds the truth ({100 * saving:g} %)", covered / 10, "%")
            progress((2 * number + place + 1) / 4)
    report.notes.append("The noise is that of docs/report.md; it is assumed, not measured on hardware.")


def _blocks(seed: int, saving: float, order: ledger.Order, pairs: int = 20) -> list[ledger.Block]:
    dice = random.Random(seed)  # noqa: S311
    gain, drift, tau = dice.gauss(0, 0.01), dice.uniform(-0.05, 0.05), dice.uniform(0.1, 1.0)
    together, out = dice.gauss(0, 0.01), list[ledger.Block]()
    for i, arm in enumerate(ledger.schedule(pairs, seed, order)):
        together = 0.7 * together + dice.gauss(0, 0.01 * math.sqrt(1 - 0.49))
        heat = drift * (1 - math.exp(-i / (2 * pairs) / tau)) + 0.01 * math.sin(3 * math.pi * i / (2 * pairs) + seed)
        effect = 0.0 if arm == ledger.BASELINE else math.log1p(-saving)
        energy = 4000 * math.exp(gain + heat + together + dice.gauss(0, 0.015) + effect)
        out.append(ledger.Block(arm, 60.0 * i, 55 * math.exp(dice.gauss(0, 0.007)), 17.0, energy))
    return out
