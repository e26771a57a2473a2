"""What a benchmark found, how it is shown, and how results.md is kept.

House rules: every figure stands beside the command that printed it, the date and the machine; what ran on the simulated driver
says so; a section of results.md is replaced as a whole, the others stay.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).with_name("results.md")


@dataclass(frozen=True, slots=True)
class Row:
    """One figure."""

    what: str
    value: float
    unit: str
    target: str = ""  # what the project promises, if it does


@dataclass(frozen=True, slots=True)
class Table:
    """Figures that are read side by side; cells are shown as they are."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> list[str]:
        """The lines of a table."""
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        return [f"| {' | '.join(cells)} |" for cells in lines]


@dataclass(slots=True)
class Report:
    """Everything one benchmark says."""

    name: str
    title: str
    simulated: bool
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)  # in place of, or after, the rows
    command: str = ""  # what printed it, when that is not `python -m benchmarks NAME`

    def add(self, what: str, value: float, unit: str, target: str = "") -> None:
        """Add a figure."""
        self.rows.append(Row(what, value, unit, target))

    def as_dict(self) -> dict[str, object]:
        """Plain data for --json."""
        return {
            "name": self.name, "title": self.title, "simulated": self.simulated, "notes": self.notes,
            **circumstances(self.name, self.command),
            "rows": [{"what": r.what, "value": r.value, "unit": r.unit, "target": r.target} for r in self.rows],
            "tables": [{"header": table.header, "rows": table.rows} for table in self.tables],
        }  # fmt: skip

    def markdown(self) -> str:
        """One section of results.md."""
        told = circumstances(self.name, self.command)
        where = " on the simulated driver" if self.simulated else ""
        lines = [f"## {self.name}: {self.title}{where}", "", f"`{told['command']}`, {told['date']}, {told['machine']}", ""]
        if self.rows:
            lines += ["| what | value | unit | promised |", "|---|---|---|---|"]
            lines += [f"| {r.what} | {r.value:.4g} | {r.unit} | {r.target} |" for r in self.rows]
        for number, table in enumerate(self.tables):
            lines += ([""] if number or self.rows else []) + table.markdown()
        lines += ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"


Progress = Callable[[float], None]  # share done, 0..1


def circumstances(name: str, command: str = "") -> dict[str, str]:
    """Command, date and machine of a measurement."""
    return {
        "command": command or f"python -m benchmarks {name}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{os.cpu_count()} cores ({platform.machine()}), Linux {platform.release().split('-')[0]}, "
        f"Python {platform.python_version()}",
    }


def bar(name: str) -> Progress:
    """A progress line on a terminal's stderr; silent elsewhere."""

    def show(share: float) -> None:
        if sys.stderr.isatty():
            filled = round(30 * min(1.0, share))
            end = "\n" if share >= 1 else ""
            print(f"\r{name:<10} [{'#' * filled}{'.' * (30 - filled)}] {share:4.0%}", end=end, file=sys.stderr, flush=True)

    return show


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of all values lies (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered)) - 1))]


def write(reports: Sequence[Report], path: Path = RESULTS) -> None:
    """Replace the sections of these benchmarks in results.md, or add them at its end."""
    head = (
        "# Benchmark results\n\nMade by `python -m benchmarks --write` (all of them: `make bench`). Figures move with the\n"
        "machine and with what else runs on it; the commands print them anew.\n"
    )
    text = path.read_text(encoding="utf-8") if path.exists() else head
    for report in reports:
        section = report.markdown()
        pattern = re.compile(rf"^## {re.escape(report.name)}: .*?(?=^## |\Z)", re.M | re.S)
        old = pattern.search(text)
        text = f"{text[: old.start()]}{section}\n{text[old.end() :]}" if old else f"{text.rstrip()}\n\n{section}"
    path.write_text(text.rstrip() + "\n", encoding="utf-8")


def run(name: str, command: str, measure: Callable[[Report, Progress], bool], argv: Sequence[str] | None = None) -> int:
    """A benchmark that is a command of its own, with --write and --json as theirs; 0 when ``measure`` found its promises kept."""
    parser = argparse.ArgumentParser(prog=command, description=(measure.__doc__ or "").strip())
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--write", action="store_true", help="rewrite its section in benchmarks/results.md")
    arguments = parser.parse_args(argv)
    report = Report(name, name, simulated=False, command=command)
    kept = measure(report, bar(name))
    print(json.dumps(report.as_dict()) if arguments.json else report.markdown(), flush=True)
    if arguments.write:
        write([report])
    return 0 if kept else 1
