"""A database file that cannot be read is put aside, never deleted: somebody may still want what is in it.

House rules: the write-ahead log goes with its file and before it, so that a new file never meets an old log.
"""

from __future__ import annotations

from pathlib import Path


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
