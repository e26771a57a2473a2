"""Every fault that can be injected into a simulated node.

House rules: one table of kinds, shared by Python, command line and documentation; a fault stays until it is cleared
(counter resets, XIDs and reloads are events); nothing here touches a real GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Knob(IntEnum):
    """Per-GPU switches of the driver, in the order of nvml/control.c."""

    LOST = 0
    HUNG = 1
    FROZEN = 2
    BRAKE = 3
    HW_THERMAL = 4
    SW_THERMAL = 5
    OUT_OF_BAND_MW = 6
    LIMIT_MW = 7
    XID = 8
    COUNTER_RESET = 9
    PERSISTENCE = 10
    MIG = 11
    HEAT_C = 12
    RESET = 13
    MEMORY_LOCK = 14


class NodeKnob(IntEnum):
    """Node-wide switches of the driver, in the order of nvml/control.c."""

    RM_HUNG = 0
    PERM = 1
    LATENCY_PPM = 2


PERMISSIONS = {"root": 0, "any": 1, "none": 2}


@dataclass(frozen=True, slots=True)
class Kind:
    """One fault: what it does, which switch it turns, the value used when none is given, whether it can be cleared."""

    text: str
    knob: Knob | NodeKnob | None = None
    default: int | None = 1
    clear: int | None = 0


KINDS: dict[str, Kind] = {
    "lost": Kind("the GPU has fallen off the bus: every call answers GPU_IS_LOST, XID 79", Knob.LOST),
    "hang": Kind("every call on this GPU hangs, the others go on (the node lock is free)", Knob.HUNG),
    "hang-node": Kind("a call hangs inside the driver's node-wide lock: all sets hang, reads go on", NodeKnob.RM_HUNG),
    "freeze": Kind("sensors repeat their last reading", Knob.FROZEN),
    "power-brake": Kind("hardware power brake: half clock, reason 0x80|0x8", Knob.BRAKE),
    "hw-thermal": Kind("hardware thermal slowdown: half clock, reason 0x40|0x8", Knob.HW_THERMAL),
    "sw-thermal": Kind("software thermal slowdown: 70 % clock, reason 0x20", Knob.SW_THERMAL),
    "heat": Kind("the air is --value degrees C warmer", Knob.HEAT_C, 40),
    "oob-cap": Kind("out-of-band (BMC) power cap of --value mW, below what NVML was asked for", Knob.OUT_OF_BAND_MW, None),
    "foreign-limit": Kind("somebody else sets the power limit to --value mW", Knob.LIMIT_MW, None, None),
    "foreign-lock": Kind("somebody else locks the SM clock at --value MHz (0 = unlocks)", None, None, None),
    "foreign-memory-lock": Kind("somebody else locks the memory clock at --value MHz", Knob.MEMORY_LOCK, None, None),
    "foreign-reset": Kind("somebody else resets locks and limit to the driver's defaults", Knob.RESET, 1, None),
    "counter-reset": Kind("the energy counter starts anew at 0", Knob.COUNTER_RESET, 1, None),
    "xid": Kind("an XID --value is reported (default 31)", Knob.XID, 31, None),
    "persistence": Kind("persistence mode is set to --value", Knob.PERSISTENCE, 0, 1),
    "mig": Kind("MIG mode is on: utilisation is not supported", Knob.MIG),
    "permission": Kind("who may set: --permission root|any|none", None, None, None),
    "latency": Kind("every driver call takes --value per cent of its usual time", None, 1000, None),
    "driver-reload": Kind("the driver is reloaded: settings and counters start anew, open handles are lost", None, 1, None),
    "driver-upgrade": Kind("as driver-reload, and a client that was running gets 18 at its next init", None, 1, None),
    "rule": Kind(
        "calls that match --function return --code and/or take --delay longer (--count, --probability, --after)",
        None,
        1,
        None,
    ),
}
