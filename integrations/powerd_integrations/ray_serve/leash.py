"""Runs an engine as a child that does not outlive who started it: ``python -m powerd_integrations.ray_serve.leash CMD...``.

House rules: standard library only; stdin is the leash: when it closes, however its holder ended (also by ``kill -9``), the engine
gets SIGTERM, then SIGKILL with its whole process group; the engine's exit code is passed on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

GRACE_S = 5.0


def main(command: list[str]) -> int:
    """Run the command until it ends or the leash is dropped; its exit code."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: child.terminate())

    def watch() -> None:
        while os.read(0, 4096):
            pass
        child.terminate()
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            pass
        _end_group(child.pid)

    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    _end_group(child.pid)
    return code if code >= 0 else 128 - code


def _end_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
