"""What powerd-hw says to the service manager and takes from it.

House rules: stdlib only, because the privileged side imports nothing it does not need; outside systemd every call does nothing.
"""

from __future__ import annotations

import os
import socket

_FIRST_FD = 3


def notify(*lines: str) -> None:
    """Send state lines such as ``READY=1``; a manager that does not listen will notice by its watchdog."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto("\n".join(lines).encode(), "\0" + path[1:] if path.startswith("@") else path)
        except OSError:
            return


def watchdog_ns() -> int | None:
    """How often the service manager wants ``WATCHDOG=1``: a third of its limit; ``None`` without a watchdog."""
    limit_us, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not limit_us.isdigit() or (pid and pid != str(os.getpid())):
        return None
    return int(limit_us) * 1000 // 3


def inherited_listener() -> socket.socket | None:
    """The listening socket that systemd opened for us, or ``None``."""
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()) or os.environ.pop("LISTEN_FDS", "0") == "0":
        return None
    os.environ.pop("LISTEN_FDNAMES", None)
    os.set_inheritable(_FIRST_FD, False)
    return socket.socket(fileno=_FIRST_FD)
