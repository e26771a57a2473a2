"""What systemd and powerd say to each other: readiness, watchdog, sockets handed over.

House rules: stdlib only; outside systemd every call does nothing.
"""

from __future__ import annotations

import os
import socket

from powerd.hw.systemd import notify, watchdog_ns

__all__ = ["listen_sockets", "notify", "watchdog_ns"]


def listen_sockets() -> dict[str, socket.socket]:
    """The sockets handed over by socket activation, by their ``FileDescriptorName``."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    count = int(os.environ.get("LISTEN_FDS", "0"))
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    sockets: dict[str, socket.socket] = {}
    for offset in range(count):
        name = names[offset] if offset < len(names) else ""
        descriptor = 3 + offset
        os.set_inheritable(descriptor, False)
        sockets[name] = socket.socket(fileno=descriptor)
    for variable in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(variable, None)
    return sockets
