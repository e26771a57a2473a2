"""THE only importer of pynvml: the port of powerd.hw.port on NVIDIA's library.

House rules: pynvml is imported when a node is opened, never before; locked clocks only, never application clocks; the v1 limit
setter only (pynvml's ``_v2`` setter ignores the driver's answer); what a driver does not offer is asked for once, then left.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any, Never

from powerd.clock import SIM_STATE_ENV, find_sim_library
from powerd.errors import DeviceError
from powerd.hw import port
from powerd.hw.port import Fast, Slow, device_error
from powerd.hw.tables import GpuProcess
from powerd.model import Capabilities, Control, Gpu, Interval, Support

_FIELD_ENERGY, _FIELD_AVERAGE, _FIELD_INSTANT, _FIELD_ENFORCED, _FIELD_REQUESTED = 83, 185, 186, 190, 192
_ABSENT = frozenset({port.NOT_SUPPORTED, port.FUNCTION_NOT_FOUND, port.INVALID_ARGUMENT})
_ARCH_AMPERE, _ARCH_VOLTA = 7, 5
_CAP_SYS_ADMIN = 21
_GA100 = ("A100", "A800", "A30")  # instantaneous power where the rest of Ampere averages
_NO_PERMISSION_TEXT = "lacks CAP_SYS_ADMIN in the initial user namespace"


def may_set() -> bool:
    """A hint, read from our own process and without a driver call, whether setters can be permitted at all."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff"))
        with open("/proc/self/uid_map", encoding="ascii") as uid_map:
            initial_namespace = uid_map.read().split() == ["0", "0", "4294967295"]
    except (OSError, StopIteration, ValueError):
        return os.geteuid() == 0
    return bool(effective >> _CAP_SYS_ADMIN & 1) and initial_namespace


def _import() -> Any:
    try:
        import pynvml
    except ImportError as error:
        raise device_error("nvidia-ml-py", port.LIBRARY_NOT_FOUND, "not installed: pip install 'powerd[daemon]'") from error
    return pynvml


def _load_id(driver_version: str) -> bytes:
    """Changes with every load of the kernel module: its sysfs node is made anew; a simulated node is its state file."""
    marks = [driver_version]
    for path in ("/sys/module/nvidia", os.environ.get(SIM_STATE_ENV, "")):
        try:
            info = os.stat(path)
            marks.append(f"{path}:{info.st_dev}:{info.st_ino}")
        except OSError:
            continue
    return hashlib.sha256("\n".join(marks).encode()).digest()[:16]


class NvmlDevice:
    """One GPU through NVML; not safe for two threads in one call, which the sampler and the actuator never need."""

    def __init__(self, nvml: Any, index: int, driver_version: str, simulated: bool) -> None:
        self._nvml = nvml
        self._driver_version = driver_version
        self._simulated = simulated
        self._handle = self._call("open", nvml.nvmlDeviceGetHandleByIndex, index)
        read = self._read
        self._gpu = Gpu(
            uuid=self._call("UUID", nvml.nvmlDeviceGetUUID, self._handle),
            index=index,
            name=read(nvml.nvmlDeviceGetName, self._handle) or "unknown",
            pci_bus_id=getattr(read(nvml.nvmlDeviceGetPciInfo, self._handle), "busId", ""),
            minor_number=read(nvml.nvmlDeviceGetMinorNumber, self._handle),
        )
        self._architecture: int = read(nvml.nvmlDeviceGetArchitecture, self._handle) or 0
        self._fields = [_FIELD_ENERGY, _FIELD_INSTANT, _FIELD_AVERAGE]
        self._limit_fields = [_FIELD_REQUESTED, _FIELD_ENFORCED]
        self._energy_call = False
        self._absent: set[Any] = set()
        self._probe_fields()

    @property
    def gpu(self) -> Gpu:
        return self._gpu

    def _fail(self, what: str, error: Any) -> Never:
        raise device_error(what, int(error.value), str(error)) from error

    def _call(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._nvml.NVMLError as error:
            self._fail(what, error)

    def _read(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The value, or ``None`` when this GPU does not offer it; other failures are DeviceErrors."""
        try:
            return function(*arguments)
        except self._nvml.NVMLError as error:
            if error.value in _ABSENT or error.value == port.NOT_FOUND:
                return None
            self._fail(function.__name__, error)

    def _read_known(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """As ``_read``, but what was absent once is not asked again: every call costs the node-wide driver lock."""
        if function in self._absent:
            return None
        value = self._read(function, *arguments)
        if value is None:
            self._absent.add(function)
        return value

    def _field_values(self, fields: list[int]) -> dict[int, int]:
        if not fields:
            return {}
        found: dict[int, int] = {}
        for value in self._call("field values", self._nvml.nvmlDeviceGetFieldValues, self._handle, fields):
            code = value.nvmlReturn
            if code == 0:
                # energy is 64 bits wide, the rest 32; the union's other bytes are not ours to believe
                found[value.fieldId] = value.value.ullVal if value.fieldId == _FIELD_ENERGY else value.value.uiVal
            elif code not in _ABSENT:
                raise device_error(f"field {value.fieldId}", code, f"NVML error {code}")
        return found

    def _probe_fields(self) -> None:
        try:
            have = self._field_values(self._fields + self._limit_fields)
        except DeviceError as error:
            if error.nvml_code not in _ABSENT:
                raise
            have = {}
        self._fields = [f for f in self._fields if f in have]
        self._limit_fields = [f for f in self._limit_fields if f in have]
        if _FIELD_ENERGY not in have:
            self._energy_call = self._read(self._nvml.nvmlDeviceGetTotalEnergyConsumption, self._handle) is not None
        self._power_call = not {_FIELD_INSTANT, _FIELD_AVERAGE} & set(have)

    @property
    def energy_counter(self) -> bool:
        """Whether the GPU counts its own energy."""
        return self._energy_call or _FIELD_ENERGY in self._fields

    @property
    def _usage_is_instant(self) -> bool:
        return self._architecture < _ARCH_AMPERE or any(mark in self._gpu.name for mark in _GA100)

    def fast(self, clocks: bool = True) -> Fast:
        nvml, handle = self._nvml, self._handle
        found = self._field_values(self._fields)
        fast = Fast(
            energy_mj=found.get(_FIELD_ENERGY),
            power_mw=found.get(_FIELD_INSTANT),
            power_average_mw=found.get(_FIELD_AVERAGE),
        )
        if clocks:
            fast.sm_clock_mhz = self._read_known(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM)
            fast.clock_event_reasons = self._read_known(nvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
        if self._energy_call:
            fast.energy_mj = self._read(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        if self._power_call:
            usage = self._read_known(nvml.nvmlDeviceGetPowerUsage, handle)
            if self._usage_is_instant:
                fast.power_mw = usage
            else:
                fast.power_average_mw = usage
        return fast

    def slow(self) -> Slow:
        nvml, handle = self._nvml, self._handle
        requested, enforced = self.power_limits_mw()
        utilization = self._read_known(nvml.nvmlDeviceGetUtilizationRates, handle)
        memory = self._read_known(nvml.nvmlDeviceGetMemoryInfo, handle)
        return Slow(
            memory_clock_mhz=self._read(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
            temperature_c=self._read_known(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            utilization_percent=None if utilization is None else int(utilization.gpu),
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_total_bytes=None if memory is None else int(memory.total),
            power_limit_requested_mw=requested,
            power_limit_enforced_mw=enforced,
        )

    def power_limits_mw(self) -> tuple[int | None, int | None]:
        if len(self._limit_fields) > 1:  # one call instead of two
            found = self._field_values(self._limit_fields)
            return found.get(_FIELD_REQUESTED), found.get(_FIELD_ENFORCED)
        nvml = self._nvml
        requested = self._read_known(nvml.nvmlDeviceGetPowerManagementLimit, self._handle)
        return requested, self._read_known(nvml.nvmlDeviceGetEnforcedPowerLimit, self._handle)

    def processes(self) -> tuple[GpuProcess, ...] | None:
        rows = self._read_known(self._nvml.nvmlDeviceGetComputeRunningProcesses, self._handle)
        return None if rows is None else tuple(GpuProcess(int(r.pid), r.usedGpuMemory) for r in rows)

    def set_power_limit(self, power_mw: int) -> None:
        self._call("set power limit", self._nvml.nvmlDeviceSetPowerManagementLimit, self._handle, power_mw)

    def lock_sm_clock(self, interval: Interval) -> None:
        self._call("lock SM clock", self._nvml.nvmlDeviceSetGpuLockedClocks, self._handle, interval.low, interval.high)

    def unlock_sm_clock(self) -> None:
        self._call("unlock SM clock", self._nvml.nvmlDeviceResetGpuLockedClocks, self._handle)

    def lock_memory_clock(self, interval: Interval) -> None:
        self._call("lock memory clock", self._nvml.nvmlDeviceSetMemoryLockedClocks, self._handle, interval.low, interval.high)

    def unlock_memory_clock(self) -> None:
        self._call("unlock memory clock", self._nvml.nvmlDeviceResetMemoryLockedClocks, self._handle)

    def capabilities(self) -> Capabilities:
        nvml, handle = self._nvml, self._handle
        constraints = self._read(nvml.nvmlDeviceGetPowerManagementLimitConstraints, handle)
        memory_clocks = tuple(sorted(self._read(nvml.nvmlDeviceGetSupportedMemoryClocks, handle) or ()))
        # every memory clock has its own table of SM clocks; the highest one holds them all
        top = memory_clocks[-1:] and self._read(nvml.nvmlDeviceGetSupportedGraphicsClocks, handle, memory_clocks[-1])
        sm_clocks = tuple(sorted(set(top or ())))
        persistence = self._read(nvml.nvmlDeviceGetPersistenceMode, handle)
        mig = self._read(nvml.nvmlDeviceGetMigMode, handle)
        mig_on = None if mig is None else bool(mig[0])
        low, high = constraints or (None, None)
        return Capabilities(
            gpu=self._gpu,
            driver_version=self._driver_version,
            power_limit_min_mw=low,
            power_limit_max_mw=high,
            power_limit_default_mw=self._read(nvml.nvmlDeviceGetPowerManagementDefaultLimit, handle),
            sm_clocks_mhz=sm_clocks,
            memory_clocks_mhz=memory_clocks,
            energy_counter=self.energy_counter,
            persistence=None if persistence is None else bool(persistence),
            mig=mig_on,
            simulated=self._simulated,
            controls=self._controls(low is not None, sm_clocks, memory_clocks, bool(mig_on)),
        )

    def _controls(
        self, limits: bool, sm_clocks: tuple[int, ...], memory_clocks: tuple[int, ...], mig: bool
    ) -> dict[Control, Support]:
        if not self._simulated and not may_set():  # a simulated driver decides for itself who may
            return dict.fromkeys(Control, Support(False, _NO_PERMISSION_TEXT))
        yes = Support(True, "MIG is on: acts on the whole GPU, for all its instances" if mig else "")
        arch = self._architecture
        power = yes if limits else Support(False, "the driver offers no power limit for this GPU")
        if not sm_clocks or arch < _ARCH_VOLTA:
            sm_clock = Support(False, "locked SM clocks need Volta or newer and a table of supported clocks")
        else:
            sm_clock = yes
        if arch < _ARCH_AMPERE or not memory_clocks:
            memory = Support(False, "locked memory clocks need Ampere or newer")
        elif len(memory_clocks) == 1:
            memory = Support(False, f"this GPU has one memory clock ({memory_clocks[0]} MHz): a lock would change nothing")
        else:
            memory = yes
        return {Control.POWER_LIMIT: power, Control.SM_CLOCK: sm_clock, Control.MEMORY_CLOCK: memory}


class NvmlNode:
    """An initialised NVML with all its GPUs."""

    def __init__(self) -> None:
        self._nvml = _import()
        try:
            self._nvml.nvmlInit()
            self._driver_version = str(self._nvml.nvmlSystemGetDriverVersion())
        except self._nvml.NVMLError as error:
            raise device_error("NVML", int(error.value), str(error)) from error
        self._simulated = find_sim_library() is not None
        self._load_id = _load_id(self._driver_version)

    @property
    def driver_version(self) -> str:
        """The loaded driver."""
        return self._driver_version

    @property
    def driver_load_id(self) -> bytes:
        return self._load_id

    def _open(self, index: int) -> NvmlDevice:
        return NvmlDevice(self._nvml, index, self._driver_version, self._simulated)

    def count(self) -> int:
        try:
            return int(self._nvml.nvmlDeviceGetCount())
        except self._nvml.NVMLError as error:
            raise device_error("count GPUs", int(error.value), str(error)) from error

    def devices(self) -> list[NvmlDevice]:
        found = []
        for index in range(self.count()):
            try:
                found.append(self._open(index))
            except DeviceError as error:
                if error.nvml_code in port.DRIVER_GONE:
                    raise
        return found

    def find(self, uuid: str) -> NvmlDevice:
        for index in range(self.count()):
            try:
                handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
                if self._nvml.nvmlDeviceGetUUID(handle) == uuid:
                    return self._open(index)
            except self._nvml.NVMLError as error:
                if error.value in port.DRIVER_GONE:
                    raise device_error(uuid, int(error.value), str(error)) from error
        raise device_error(uuid, port.GPU_IS_LOST, "not among the GPUs that answer")

    def close(self) -> None:
        try:
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError:
            pass  # the driver is gone already: there is nothing left to give back


def open_node() -> NvmlNode:
    """Initialise NVML; DeviceError ``no_driver`` says what is missing."""
    return NvmlNode()
