"""A database file of ours: how it is known to be corrupt, put aside and closed.

House rules: what cannot be read is put aside, never deleted: somebody may still want what is in it; the write-ahead log goes
with its file and before it, so that a new file never meets an old log.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def is_corrupt(error: Exception) -> bool:
    """Whether SQLite says that the file is none of its own or torn."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _CORRUPT


def set_aside(path: Path) -> bool:
    """Rename a closed SQLite database under a name that tells when; False when there is none. OSError when it cannot be."""
    if not path.exists():
        return False
    mark = f".corrupt-{path.stat().st_mtime_ns}"
    for suffix in ("-wal", "-shm", ""):
        source = Path(f"{path}{suffix}")
        if source.exists():
            source.rename(f"{path}{mark}{suffix}")
    return True


def close(connection: sqlite3.Connection) -> None:
    """Leave a file without a log beside it."""
    try:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    except sqlite3.Error:
        pass  # the log is replayed by whoever opens the file next
    connection.close()
