"""The mark that an upgrade leaves: settings stay for ten seconds in which a new powerd-hw takes over.

House rules: the mark lives in the journal's directory, which only powerd-hw's own user can write; it ends by itself.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from powerd.clock import NS

HANDOVER_NS = 10 * NS
_FILE = "hand-over"


def leave(directory: Path, now_ns: int) -> int:
    """Leave the mark; the moment (CLOCK_BOOTTIME) at which it ends."""
    until_ns = now_ns + HANDOVER_NS
    temporary = directory / f"{_FILE}.new"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="ascii") as stream:
        stream.write(str(until_ns))
    os.replace(temporary, directory / _FILE)
    return until_ns


def until(directory: Path, now_ns: int) -> int:
    """When the mark ends, 0 when there is none or it has ended."""
    try:
        fd = os.open(directory / _FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(fd, encoding="ascii") as stream:
            until_ns = int(stream.read(32))
    except (OSError, ValueError):
        return 0
    return until_ns if now_ns < until_ns <= now_ns + HANDOVER_NS else 0


def active(directory: Path, now_ns: int) -> bool:
    """Whether an upgrade is under way."""
    return until(directory, now_ns) > 0


def clear(directory: Path) -> None:
    """The new powerd-hw has taken over."""
    with contextlib.suppress(FileNotFoundError):
        (directory / _FILE).unlink()
