"""A plain loop: the three lines of the guide around real steps; says what it saw. Words: nodaemon, input."""

from __future__ import annotations

import sys
import time

from common import OPTIONS, compute, gpu, lock_mhz, lowest, tell

from powerd.client import Client
from powerd_integrations.steps import Steps

steps = Steps(options=OPTIONS)
seen: list[int] = []
began_s = time.monotonic()
overhead_s = 0.0
for _ in range(90):
    at_s = time.perf_counter()
    context = steps.step()
    context.__enter__()
    overhead_s += time.perf_counter() - at_s
    compute()
    seen.append(lock_mhz())
    at_s = time.perf_counter()
    context.__exit__(None, None, None)
    overhead_s += time.perf_counter() - at_s
    if "input" in sys.argv and len(seen) == 60:
        time.sleep(1.5)
        waiting_mhz = lock_mhz()
        gpu.load(0.9, 3.0)  # an evaluation that nobody announced
        busy_mhz = lock_mhz()
        seen.clear()
        for _ in range(15):
            with steps.step():
                compute()
            seen.append(lock_mhz())
        break
after_mhz = seen[-1]
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
more = {"waiting_mhz": waiting_mhz, "busy_mhz": busy_mhz} if "input" in sys.argv else {}
tell(steps, lowest_mhz=lowest(seen), after_mhz=after_mhz, reset_mhz=reset_mhz, lock_after_mhz=lock_mhz(),
     caught=caught, leases=len(Client(on_error="log").leases()), **more)  # fmt: skip
