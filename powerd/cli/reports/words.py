"""A report in words: the rows of its tables, the same for HTML and PDF.

House rules: pure; a figure carries its interval; what is not known is said in words.
"""

from __future__ import annotations

from powerd.cli.reports.counters import clock_text
from powerd.cli.reports.model import Amount, Report

UNKNOWN = "not measured"
Row = tuple[str, str]


def amount(value: Amount | None, unit: str, factor: float = 1.0) -> str:
    """A figure with its 95 % interval, or that it is not known and how much of it is."""
    if value is None or value.known is None:
        return UNKNOWN
    if value.value is None or value.low is None or value.high is None:
        return f"{UNKNOWN} as a whole; {value.known * factor:,.4g} {unit} of it are known".replace("  ", " ")
    return f"{value.value * factor:,.4g} {unit} ({value.low * factor:,.4g} to {value.high * factor:,.4g})".replace(" (", " (")


def energy(value: Amount | None) -> str:
    """Joules, kilojoules or kilowatt-hours, whichever reads best."""
    size = 0.0 if value is None or value.known is None else value.known
    unit, factor = ("kWh", 1 / 3.6e6) if size >= 3.6e5 else ("kJ", 1e-3) if size >= 1e4 else ("J", 1.0)
    return amount(value, unit, factor)


def number(value: float | None, unit: str = "", digits: int = 4) -> str:
    """A plain figure."""
    return UNKNOWN if value is None else f"{value:,.{digits}g} {unit}".strip()


def share(value: float | None) -> str:
    """A share in per cent."""
    return UNKNOWN if value is None else f"{100 * value:.1f} %"


def money(value: Amount | None, currency: str) -> str:
    """Cost with its currency, when one was named."""
    return amount(value, currency or "(currency not named)")


def _parts(names: tuple[str, ...]) -> str:
    shown = {"gpu": "GPUs", "cpu": "CPUs", "dram": "DRAM", "other": "the rest of the machine"}
    return ", ".join(shown.get(name, name) for name in names)


def summary(report: Report) -> list[Row]:
    """What somebody wants to know first."""
    factors = report.factors
    rows = [
        ("Time", f"{clock_text(report.begin_s)} to {clock_text(report.end_s)} UTC, {report.end_s - report.begin_s:,.0f} s"),
        ("Energy", energy(report.energy_j)),
        ("Energy is of", f"{_parts(report.contains)}; not in it: {_parts(report.lacks)}"),
        ("Method", report.method),
        ("CPUs and DRAM of these nodes", energy(report.host_energy_j)),
    ]
    if report.cost is not None:
        rows.append(
            (f"Cost at {factors.price_per_kwh:g} {factors.currency}/kWh".replace(" /", "/"), money(report.cost, factors.currency))
        )
    if report.carbon_g is not None:
        rows.append((f"Carbon at {factors.carbon_g_per_kwh:g} g/kWh", amount(report.carbon_g, "g CO2e")))
    if report.saving is not None:
        rows.append(("Saving", report.saving.text))
    return rows


def job(report: Report) -> list[Row]:
    """The job's own figures."""
    part = report.job
    if part is None:
        return []
    rows = [
        ("State", part.state), ("Steps kept", f"{part.steps:,}"), ("Steps lost to restores", f"{part.lost_steps:,}"),
        ("Steps not measured", f"{part.unmeasured_steps:,}"), ("Step time, median", number(part.step_time_s, "s")),
        ("Energy per kept step", number(part.energy_per_kept_step_j, "J")),
        ("Goodput (time in kept steps)", share(part.goodput_ratio)),
        ("Energy of lost steps", number(part.lost_energy_j, "J")), ("Plan", part.plan or "none"),
    ]  # fmt: skip
    if part.checkpoints:
        rows.append(
            ("Checkpoints", f"{part.checkpoints}, {part.checkpoint_time_s:.1f} s, {number(part.checkpoint_energy_j, 'J')}")
        )
    if part.exceptions:
        rows.append(("Exceptions", str(part.exceptions)))
    return rows


def saving(report: Report) -> list[Row]:
    """How the saving was found, and what it comes to."""
    found = report.saving
    if found is None:
        return []
    rows = [("Verdict", found.text), ("Against", found.baseline), ("Plan", found.optimised or "none"), ("Method", found.method),
            ("Blocks", f"{found.blocks}, of them {found.unmeasured_blocks} not measured; {found.pairs} neighbouring pairs"),
            ("Confidence of the intervals", f"{100 * found.confidence:g} %")]  # fmt: skip
    for name, value, text in (("Energy saved", found.saved_energy_j, energy(found.saved_energy_j)),
                              ("Cost saved", found.saved_cost, money(found.saved_cost, report.factors.currency)),
                              ("Carbon saved", found.saved_carbon_g, amount(found.saved_carbon_g, "g CO2e"))):  # fmt: skip
        if value is not None:
            rows.append((name, text))
    return rows


NODES_HEAD = ("Node", "GPU", "Energy", "Method", "Remarks")


def nodes(report: Report) -> list[tuple[str, ...]]:
    """A row for each GPU, and for each node without any."""
    rows: list[tuple[str, ...]] = []
    for node in report.nodes:
        if not node.gpus:
            rows.append((node.name, "-", energy(node.energy_j), node.method, node.error or ""))
        for gpu in node.gpus:
            name = gpu.uuid if gpu.index is None else f"{gpu.index} ({gpu.name})"
            rows.append((node.name, name, energy(gpu.energy_j), gpu.method, gpu.note))
    return rows
