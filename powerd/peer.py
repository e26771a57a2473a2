"""Who is at the other end of a Unix socket, as the kernel says.

House rules: credentials are those of the process that connected; a PID is only used while its pidfd says that it lives.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import socket
import struct
from functools import lru_cache

from powerd.access import Origin, Principal
from powerd.node import alive

SO_PEERGROUPS = 59
SO_PEERPIDFD = 77  # Linux 6.5
_CREDENTIALS = struct.Struct("3i")


@lru_cache(maxsize=256)
def user_name(uid: int) -> str:
    """The user's name, or the number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_id(name: str) -> int | None:
    """The numeric id of a group, or ``None`` when there is no such group."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def peer_pidfd(connection: socket.socket, pid: int) -> int | None:
    """A pidfd of the process that connected, or ``None`` when it is gone or in a foreign namespace; the caller closes it."""
    with contextlib.suppress(OSError):
        return connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    if pid <= 0:
        return None
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return None
    # Older kernels: the number may be somebody else's by now; its owner must at least be the one who connected.
    with contextlib.suppress(OSError):
        uid = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[1]
        if os.stat(f"/proc/{pid}").st_uid == uid and alive(descriptor):
            return descriptor
    os.close(descriptor)
    return None


def unix_principal(connection: socket.socket) -> Principal:
    """The principal behind a connection. OSError when the kernel does not say."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    groups = {gid}
    with contextlib.suppress(OSError):
        packed = connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024)
        groups |= set(struct.unpack(f"{len(packed) // 4}I", packed))
    return Principal(Origin.UNIX, uid, user_name(uid), frozenset(groups), pid if pid > 0 else None, foreign=pid <= 0)
