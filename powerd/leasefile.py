"""The leases on disk, so that a powerd that was killed finds them again.

House rules: replaced as a whole (temporary file, rename), mode 0600, never through a link; the file belongs to one boot; a file
that does not parse is put aside, never repaired.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from powerd.clock import SIM_STATE_ENV
from powerd.lease import Lease

VERSION = 1
_MAX_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Saved:
    """What the file says; ``problem`` when it could not be used."""

    leases: tuple[Lease, ...] = ()
    panic: bool = False
    problem: str = ""


@dataclass(frozen=True, slots=True)
class _Content:
    version: int
    boot: str
    panic: bool
    leases: tuple[Lease, ...]


def boot_key() -> str:
    """What distinguishes this boot (or this simulated node) from any other: its times mean nothing elsewhere."""
    if state := os.environ.get(SIM_STATE_ENV):
        try:
            info = os.stat(state)
            return f"sim:{info.st_dev}:{info.st_ino}"
        except OSError:
            return f"sim:{state}"
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class LeaseFile:
    """``leases.json`` in the state directory."""

    def __init__(self, path: Path, boot: str | None = None) -> None:
        self.path = path
        self._boot = boot if boot is not None else boot_key()

    def save(self, leases: Iterable[Lease], panic: bool) -> None:
        """Replace the file. OSError when the disk refuses.

        It is not synced to the disk: the file is worth nothing after the machine went down (another boot), and the page cache
        outlives every way in which only this process dies.
        """
        data = msgspec.json.encode(_Content(VERSION, self._boot, panic, tuple(leases)))
        temporary = self.path.with_suffix(".new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o600)
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)
        os.replace(temporary, self.path)

    def load(self) -> Saved:
        """The live leases of this boot; none when the file is absent, of another boot, or had to be put aside."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return Saved()
        except OSError as error:
            return self._quarantine(error.strerror or str(error))
        with os.fdopen(descriptor, "rb") as stream:
            info = os.fstat(stream.fileno())
            if info.st_uid not in (0, os.geteuid()) or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return self._quarantine("others can write it")
            data = stream.read(_MAX_BYTES)
        try:
            content = msgspec.json.decode(data, type=_Content)
        except msgspec.DecodeError as error:
            return self._quarantine(str(error))
        if content.version != VERSION:
            return self._quarantine(f"version {content.version}")
        if content.boot != self._boot:
            # Panic is a person's decision and outlives a reboot; leases are promises to processes that no longer exist.
            return Saved(panic=content.panic)
        return Saved(tuple(lease for lease in content.leases if lease.live), content.panic)

    def _quarantine(self, why: str) -> Saved:
        aside = self.path.with_name(f"{self.path.name}.quarantined")
        try:
            os.replace(self.path, aside)
        except OSError:
            return Saved(problem=f"{self.path}: {why}; could not be put aside")
        return Saved(problem=f"{self.path}: {why}; put aside as {aside.name}")
