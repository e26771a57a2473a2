"""The measured profile of a job: time and energy of every instruction at every clock, from CSV to what a planner may choose from.

House rules: a bad row is an error that names its line, never skipped; noise is accepted, what it makes useless is filtered and
can be told (``notes``); the columns are the field's: ``stage,instruction,frequency,time,energy`` in MHz, seconds, joules. An
empty frequency is an operation whose time no clock changes.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from powerd.errors import RequestError
from powerd_policies.perseus.problem import Kind, Option, Profile

COLUMNS = ("stage", "instruction", "frequency", "time", "energy")
#: A lower clock may seem this much faster, or draw this much more power, than a higher one: power caps and noise do that.
NOISE = 0.15
Key = tuple[int, str]


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: seconds and joules of one execution at one clock; ``mhz`` None: a constant-time operation."""

    stage: int
    instruction: str
    mhz: int | None
    time_s: float
    energy_j: float
    line: int | None = field(default=None, compare=False)  # of the file it was read from

    def __str__(self) -> str:
        clock = "" if self.mhz is None else f" at {self.mhz} MHz"
        place = "" if self.line is None else f"line {self.line}: "
        return f"{place}{self.instruction} of stage {self.stage}{clock}"


class Options(dict[Key, tuple[Option, ...]]):
    """A Profile that remembers every measured option beside those on the Pareto front."""

    def __init__(self, kept: Profile, measured: Profile) -> None:
        super().__init__(kept)
        self.measured = measured


def read(source: Path | str, noise: float = NOISE) -> tuple[Row, ...]:
    """The rows of a profile CSV, given as a path or (with a line break in it) as text; checked as ``check`` does.

    RequestError naming file and line for a file that cannot be read, wrong columns, or a value that is no number above zero.
    """
    name, text = "profile", str(source)
    if isinstance(source, Path) or "\n" not in source:
        name = str(source)
        try:
            text = Path(source).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(
                f"cannot read the profile {name}: {getattr(error, 'strerror', None) or error}", code="bad_value"
            ) from error
    lines = csv.reader(io.StringIO(text, newline=""))
    header = tuple(word.strip() for word in next(lines, []))
    if set(header) != set(COLUMNS) or len(header) != len(COLUMNS):
        raise _bad(f"{name}: the first line is {','.join(header) or 'empty'}", f"it must be {','.join(COLUMNS)}")
    try:
        rows = tuple(
            row_of(dict(zip(header, values, strict=False)), lines.line_num, name, len(values))
            for values in lines
            if any(value.strip() for value in values)
        )
        check(rows, noise)
    except csv.Error as error:
        raise _bad(f"{name}: line {lines.line_num}: {error}") from error
    except RequestError as error:
        raise error if error.message.startswith(name) else _bad(f"{name}: {error.message}", error.hint) from None
    return rows


def row_of(values: Mapping[str, object], line: int | None = None, name: str = "profile", cells: int = len(COLUMNS)) -> Row:
    """One row from its cells, by column; RequestError naming the line and the column."""
    place = f"{name}: " + (f"line {line}" if line is not None else "a row")
    if cells != len(COLUMNS) or set(values) != set(COLUMNS):
        raise _bad(
            f"{place} has {cells} cells: {', '.join(f'{k}={v}' for k, v in values.items())}", f"columns are {','.join(COLUMNS)}"
        )
    instruction = str(values["instruction"]).strip()
    if not instruction:
        raise _bad(f"{place}: the instruction is empty", "write forward, backward, ...")
    stage = _number(values["stage"], place, "stage", whole=True, least=0)
    text = str(values["frequency"] if values["frequency"] is not None else "").strip()
    mhz = None if not text else int(_number(text, place, "frequency", whole=True))
    time_s = _number(values["time"], place, "time")
    energy_j = _number(values["energy"], place, "energy")
    return Row(int(stage), instruction, mhz, time_s, energy_j, line)


def _number(value: object, place: str, column: str, *, whole: bool = False, least: float | None = None) -> float:
    text = str(value).strip()
    try:
        number = float(text)
    except ValueError:
        raise _bad(f"{place}: {column} is {text!r}, which is no number") from None
    if not math.isfinite(number):
        raise _bad(f"{place}: {column} is {text}", "measure it again or leave the row out")
    if (number < least) if least is not None else (number <= 0):
        raise _bad(f"{place}: {column} is {text}", "it must be above zero" if least is None else f"it must be {least:g} or more")
    if whole and number != int(number):
        raise _bad(f"{place}: {column} is {text}", "it must be a whole number")
    return number


def _bad(message: str, hint: str = "") -> RequestError:
    return RequestError(message, hint=hint, code="bad_value")


def by_key(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """(stage, instruction) -> its rows, the highest clock first."""
    found: dict[Key, list[Row]] = {}
    for row in rows:
        found.setdefault((row.stage, row.instruction), []).append(row)
    for group in found.values():
        group.sort(key=lambda row: -(row.mhz or 0))
    return dict(sorted(found.items()))


def check(rows: Sequence[Row], noise: float = NOISE, *, holes: bool = True) -> None:
    """Refuse what nobody can have measured, and holes: RequestError naming the row.

    Refused: no rows; a clock twice; a constant-time operation with clocks; a row much faster, or with much less power, than its
    neighbours allow; a stage without an instruction that others have; a clock that is missing between others; one clock only.
    ``noise`` is the share by which a row may contradict its neighbour; without ``holes`` missing stages and clocks are accepted.
    """
    if not rows:
        raise _bad("the profile has no rows")
    for row in rows:
        if not all(math.isfinite(v) and v > 0 for v in (row.time_s, row.energy_j)) or row.stage < 0:
            raise _bad(f"{row}: time {row.time_s:g} s and energy {row.energy_j:g} J", "both must be finite and above zero")
    groups = by_key(rows)
    for group in groups.values():
        for higher, lower in itertools.pairwise(group):
            if higher.mhz == lower.mhz:
                raise _bad(
                    f"{max(higher, lower, key=lambda r: r.line or 0)} is there twice", "keep one row per clock, or their median"
                )
            if lower.mhz is None:
                raise _bad(f"{lower}: a row without a clock beside rows with clocks", "a constant-time operation has one row")
            _plausible(higher, lower, noise)
    if holes:
        _no_holes(groups)
    if not any(len(group) > 1 for group in groups.values()) and any(row.mhz is not None for row in rows):
        only = next(row for row in rows if row.mhz is not None)
        raise _bad(f"{only}: the profile has one clock only", "a plan chooses between clocks: profile at least two")


def _plausible(higher: Row, lower: Row, noise: float) -> None:
    if lower.time_s < higher.time_s * (1 - noise):
        raise _bad(f"{lower} takes {lower.time_s:g} s, less than {higher.time_s:g} s at {higher.mhz} MHz",
                   "a lower clock is not faster: measure it again or leave the row out")  # fmt: skip
    high_w, low_w = higher.energy_j / higher.time_s, lower.energy_j / lower.time_s
    if low_w * (1 - noise) > high_w:
        raise _bad(f"{higher} draws {high_w:.0f} W, less than {low_w:.0f} W at {lower.mhz} MHz",
                   "a higher clock does not draw less power: measure both again or leave the wrong row out")  # fmt: skip


def _no_holes(groups: Mapping[Key, Sequence[Row]]) -> None:
    stages = sorted({stage for stage, _ in groups})
    variable = {kind for (_, kind), group in groups.items() if group[0].mhz is not None and kind in set(Kind)}
    for stage in stages:
        for kind in sorted(variable):
            if (stage, kind) not in groups:
                others = [s for s in stages if (s, kind) in groups]
                raise _bad(f"stage {stage} has no rows for {kind}, which stage {others[0]} has", "profile every stage alike")
    for missing in range(stages[0], stages[-1]):
        if missing not in stages:
            raise _bad(f"stage {missing} has no rows, but stages {stages[0]} to {stages[-1]} have")
    clocks = {key: {row.mhz for row in group if row.mhz is not None} for key, group in groups.items() if group[0].mhz is not None}
    tables = {frozenset(own) for own in clocks.values()}
    for (stage, kind), own in clocks.items():
        # The same GPU: its clocks are there for all its instructions, up to the highest.
        wanted = {clock for (s, _), other in clocks.items() if s == stage for clock in other if clock >= min(own)}
        for other in tables:
            within = {clock for clock in other if min(own) <= clock <= max(own)}
            if 2 * len(within & own) >= len(within):  # else it is another kind of GPU, or was swept in other steps
                wanted |= within
        if gone := wanted - own:
            raise _bad(
                f"{kind} of stage {stage} has no row at {max(gone)} MHz, which others have",
                "profile it, or leave that clock out everywhere",
            )


def options(rows: Iterable[Row], blocking_power_w: float) -> Options:
    """What a planner may choose from: the options on the Pareto front of time and *effective* energy, fastest first.

    Effective energy is ``energy - blocking_power_w * time``: a computation that takes longer replaces waiting.
    """
    groups = by_key(rows)
    made: dict[Key, tuple[Option, ...]] = {}
    measured = {key: tuple(Option(row.mhz, row.time_s, row.energy_j) for row in group) for key, group in groups.items()}
    for key, every in measured.items():
        front: list[Option] = []
        least = math.inf
        for option in sorted(every, key=lambda o: (o.time_s, o.energy_j - blocking_power_w * o.time_s, o.mhz or 0)):
            if (effective := option.energy_j - blocking_power_w * option.time_s) < least:
                front.append(option)
                least = effective
        made[key] = tuple(front)
    return Options(made, measured)


def notes(rows: Sequence[Row], blocking_power_w: float) -> tuple[str, ...]:
    """What a person should know about a profile that can be planned with: what was filtered, and what looks odd."""
    groups, kept = by_key(rows), options(rows, blocking_power_w)
    said: list[str] = []
    top = max((row.mhz for row in rows if row.mhz is not None), default=0)
    for (stage, kind), group in groups.items():
        front = {option.mhz for option in kept[stage, kind]}
        gone = [str(row.mhz) for row in group if row.mhz not in front]
        if gone:
            said.append(f"{kind} of stage {stage}: another clock is better in time and energy than {', '.join(gone)} MHz")
        if group[0].mhz is not None and len(group) == 1:
            said.append(f"{group[0]}: one clock only, nothing to choose from")
        elif group[0].mhz is not None and group[0].mhz < top:
            said.append(f"{kind} of stage {stage}: its highest clock is {group[0].mhz} MHz, others have {top} MHz")
    return tuple(said)


def collapse(rows_by_rank: Mapping[int, Sequence[Row]]) -> tuple[Row, ...]:
    """The data and tensor parallel ranks of a pipeline as one: they move in step, so time is the slowest's, energy the sum.

    Ranks whose rows are of different stages or instructions stand beside each other. RequestError naming the rank when ranks that
    share an instruction disagree on its clocks.
    """
    together: dict[Key, list[tuple[int, list[Row]]]] = {}
    for rank, rows in sorted(rows_by_rank.items()):
        for key, group in by_key(rows).items():
            together.setdefault(key, []).append((rank, group))
    made: list[Row] = []
    for (stage, kind), ranks in sorted(together.items()):
        first, group = ranks[0]
        for rank, other in ranks[1:]:
            if different := {row.mhz for row in other} ^ {row.mhz for row in group}:
                clocks = ", ".join(str(clock) for clock in sorted(different, key=lambda clock: clock or 0))
                raise _bad(
                    f"rank {rank} and rank {first} disagree on {kind} of stage {stage}: only one of them has {clocks} MHz",
                    "all ranks of a stage sweep the same clocks",
                )
        for position, row in enumerate(group):
            same = [other[position] for _, other in ranks]
            made.append(Row(stage, kind, row.mhz, max(r.time_s for r in same), sum(r.energy_j for r in same)))
    return tuple(made)


def write(rows: Iterable[Row]) -> str:
    """The rows as the text of a profile CSV, which ``read`` takes."""
    lines = [",".join(COLUMNS)]
    for row in rows:
        lines.append(f"{row.stage},{row.instruction},{'' if row.mhz is None else row.mhz},{row.time_s!r},{row.energy_j!r}")
    return "\n".join(lines) + "\n"
