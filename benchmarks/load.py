"""Work on a simulated GPU that is begun and not waited for: whoever moves simulated time itself must not block on it."""

from __future__ import annotations

import ctypes

from powerd.sim.layout import Item
from powerd.sim.workload import Context


def begin(context: Context, state: int, kernel: str, activity: float, duration_ns: int) -> None:
    """Start a steady load (LOAD) or a wait for communication (BLOCKED) and return; RuntimeError when it is refused."""
    node, begun = context.node, ctypes.c_uint64()
    code = node.library.powerd_sim_work_submit(
        node.pointer, context.gpu, context._row, state, (Item * 1)(), 0, activity, context.kernel(kernel), duration_ns,
        ctypes.byref(begun),
    )  # fmt: skip
    if code:
        raise RuntimeError(f"the simulated GPU {context.gpu} refused the load (code {code})")
