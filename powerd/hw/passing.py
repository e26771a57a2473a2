"""Frames that carry descriptors: one end of a beat socket travels with the clock plan that it drives.

House rules: a descriptor that nobody takes is closed here, never leaked; none survives an exec.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from powerd.hw import frames

_MOST = 4  # more in one message are dropped by the kernel


def receive(link: socket.socket) -> tuple[bytes, list[int]]:
    """One frame and its descriptors, which are the caller's to take or to ``close``; an empty frame is the end."""
    frame, descriptors, _, _ = socket.recv_fds(link, frames.MAX_FRAME, _MOST, socket.MSG_CMSG_CLOEXEC)
    return frame, list(descriptors)


def send(link: socket.socket, frame: bytes, descriptors: Sequence[int] = ()) -> None:
    """Send one frame; the descriptors stay the caller's as well."""
    if descriptors:
        socket.send_fds(link, [frame], descriptors)
    else:
        link.send(frame)


def close(descriptors: Sequence[int]) -> None:
    """Close what nobody has taken."""
    for descriptor in descriptors:
        os.close(descriptor)
