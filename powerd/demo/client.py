"""The client that is killed: it holds one lease on all GPUs and nothing else.

House rules: it uses nothing but powerd.client; what it set is not its business to undo.
"""

from __future__ import annotations

import signal
import sys

from powerd.client import Client
from powerd.demo.children import say


def main() -> None:
    """``MHZ``: holds this SM clock on all GPUs until it dies."""
    lease = Client(timeout_s=20).lease("all", sm_clock_mhz=int(sys.argv[1]), reason="demonstration", job="demo")
    say(held=lease.held)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
