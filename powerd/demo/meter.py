"""Energy windows around steps of a training run, opened and closed on command: a client of its own, beside the job.

House rules: it uses nothing but powerd.client; on a stepped node it takes part in the clock while it asks, so that a window ends
at the very moment of the command and its closing sample may come.
"""

from __future__ import annotations

import sys
from dataclasses import asdict

from powerd.client import Client
from powerd.clock import from_environment
from powerd.demo.children import say


def main() -> None:
    """``GPUS``: reads ``begin NAME`` and ``end`` from stdin; answers ``begun``, ``ending`` (the job may go on), ``figures``."""
    client, clock = Client(timeout_s=60), from_environment()
    uuids = [c.gpu.uuid for c in sorted(client.node().gpus, key=lambda c: c.gpu.index)][: int(sys.argv[1])]
    say(ready=True)
    window = None
    for line in sys.stdin:
        verb, _, name = line.strip().partition(" ")
        if verb == "begin":
            window = client.energy(name, uuids, job="demo").begin()
            say(begun=name)
        elif verb == "end" and window is not None:
            waiter = clock.waiter("meter")
            say(ending=True)
            window.end()
            waiter.close()
            figures = {figure.uuid: asdict(figure) for figure in window.figures}
            say(figures=[figures[uuid] for uuid in uuids])


if __name__ == "__main__":
    main()
