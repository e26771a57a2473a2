"""Who may write: one powerd-hw per node (a lock) and one worker generation at a time (a number).

House rules: the number is checked under a shared lock that is held during the driver call, so that a newer generation waits for
a call in progress; an old worker that finds a newer number may only exit.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from powerd.killpoint import killpoint

_NUMBER = struct.Struct("<Q")
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class StaleGenerationError(RuntimeError):
    """A newer worker has taken over: this process must not touch a GPU any more."""


def take_lock(directory: Path) -> int | None:
    """The file descriptor that keeps any second powerd-hw out, or ``None`` when one runs (or a hung worker of it still lives)."""
    fd = os.open(directory / "lock", _FLAGS, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _read(fd: int) -> int:
    data = os.pread(fd, _NUMBER.size, 0)
    return int(_NUMBER.unpack(data)[0]) if len(data) == _NUMBER.size else 0


def current(directory: Path) -> int:
    """The generation in force, 0 before the first."""
    fd = os.open(directory / "generation", _FLAGS, 0o600)
    try:
        return _read(fd)
    finally:
        os.close(fd)


def next_generation(directory: Path, wait: Callable[[int], bool]) -> int:
    """Begin a new generation; ``wait(attempt)`` is asked, while a driver call of the old one is under way, whether to wait on.

    A call that hangs in the driver holds the old number's lock for ever; then the number is raised all the same, because that
    call can no longer be stopped and its worker can begin no other.
    """
    fd = os.open(directory / "generation", _FLAGS, 0o600)
    try:
        attempt = 0
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not wait(attempt):
                    break
                attempt += 1
        number = _read(fd) + 1
        os.pwrite(fd, _NUMBER.pack(number), 0)
        os.fsync(fd)
        killpoint("hw.generation.raised")
        return number
    finally:
        os.close(fd)


class Fence:
    """One thread's own view of the number; a lock belongs to an open file, so threads do not share one."""

    def __init__(self, directory: Path, generation: int) -> None:
        self.generation = generation
        self._fd = os.open(directory / "generation", _FLAGS, 0o600)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within this block no newer generation begins; StaleGenerationError when one has."""
        fcntl.flock(self._fd, fcntl.LOCK_SH)
        try:
            newest = _read(self._fd)
            if newest != self.generation:
                raise StaleGenerationError(f"generation {self.generation} was followed by {newest}")
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._fd)
