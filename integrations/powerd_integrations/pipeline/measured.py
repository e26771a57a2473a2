"""What ranks measured: time and energy per (stage, kind, clock), collapsed over peers, kept in a file for the next start.

House rules: pure but for ``load`` and ``save``; time is the slowest rank's, energy is per GPU; a file that is not ours, not whole
or about another GPU, driver or model is as good as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

FORMAT = 1


class Row(NamedTuple):
    """One line of a profile: an instruction of this kind on this stage at this clock, of one GPU."""

    stage: int
    kind: str
    mhz: int
    time_s: float
    energy_j: float


@dataclass(frozen=True, slots=True)
class Sheet:
    """What one rank measured at one clock; ``blocking_w`` None: it was never blocked for long enough to tell."""

    mhz: int
    rows: tuple[Row, ...]
    blocking_w: float | None = None
    blocked_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As it travels between ranks."""
        return {
            "mhz": self.mhz,
            "rows": [list(row) for row in self.rows],
            "blocking_w": self.blocking_w,
            "blocked_s": self.blocked_s,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Sheet:
        """From what another rank or a file says; ValueError, KeyError or TypeError when it is not a sheet."""
        rows = tuple(Row(int(s), str(k), int(f), float(t), float(e)) for s, k, f, t, e in value["rows"])
        if any(not math.isfinite(row.time_s) or not math.isfinite(row.energy_j) or row.time_s <= 0 for row in rows):
            raise ValueError("a row without time or energy")
        watts = value["blocking_w"]
        return cls(int(value["mhz"]), rows, None if watts is None else float(watts), float(value["blocked_s"]))


def collapse(sheets: Iterable[Sheet]) -> Sheet:
    """The sheets of all ranks at one clock as one: time = the slowest of a stage's peers, energy = their mean per GPU."""
    sheets = list(sheets)
    peers: dict[tuple[int, str], list[Row]] = {}
    for sheet in sheets:
        for row in sheet.rows:
            peers.setdefault((row.stage, row.kind), []).append(row)
    rows = tuple(
        Row(stage, kind, group[0].mhz, max(r.time_s for r in group), sum(r.energy_j for r in group) / len(group))
        for (stage, kind), group in sorted(peers.items())
    )
    known = [(s.blocking_w, s.blocked_s) for s in sheets if s.blocking_w is not None and s.blocked_s > 0]
    seconds = sum(weight for _, weight in known)
    watts = sum(value * weight for value, weight in known) / seconds if seconds else None
    return Sheet(sheets[0].mhz, rows, watts, seconds)


@dataclass
class Profile:
    """The job's profile as far as it is measured: one collapsed sheet per clock."""

    sheets: dict[int, Sheet] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows, highest clock first."""
        return tuple(row for mhz in sorted(self.sheets, reverse=True) for row in self.sheets[mhz].rows)

    @property
    def blocking_power_w(self) -> float | None:
        """Power of a GPU that waits for another: the median over clocks, None when it was never seen."""
        known = [sheet.blocking_w for sheet in self.sheets.values() if sheet.blocking_w is not None]
        return median(known) if known else None

    def csv(self) -> str:
        """In the field's own format: stage,instruction,frequency,time,energy (MHz, s, J)."""
        lines = [f"{r.stage},{r.kind},{r.mhz},{r.time_s:.9g},{r.energy_j:.9g}" for r in self.rows]
        return "\n".join(["stage,instruction,frequency,time,energy", *lines]) + "\n"


def fingerprint(gpus: Sequence[str], drivers: Sequence[str], shapes: Sequence[str], stages: int) -> str:
    """What a profile holds for: GPU models, drivers, the model's shape on every stage; not how many pipelines there are."""
    content = json.dumps([sorted(set(gpus)), sorted(set(drivers)), sorted(set(shapes)), stages])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def load(folder: Path | None, key: str) -> Profile | None:
    """The kept profile of this fingerprint, or None."""
    if folder is None:
        return None
    try:
        content = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        if content["format"] != FORMAT or content["fingerprint"] != key:
            return None
        return profile_from_json(content["sheets"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def profile_from_json(sheets: Iterable[Mapping[str, Any]]) -> Profile:
    """The profile that these sheets make; ValueError, KeyError or TypeError when they do not."""
    found = [Sheet.from_json(sheet) for sheet in sheets]
    return Profile({sheet.mhz: sheet for sheet in found})


def save(folder: Path | None, key: str, profile: Profile) -> None:
    """Keep it: a reader sees the old file or the new one, whole. OSError when the folder cannot be written."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "fingerprint": key, "sheets": [sheet.to_json() for sheet in profile.sheets.values()]}
    handle, name = tempfile.mkstemp(dir=folder, prefix=f".{key}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, folder / f"{key}.json")
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
