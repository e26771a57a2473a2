"""Runs an engine that does not outlive who started it: ``python -m powerd_integrations.ray_serve.leash CMD...``.

House rules: standard library only; stdin is the leash: when it closes, however its holder ended (also by ``kill -9``), the engine
gets SIGTERM, then SIGKILL with its whole process group; a process of its own watches, because Ray kills the children of a worker
that ends, of which this is one; the engine's exit code is passed on.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys

GRACE_S = 5.0


def main(command: list[str]) -> int:
    """Run the command until it ends or the leash is dropped; its exit code."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: child.terminate())
    engine = os.pidfd_open(child.pid)
    if os.fork() == 0:
        try:
            _watch(engine, child.pid)
        finally:
            os._exit(0)
    code = child.wait()
    _end_group(child.pid)
    return code if code >= 0 else 128 - code


def _watch(engine: int, group: int) -> None:
    """End the engine, known by its pidfd, when stdin closes; what it leaves behind when it ends, by itself or by this."""
    os.setsid()  # a signal to the leash's group is not meant for who watches it
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    poll = select.poll()
    poll.register(engine, select.POLLIN)
    poll.register(0, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if engine in ready:
            break
        if not os.read(0, 4096):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(engine, signal.SIGTERM)
            poll.unregister(0)
            poll.poll(GRACE_S * 1e3)
            break
    _end_group(group)


def _end_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
