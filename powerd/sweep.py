"""A sweep over SM clocks: the same work at every clock, its time and energy, written down as it goes.

House rules: one lease for the whole sweep, its wants change; energy is the daemon's, with its bounds; a row is on disk before the
next clock is set, so that a sweep that broke off goes on where it was.

Two ways to measure, because a command may be short or long:

- *once per clock* (default): the command runs from start to end at every clock; time is that of the energy window around it.
- *steady*: the command starts once and appends one line per iteration to the file named in ``POWERD_SWEEP_PROGRESS``; at every
  clock, whole iterations are timed after one that is thrown away. The command is ended when the sweep is done.
"""

from __future__ import annotations

import json
import os
import re
import select
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from powerd.api import EnergyFigure
from powerd.client import Client, EnergyWindow, Lease
from powerd.client.codec import decode, encode
from powerd.errors import RequestError, UnavailableError
from powerd.model import Outcome, Verdict

PROGRESS_ENV = "POWERD_SWEEP_PROGRESS"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Row:
    """One clock: seconds and joules of one execution (iteration), all GPUs together; ``None`` when energy is not known."""

    clock_mhz: int
    time_s: float
    energy_j: float | None
    low_j: float | None
    high_j: float | None
    executions: int
    verdict: str
    exit_code: int = 0
    figures: tuple[EnergyFigure, ...] = ()


@dataclass(frozen=True, slots=True)
class Sweep:
    """Everything that a results file holds; ``key`` tells whether two sweeps measure the same thing."""

    command: tuple[str, ...]
    gpus: tuple[str, ...]
    stage: int
    instruction: str
    steady: bool
    simulated: bool
    gpu_name: str
    driver_version: str | None
    rows: tuple[Row, ...] = ()
    format: int = FORMAT

    @property
    def key(self) -> tuple[object, ...]:
        """What must be equal for rows to belong together."""
        return (self.command, self.gpus, self.stage, self.instruction, self.steady, self.driver_version)

    def with_row(self, row: Row) -> Sweep:
        """The sweep with one more clock, the highest first; an older row of the same clock is replaced."""
        rows = [r for r in self.rows if r.clock_mhz != row.clock_mhz] + [row]
        return replace(self, rows=tuple(sorted(rows, key=lambda r: -r.clock_mhz)))


def parse_clocks(text: str | None, supported: Sequence[int]) -> tuple[int, ...]:
    """``1410:855:15``, ``1410,1200,900`` or ``every 4`` -> supported clocks in MHz, highest first, each once.

    Without text: every 4th supported clock from the highest to half of it. A clock that is not supported becomes the next lower
    one, as the daemon would choose. RequestError for anything else.
    """
    table = sorted(set(supported), reverse=True)
    if not table:
        raise RequestError("this GPU states no SM clocks", hint="a sweep needs lockable SM clocks", code="not_supported")
    words = (text or "").strip().lower().replace("mhz", "")
    if not words:
        return tuple(c for c in table[::4] if c >= table[0] / 2) or (table[0],)
    if match := re.fullmatch(r"every\s+(\d+)(?:\s+from\s+(\d+)\s+to\s+(\d+))?", words):
        step, high, low = int(match[1]), int(match[2] or table[0]), int(match[3] or table[-1])
        if step < 1:
            raise RequestError(f"{text!r}: every how many?", hint="write it like 'every 4'", code="bad_value")
        return tuple([c for c in table if low <= c <= high][::step])
    if match := re.fullmatch(r"(\d+):(\d+):(\d+)", words):
        first, last, step = (int(group) for group in match.groups())
        if step < 1:
            raise RequestError(f"{text!r}: the step is above zero", hint="write it like 1410:855:15", code="bad_value")
        high, low = max(first, last), min(first, last)
        wanted: Iterable[int] = range(high, low - 1, -step)
    elif re.fullmatch(r"\d+(\s*,\s*\d+)*", words):
        wanted = [int(part) for part in words.split(",")]
    else:
        raise RequestError(f"{text!r} names no clocks", hint="write 1410:855:15, 1410,1200,900 or 'every 4'", code="bad_value")
    found: list[int] = []
    for clock in wanted:
        if not table[-1] <= clock <= table[0]:
            raise RequestError(f"{clock} MHz is outside {table[-1]}-{table[0]} MHz of this GPU", hint="see `powerctl explain`",
                               code="bad_value")  # fmt: skip
        snapped = next(c for c in table if c <= clock)
        if snapped not in found:
            found.append(snapped)
    return tuple(sorted(found, reverse=True))


def verdict_of(outcomes: Iterable[Outcome]) -> str:
    """The least good verdict of several GPUs."""
    order = (Verdict.FAILED, Verdict.OVERRIDDEN, Verdict.PENDING, Verdict.PENDING_LOAD, Verdict.APPLIED)
    present = {o.verdict for o in outcomes}
    return str(next((v for v in order if v in present), Verdict.PENDING))


def once(client: Client, lease: Lease, clock_mhz: int, run: Callable[[], int], repeats: int = 1) -> Row:
    """Run the command at one clock, ``repeats`` times in one energy window."""
    lease.change(sm_clock_mhz=clock_mhz)
    code = 0
    with client.energy(f"sweep {clock_mhz} MHz", list(lease.view.gpus)) as window:
        for _ in range(repeats):
            if code := run():
                break
    return row_of(clock_mhz, window, window.duration_s, repeats, lease, code)


def row_of(clock_mhz: int, window: EnergyWindow, busy_s: float | None, executions: int, lease: Lease, exit_code: int = 0) -> Row:
    """A window's energy, per execution; ``busy_s`` is what the executions took in the node's time."""
    duration_s = window.duration_s
    if not busy_s or not duration_s:
        raise UnavailableError("the energy window has no duration", hint="see `powerctl doctor`")

    def each(joules: float | None) -> float | None:
        # Power times time: a window that is a little longer than the executions it holds does not make them dearer.
        return None if joules is None else joules / duration_s * busy_s / executions

    figures = window.figures
    return Row(
        clock_mhz, busy_s / executions, each(window.energy_j), each(window.low_j), each(window.high_j), executions,
        verdict_of(lease.outcomes), exit_code,
        tuple(replace(f, energy_j=each(f.energy_j), low_j=each(f.low_j), high_j=each(f.high_j)) for f in figures),
    )  # fmt: skip


class Progress:
    """The reading end of ``POWERD_SWEEP_PROGRESS``: a FIFO in which a line is an iteration, so that nobody polls a file."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path, 0o600)
        self.path = path
        # Both ends, so that neither the command's opening nor its closing of the file blocks or ends anything.
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def wait(self, alive: Callable[[], bool]) -> int:
        """Wait for at least one line; how many came. 0 when the command has ended."""
        while True:
            if select.select([self._fd], [], [], 0.2)[0]:
                if lines := os.read(self._fd, 65536).count(b"\n"):
                    return lines
            elif not alive():
                return 0

    def close(self) -> None:
        """Remove the FIFO."""
        os.close(self._fd)
        self.path.unlink(missing_ok=True)


def steady(
    client: Client, lease: Lease, clock_mhz: int, progress: Progress, alive: Callable[[], bool],
    *, seconds: float, iterations: int | None, scale: float,
) -> Row | None:  # fmt: skip
    """Time whole iterations of a running command at one clock for ``seconds`` of the node's time; ``None`` when it ended."""
    lease.change(sm_clock_mhz=clock_mhz)
    if not progress.wait(alive) or not progress.wait(alive):  # the one that saw two clocks, and one to settle
        return None
    window = client.energy(f"sweep {clock_mhz} MHz", list(lease.view.gpus)).begin()
    began_s, count = time.monotonic(), 0
    while True:
        if not (lines := progress.wait(alive)):
            window.end()
            return None
        count += lines
        busy_s = (time.monotonic() - began_s) * scale
        if count >= iterations if iterations is not None else busy_s >= seconds:
            break
    window.end()
    return row_of(clock_mhz, window, window.duration_s, count, lease)


# -- files ---------------------------------------------------------------------------------------------------------------


def to_csv(sweep: Sweep) -> str:
    """The profile format of the field: ``stage,instruction,frequency,time,energy`` in MHz, seconds, joules."""
    lines = ["stage,instruction,frequency,time,energy"]
    lines += [
        f"{sweep.stage},{sweep.instruction},{r.clock_mhz},{r.time_s:.9g},{r.energy_j:.9g}"
        for r in sweep.rows
        if r.energy_j is not None
    ]
    return "\n".join(lines) + "\n"


def save(sweep: Sweep, path: Path) -> None:
    """Write ``path`` (CSV) and its ``.json`` with the uncertainty, each replaced as a whole; RequestError if they cannot be."""
    try:
        for target, text in ((path, to_csv(sweep)), (path.with_suffix(".json"), json.dumps(encode(sweep), indent=1) + "\n")):
            part = target.with_name(target.name + ".part")
            part.write_text(text, encoding="utf-8")
            part.replace(target)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}", hint="choose another file with -o") from error


def load(path: Path) -> Sweep | None:
    """The sweep that ``save`` wrote, or ``None`` when there is none; RequestError when the file is something else."""
    file = path.with_suffix(".json")
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        return decode(Sweep, content, str(file))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RequestError(f"{file} is not a sweep's results: {error}", hint="choose another file with -o, or --fresh") from error
