"""Rules about the shape of the code itself: short files, nothing left unfinished."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

from tests.arch import source_tree as tree

MAX_LINES = 400
# Path -> why it is longer. An entry that is no longer needed fails as well.
LONGER_FOR_A_REASON: dict[str, str] = {}

UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    long = {tree.shown(path): lines_of(path) for path in tree.files() if lines_of(path) > MAX_LINES}
    assert {path: count for path, count in long.items() if path not in LONGER_FOR_A_REASON} == {}
    assert [path for path in LONGER_FOR_A_REASON if path not in long] == [], "take it off the list"


def unfinished(source: str) -> list[int]:
    """Lines that say work is left, in a comment or by raising NotImplementedError."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_note = token.type == tokenize.COMMENT and UNFINISHED.search(token.string)
        is_stub = token.type == tokenize.NAME and token.string == "NotImplementedError"
        if is_note or is_stub:
            found.append(token.start[0])
    return found


def test_nothing_is_left_unfinished() -> None:
    found = [f"{tree.shown(path)}:{line}" for path in tree.files() for line in unfinished(path.read_text(encoding="utf-8"))]
    assert found == []


def test_the_reader_sees_what_is_unfinished() -> None:
    assert unfinished("x = 1  # TODO: later\ndef f():\n    raise NotImplementedError\n") == [1, 3]
