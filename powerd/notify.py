"""What systemd and powerd say to each other: readiness, watchdog, sockets handed over.

House rules: stdlib only; outside systemd every call does nothing.
"""

from __future__ import annotations

import os
import socket


def notify(*lines: str) -> None:
    """Send state lines such as ``READY=1`` to the service manager."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto("\n".join(lines).encode(), "\0" + path[1:] if path.startswith("@") else path)
        except OSError:
            pass  # the manager's loss; it will notice by the watchdog


def watchdog_s() -> float | None:
    """How often the service manager wants to hear ``WATCHDOG=1`` (half of its limit), or ``None``."""
    pid, limit_us = os.environ.get("WATCHDOG_PID"), os.environ.get("WATCHDOG_USEC")
    if not limit_us or not limit_us.isdigit() or (pid and pid != str(os.getpid())):
        return None
    return int(limit_us) / 2e6


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
