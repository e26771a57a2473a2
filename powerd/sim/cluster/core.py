"""The core of the cluster simulator, as compiled from ``core/``: structures, functions, memory.

House rules: same order, same types as core/cluster.h, and sizes are compared when the library is loaded; times are integer
nanoseconds here and seconds everywhere else; arrays that the core writes belong to Python and outlive it.
"""

from __future__ import annotations

import ctypes as c
import functools
from pathlib import Path
from typing import Any

from powerd.sim.build import Library, build
from powerd_policies.dynamollm.fleet import Role

SOURCES = Path(__file__).parent / "core"
# No fused multiply-adds: the same figures on every machine.
FLAGS = ("-std=gnu11", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden")
LIBRARY = Library("the core of the cluster simulator", "libpowerd-cluster.so", SOURCES, FLAGS, ("-lm",))
NEVER = 2**63 - 1
STARTING, SERVING, DRAINING, STOPPED = 1, 2, 3, 4
ROLES: dict[Role, int] = {"both": 0, "prefill": 1, "decode": 2}


class CoreCoefficients(c.Structure):
    """The speed and power of one instance at one clock, as ``engine_model.Coefficients``."""

    _fields_ = [
        (name, c.c_double)
        for name in (
            "prefill_fixed_s", "prefill_token_s", "decode_fixed_s", "decode_request_s",
            "prefill_w", "decode_w", "decode_log2_w", "idle_w",
        )
    ]  # fmt: skip


class CoreConfig(c.Structure):
    """What a run has in common."""

    _fields_ = [
        *[
            (name, c.c_int64)
            for name in (
                "max_running", "clock_set_ns", "park_after_ns", "wake_ns", "drain_limit_ns",
                "tick_ns", "recent_ns", "begin_ns", "context_limit",
            )
        ],
        ("ttft_slo_ns", c.c_int64 * 9),
        *[(name, c.c_double) for name in ("move_fixed_s", "move_token_bytes", "move_bytes_per_s")],
    ]  # fmt: skip


class CoreRequests(c.Structure):
    """Arrays, one element a request."""

    _fields_ = [
        ("count", c.c_int64),
        *[
            (name, c.c_void_p)
            for name in (
                "arrival_ns", "prompt_tokens", "output_tokens", "predicted_tokens", "routed_class",
                "ttft_s", "tbt_p99_s", "finish_s", "energy_j", "rejected", "instance",
            )
        ],
    ]  # fmt: skip


COUNTS = (
    "arrived", "finished", "rejected_context", "rejected_shed", "rejected_cut", "waited", "resteered",
    "clock_sets", "parks", "wakes", "iterations", "prompt_tokens", "output_tokens",
    "moves", "move_waits",
)  # fmt: skip


class CoreTotals(c.Structure):
    """Counts and sums since the begin."""

    _fields_ = [*[(name, c.c_int64) for name in COUNTS], *[(name, c.c_double) for name in ("energy_j", "idle_j", "gpu_s")]]


class CoreObservation(c.Structure):
    """One instance now."""

    _fields_ = [
        *[(name, c.c_int64) for name in ("running", "queued", "queued_prompt_tokens")],
        *[
            (name, c.c_double)
            for name in (
                "kv_used_ratio", "oldest_wait_s", "requests", "prompt_tokens", "output_tokens", "ttft_p99_s", "tbt_p99_s",
            )
        ],
        *[(name, c.c_int64) for name in ("parked", "kv_reserved", "outstanding")],
    ]  # fmt: skip


STRUCTURES = (CoreCoefficients, CoreConfig, CoreRequests, CoreTotals, CoreObservation)

_I, _L, _P, _D = c.c_int, c.c_int64, c.c_void_p, c.c_double
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "cluster_sizeof": (_L, [_I]),
    "cluster_new": (_P, [_P, _P]),
    "cluster_free": (None, [_P]),
    "cluster_begin": (c.c_int32, [_P, c.c_int32, c.c_int32, _I, _L, _L, _P, _D, _L]),
    "cluster_advance": (_I, [_P, _L]),
    "cluster_now": (_L, [_P]),
    "cluster_phase": (_I, [_P, c.c_int32]),
    "cluster_stopped_ns": (_L, [_P, c.c_int32]),
    "cluster_release": (None, [_P, c.c_int32]),
    "cluster_set_clock": (None, [_P, c.c_int32, _P]),
    "cluster_drain": (None, [_P, c.c_int32]),
    "cluster_keep": (None, [_P, c.c_int32]),
    "cluster_reorder": (None, [_P, c.c_int32, _I]),
    "cluster_resteer": (None, [_P, c.c_int32]),
    "cluster_shed": (_L, [_P, c.c_int32, _L]),
    "cluster_route": (_I, [_P, _I, c.c_int32, _P, c.c_int32, _P]),
    "cluster_decodes": (_I, [_P, c.c_int32, _P]),
    "cluster_pool": (None, [_P, c.c_int32, c.c_int32]),
    "cluster_place_waiting": (None, [_P]),
    "cluster_observe": (None, [_P, c.c_int32, _P]),
    "cluster_arrivals": (None, [_P, _P]),
    "cluster_totals": (None, [_P, _P]),
    "cluster_close": (None, [_P]),
    "cluster_hold": (None, [_P, c.c_int32, _L, _L, _D]),
    "cluster_failed": (_I, [_P]),
    "cluster_power": (None, [_P, _L, _P, _P]),
}


@functools.cache
def load() -> c.CDLL:
    """Return the library, compiled first if need be; raises ``BuildError``."""
    return bind(build(LIBRARY))


def bind(path: Path) -> c.CDLL:
    """Load a compiled core; raises ``RuntimeError`` when it was not made of these sources."""
    library = c.CDLL(str(path))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    for number, structure in enumerate(STRUCTURES):
        if library.cluster_sizeof(number) != c.sizeof(structure):
            raise RuntimeError(f"{path}: {structure.__name__} has another size there; remove the file, it is compiled anew")
    return library


def to_ns(seconds: float) -> int:
    """Return whole nanoseconds, halves up, as the core rounds."""
    return int(seconds * 1e9 + 0.5)
