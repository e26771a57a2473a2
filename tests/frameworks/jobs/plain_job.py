"""A plain loop: the three lines of the guide around real steps; says what it saw. Word: nodaemon."""

from __future__ import annotations

import sys
import time

from common import OPTIONS, compute, gpu, lock_mhz, lowest, tell

from powerd.client import Client
from powerd_integrations.steps import Steps

steps = Steps(options=OPTIONS)
seen: list[int] = []
overhead_s = 0.0
for _ in range(30 if "nodaemon" in sys.argv else 80):
    at_s = time.perf_counter()
    context = steps.step()
    context.__enter__()
    overhead_s += time.perf_counter() - at_s
    compute()
    seen.append(lock_mhz())
    at_s = time.perf_counter()
    context.__exit__(None, None, None)
    overhead_s += time.perf_counter() - at_s
more = {}
if "nodaemon" not in sys.argv:
    until_s = time.monotonic() + 10
    while lock_mhz() != 480 and time.monotonic() < until_s:
        time.sleep(0.02)
    more["waiting_mhz"] = lock_mhz()
    gpu.load(0.9, 3.0)  # an evaluation that nobody announced
    more["busy_mhz"] = lock_mhz()
    for _ in range(10):
        with steps.step():
            compute()
    more["after_mhz"] = lock_mhz()
caught = ""
try:
    with steps.step():
        raise ValueError("an exception of the step's own")
except ValueError as error:
    caught = str(error)
reset_mhz = lock_mhz()
with steps.step():
    compute()
steps.close()
with steps.step():  # after the end: nothing, and no error
    pass
tell(steps, lowest_mhz=lowest(seen), reset_mhz=reset_mhz, lock_after_mhz=lock_mhz(), overhead_s=overhead_s / steps.steps,
     caught=caught, leases=len(Client(on_error="log").leases()), **more)  # fmt: skip
