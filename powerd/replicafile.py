"""What a restarted daemon has to know of the replicas whose leases it finds: one small file beside the lease file.

House rules: as powerd.leasefile; an entry without its lease means nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from powerd.replicatypes import ReplicaRequest

_MAX_BYTES = 1 << 20


class ReplicaFile:
    """``replicas.json`` in the state directory: lease id -> what was registered."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def save(self, replicas: Mapping[str, ReplicaRequest]) -> OSError | None:
        """Replace the file; the error when the disk refuses."""
        temporary = self._path.with_suffix(".new")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(msgspec.json.encode(replicas))
            os.replace(temporary, self._path)
        except OSError as error:
            return error
        return None

    def load(self) -> dict[str, ReplicaRequest]:
        """What it says; nothing when it is not there or cannot be read: its leases end then."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb") as stream:
                return msgspec.json.decode(stream.read(_MAX_BYTES), type=dict[str, ReplicaRequest])
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return {}
