"""The structures that Python and the simulated driver exchange, mirrored from nvml/sim_state.h.

House rules: same order, same types as the C header; sizes are compared when the library is loaded; nothing else of
the shared state is visible to Python.
"""

from __future__ import annotations

import ctypes as c
from typing import Any

NAME = 64
POINTS = 192
MAX_GPUS = 16
MAX_KERNELS = 64
MAX_QUEUE = 64
UINT64_MAX = 2**64 - 1


class Kernel(c.Structure):
    """How fast one kernel runs and what it draws at each SM clock (ascending)."""

    _fields_ = [
        ("name", c.c_char * NAME),
        ("points", c.c_uint32),
        ("reserved", c.c_uint32),
        ("memory_share", c.c_double),
        ("clock_mhz", c.c_double * POINTS),
        ("units_per_s", c.c_double * POINTS),
        ("power_w", c.c_double * POINTS),
    ]


class Model(c.Structure):
    """Constants of one GPU model."""

    _fields_ = [
        ("name", c.c_char * NAME),
        *[
            (name, c.c_uint32)
            for name in [
                "architecture",
                "cc_major",
                "cc_minor",
                "cores",
                "brand",
                "pci_device_id",
                "pci_subsystem_id",
                "clock_min_mhz",
                "clock_max_mhz",
                "clock_step_mhz",
                "idle_clock_mhz",
                "memory_clock_count",
            ]
        ],
        ("memory_clock_mhz", c.c_uint32 * 4),
        *[
            (name, c.c_uint32)
            for name in [
                "memory_lock_supported",
                "power_usage_is_average",
                "limit_min_mw",
                "limit_max_mw",
                "limit_default_mw",
                "fan_supported",
                "mig_supported",
            ]
        ],
        ("memory_bytes", c.c_uint64),
        *[
            (name, c.c_double)
            for name in [
                "idle_w",
                "context_idle_w",
                "blocked_w",
                "voltage_floor",
                "voltage_knee",
                "sensor_period_s",
                "sensor_window_s",
                "energy_period_s",
                "sensor_noise",
                "sensor_gain_spread",
                "energy_gain_spread",
                "ambient_c",
                "thermal_c_per_w",
                "thermal_tau_s",
                "leak_w_per_c",
                "slowdown_c",
                "shutdown_c",
                "cap_bind",
                "cap_target",
                "cap_tau_s",
                "cap_tick_s",
                "cap_gain",
                "settle_s",
            ]
        ],
    ]


class Config(c.Structure):
    """What a node is made of."""

    _fields_ = [
        ("gpus", c.c_uint32),
        ("mode", c.c_uint32),
        ("perm", c.c_uint32),
        ("persistence", c.c_uint32),
        ("seed", c.c_uint64),
        ("scale", c.c_double),
        ("latency", c.c_double),
        ("first_open_s", c.c_double),
        ("driver_version", c.c_char * NAME),
        ("nvml_version", c.c_char * NAME),
        ("cuda_version", c.c_uint32),
        ("kernels", c.c_uint32),
        ("model", Model),
    ]


class FaultRule(c.Structure):
    """One row of the fault table."""

    _fields_ = [
        ("glob", c.c_char * NAME),
        ("gpu", c.c_int32),
        ("ret", c.c_int32),
        ("delay_ns", c.c_uint64),
        ("count", c.c_int64),
        ("skip", c.c_uint64),
        ("probability", c.c_double),
    ]


class View(c.Structure):
    """The truth of one GPU."""

    _fields_ = [
        ("uuid", c.c_char * NAME),
        *[(name, c.c_uint64) for name in ("now_ns", "true_energy_uj", "counter_mj")],
        *[(name, c.c_double) for name in ("power_w", "clock_mhz", "temperature_c")],
        *[
            (name, c.c_uint32)
            for name in [
                "lock_min_mhz",
                "lock_max_mhz",
                "memory_lock_min_mhz",
                "memory_lock_max_mhz",
                "limit_mw",
                "enforced_mw",
                "default_limit_mw",
                "out_of_band_mw",
            ]
        ],
        ("reasons", c.c_uint64),
        *[
            (name, c.c_uint32)
            for name in [
                "persistence",
                "mig",
                "lost",
                "hung",
                "frozen",
                "busy",
                "processes",
                "xid_count",
                "last_xid",
                "utilization",
                "memory_clock_mhz",
                "capped",
            ]
        ],
        ("setter_calls", c.c_uint64),
        ("memory_used", c.c_uint64),
    ]


class Item(c.Structure):
    """One queued kernel: index and units of work."""

    _fields_ = [("kernel", c.c_uint32), ("reserved", c.c_uint32), ("units", c.c_double)]


STRUCTURES: tuple[type[c.Structure], ...] = (Config, Model, Kernel, FaultRule, View, Item)

_p, _i, _u32, _u64, _i64, _d = c.c_void_p, c.c_int, c.c_uint32, c.c_uint64, c.c_int64, c.c_double
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "powerd_sim_version": (_u32, []),
    "powerd_sim_now_ns": (_u64, []),
    "powerd_sim_scale": (_d, []),
    "powerd_sim_join": (_i, [c.c_char_p]),
    "powerd_sim_leave": (None, [_i]),
    "powerd_sim_wait": (_u64, [_i, _u64, _i]),
    "powerd_sim_wake": (None, [_i]),
    "powerd_sim_flight": (None, [_i]),
    "powerd_sim_advance": (_u64, [_u64]),
    "powerd_sim_advance_at": (_u64, [_p, _u64, _i]),
    "powerd_sim_sizeof": (_u64, [_i]),
    "powerd_sim_create": (_i, [c.c_char_p, c.POINTER(Config), c.POINTER(Kernel)]),
    "powerd_sim_map": (_p, [c.c_char_p]),
    "powerd_sim_unmap": (None, [_p]),
    "powerd_sim_attach": (None, [_p]),
    "powerd_sim_now_at": (_u64, [_p]),
    "powerd_sim_config_at": (None, [_p, c.POINTER(Config)]),
    "powerd_sim_true_energy_mj": (_d, [_i]),
    "powerd_sim_true_energy_mj_at": (_d, [_p, _i]),
    "powerd_sim_view_at": (_i, [_p, _i, c.POINTER(View)]),
    "powerd_sim_rule_add": (_i, [_p, c.POINTER(FaultRule)]),
    "powerd_sim_rule_fired": (_u64, [_p, _i]),
    "powerd_sim_rules_clear": (None, [_p]),
    "powerd_sim_set": (_i, [_p, _i, _i, _i64]),
    "powerd_sim_set_lock": (_i, [_p, _i, _u32, _u32]),
    "powerd_sim_set_node": (_i, [_p, _i, _i64]),
    "powerd_sim_reload": (None, [_p, c.c_char_p]),
    "powerd_sim_kernel_index": (_i, [_p, c.c_char_p]),
    "powerd_sim_kernel_rate": (_d, [c.POINTER(Kernel), _d]),
    "powerd_sim_kernel_power": (_d, [c.POINTER(Kernel), _d]),
    "powerd_sim_work_open": (_i, [_p, _i, c.c_char_p, _u64]),
    "powerd_sim_work_close": (None, [_p, _i, _i]),
    "powerd_sim_work_submit": (_i, [_p, _i, _i, _u32, c.POINTER(Item), _u32, _d, _u32, _u64, c.POINTER(_u64)]),
    "powerd_sim_work_declare": (_i, [_p, _i, _i, _u32, _d, _u64]),
    "powerd_sim_work_wait": (_i, [_p, _i, _i, _i, c.POINTER(_u64), c.POINTER(_d)]),
}


def bind(path: str) -> c.CDLL:
    """Load the compiled library and declare its control functions; raises RuntimeError if layouts disagree."""
    library = c.CDLL(path)
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    for index, structure in enumerate(STRUCTURES):
        if library.powerd_sim_sizeof(index) != c.sizeof(structure):
            raise RuntimeError(f"layout.py and sim_state.h disagree about {structure.__name__}")
    return library
