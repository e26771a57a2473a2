"""What a GPU can tell and be told: the port that nvml.py implements and everything else in hw is written against.

House rules: every refusal is a DeviceError that carries NVML's own number; missing is ``None``, never 0; nothing here has state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from powerd.errors import DeviceError
from powerd.hw.tables import GpuProcess
from powerd.model import Capabilities, Gpu, Interval

#: NVML return codes that decide what happens next.
UNINITIALIZED = 1
INVALID_ARGUMENT = 2
NOT_SUPPORTED = 3
NO_PERMISSION = 4
NOT_FOUND = 6
DRIVER_NOT_LOADED = 9
TIMEOUT = 10
LIBRARY_NOT_FOUND = 12
FUNCTION_NOT_FOUND = 13
GPU_IS_LOST = 15
RESET_REQUIRED = 16
LIB_RM_VERSION_MISMATCH = 18

#: After one of these every handle of the process is worthless: release them and start anew with a fresh library.
DRIVER_GONE = frozenset({UNINITIALIZED, DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND, LIB_RM_VERSION_MISMATCH})

#: GPU clock event reason bits that verification asks for.
REASON_IDLE = 0x1

_CODES = {
    NO_PERMISSION: ("no_permission", "powerd-hw lacks CAP_SYS_ADMIN on the host"),
    NOT_SUPPORTED: ("not_supported", ""),
    FUNCTION_NOT_FOUND: ("not_supported", "the driver is too old for this call"),
    GPU_IS_LOST: ("gpu_lost", "it fell off the bus; see the kernel log for XID 79"),
    RESET_REQUIRED: ("gpu_lost", "the GPU needs a reset"),
    UNINITIALIZED: ("no_driver", "the driver was unloaded"),
    DRIVER_NOT_LOADED: ("no_driver", "load the NVIDIA driver or use powerd sim run"),
    LIBRARY_NOT_FOUND: ("no_driver", "install the NVIDIA driver or use powerd sim run"),
    LIB_RM_VERSION_MISMATCH: ("no_driver", "the driver was upgraded under a running library"),
    INVALID_ARGUMENT: ("bad_value", ""),
    TIMEOUT: ("timeout", ""),
}


def device_error(what: str, nvml_code: int, text: str) -> DeviceError:
    """The DeviceError for a return code of NVML: says what was asked, NVML's words and what to do."""
    code, hint = _CODES.get(nvml_code, ("internal", ""))
    return DeviceError(f"{what}: {text}", hint=hint, code=code, nvml_code=nvml_code)


def wedged(what: str, deadline_s: float) -> DeviceError:
    """The DeviceError for a call that has not come back."""
    return DeviceError(
        f"{what}: no answer from the driver within {deadline_s:g} s", hint="see the kernel log for XID 119", code="wedged"
    )


@dataclass(slots=True)
class Fast:
    """What is read on every tick; the clock and its reasons only when asked for."""

    energy_mj: int | None = None
    power_mw: int | None = None
    power_average_mw: int | None = None
    sm_clock_mhz: int | None = None
    clock_event_reasons: int | None = None


@dataclass(slots=True)
class Slow:
    """What is read about once a second."""

    memory_clock_mhz: int | None = None
    temperature_c: int | None = None
    utilization_percent: int | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    power_limit_requested_mw: int | None = None
    power_limit_enforced_mw: int | None = None


class Sensor(Protocol):
    """What one GPU can tell; a value that the GPU does not offer is ``None``, a GPU that fails raises DeviceError."""

    @property
    def gpu(self) -> Gpu:
        """Who it is."""

    def capabilities(self) -> Capabilities:
        """What it can do under the loaded driver; changes nothing on the device."""

    def fast(self, clocks: bool = True) -> Fast:
        """Energy and power now, with ``clocks`` also SM clock and clock event reasons, which cost a call each."""

    def slow(self) -> Slow:
        """The readings that move slowly."""

    def processes(self) -> tuple[GpuProcess, ...] | None:
        """Who computes on it, or ``None`` when it does not say."""

    def power_limits_mw(self) -> tuple[int | None, int | None]:
        """The power limit that was requested and the one that is enforced."""


class Knobs(Protocol):
    """What one GPU can be told; each call returns when the driver has returned."""

    def set_power_limit(self, power_mw: int) -> None:
        """Request a board power limit."""

    def lock_sm_clock(self, interval: Interval) -> None:
        """Lock the SM clock into [low, high] MHz."""

    def unlock_sm_clock(self) -> None:
        """Undo any lock of the SM clock."""

    def lock_memory_clock(self, interval: Interval) -> None:
        """Lock the memory clock into [low, high] MHz."""

    def unlock_memory_clock(self) -> None:
        """Undo any lock of the memory clock."""


class Device(Sensor, Knobs, Protocol):
    """One GPU."""


class Node(Protocol):
    """All GPUs of the node behind one driver handle."""

    @property
    def driver_load_id(self) -> bytes:
        """16 bytes that change when the driver is loaded anew; settings do not outlive that."""

    def count(self) -> int:
        """How many GPUs there are, whether they answer or not."""

    def devices(self) -> Sequence[Device]:
        """Every GPU that answers."""

    def find(self, uuid: str) -> Device:
        """The GPU of this UUID, looked up afresh; DeviceError when it does not answer."""

    def close(self) -> None:
        """Give back every handle."""
