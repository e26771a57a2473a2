"""CSV cells as numbers, with errors that say where: shared by everything here that reads measurements.

House rule: a bad cell is named by file, line and column, never skipped.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from powerd.errors import RequestError


@dataclass(frozen=True, slots=True)
class Row:
    """The cells of one row, by column."""

    words: Mapping[str, str]
    place: str

    def number(self, column: str, above: float | None = None) -> float:
        """The number in ``column``: finite, not below zero, and more than ``above``."""
        text = self.words[column]
        try:
            number = float(text)
        except ValueError:
            raise _bad(f"{self.place}: {column} is {text!r}, which is no number") from None
        if not math.isfinite(number) or number < 0 or (above is not None and number <= above):
            raise _bad(
                f"{self.place}: {column} is {text}", "it must be finite and " + ("above" if above == 0 else "not below") + " zero"
            )
        return number


def rows(text: str, name: str, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a CSV that has ``columns`` at least; RequestError naming line and column of what is missing."""
    reader = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""))
    header = [word.strip() for word in next(reader, [])]
    if missing := [column for column in columns if column not in header]:
        raise _bad(f"{name}: line 1 lacks the column {missing[0]!r}", f"it needs {','.join(columns)}")
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        place = f"{name}: line {reader.line_num}"
        if len(cells) != len(header):
            raise _bad(f"{place} has {len(cells)} cells, the first line {len(header)}")
        yield Row(dict(zip(header, (cell.strip() for cell in cells), strict=True)), place)


def _bad(message: str, hint: str = "") -> RequestError:
    return RequestError(message, hint=hint, code="bad_value")
