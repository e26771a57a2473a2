"""Settings, ranges, error codes and lists behave as NVML's documentation says."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import pynvml as p
import pytest

from powerd.sim.models import MODELS
from powerd.sim.workload import Context

TDP, UNLIMITED = p.NVML_CLOCK_LIMIT_ID_TDP, p.NVML_CLOCK_LIMIT_ID_UNLIMITED


def code_of(function: Any, *args: Any) -> int:
    try:
        function(*args)
    except p.NVMLError as error:
        raised: Any = error  # pynvml declares no value
        return int(raised.value)
    return 0


@pytest.mark.parametrize("model", sorted(MODELS))
def test_each_model_reports_its_own_constants(nvml: Any, model: str) -> None:
    _, (gpu, _) = nvml(model)
    constants = MODELS[model]
    assert p.nvmlDeviceGetName(gpu) == constants.name
    low, high = p.nvmlDeviceGetPowerManagementLimitConstraints(gpu)
    assert (low, high) == (constants.limit_min_w * 1000, constants.limit_max_w * 1000)
    assert p.nvmlDeviceGetPowerManagementLimit(gpu) == constants.limit_default_w * 1000
    memory = p.nvmlDeviceGetSupportedMemoryClocks(gpu)
    clocks = p.nvmlDeviceGetSupportedGraphicsClocks(gpu, memory[0])
    assert clocks[0] == constants.clock_max_mhz
    assert clocks[-1] == constants.clock_min_mhz
    assert {a - b for a, b in itertools.pairwise(clocks)} == {15}
    assert p.nvmlDeviceGetMemoryInfo(gpu).total == constants.memory_bytes


def test_power_limit_is_refused_outside_its_range_and_read_back_inside(nvml: Any) -> None:
    _, (gpu, _) = nvml("h100-sxm")
    for wrong in (199_999, 700_001, 0):
        assert code_of(p.nvmlDeviceSetPowerManagementLimit, gpu, wrong) == p.NVML_ERROR_INVALID_ARGUMENT
    assert p.nvmlDeviceGetPowerManagementLimit(gpu) == 700_000
    p.nvmlDeviceSetPowerManagementLimit(gpu, 400_000)
    assert p.nvmlDeviceGetPowerManagementLimit(gpu) == p.nvmlDeviceGetEnforcedPowerLimit(gpu) == 400_000
    fields = p.nvmlDeviceGetFieldValues(gpu, [p.NVML_FI_DEV_POWER_CURRENT_LIMIT, p.NVML_FI_DEV_POWER_REQUESTED_LIMIT])
    assert [f.value.uiVal for f in fields] == [400_000, 400_000]


def test_bindings_hide_the_error_of_the_v2_limit_setter(nvml: Any) -> None:
    # The reason why powerd uses the v1 setter and reads back: pynvml drops this function's return code.
    node, (gpu, _) = nvml("h100-sxm")
    p.nvmlDeviceSetPowerManagementLimit_v2(gpu, p.NVML_POWER_SCOPE_GPU, 900_000)
    assert p.nvmlDeviceGetPowerManagementLimit(gpu) == 700_000
    p.nvmlDeviceSetPowerManagementLimit_v2(gpu, p.NVML_POWER_SCOPE_GPU, 500_000)
    assert p.nvmlDeviceGetPowerManagementLimit(gpu) == 500_000
    value = p.c_nvmlPowerValue_v2_t()
    value.version, value.powerValueMw = 1, 400_000
    setter = node.library.nvmlDeviceSetPowerManagementLimit_v2
    assert setter(gpu, ctypes.byref(value)) == p.NVML_ERROR_ARGUMENT_VERSION_MISMATCH
    value.version, value.powerScope = p.nvmlPowerValue_v2, p.NVML_POWER_SCOPE_MEMORY
    assert setter(gpu, ctypes.byref(value)) == p.NVML_ERROR_NOT_SUPPORTED


def test_locked_clocks_are_a_range_snapped_to_the_table(nvml: Any) -> None:
    node, (gpu, _) = nvml()
    assert code_of(p.nvmlDeviceSetGpuLockedClocks, gpu, 1200, 1100) == p.NVML_ERROR_INVALID_ARGUMENT
    p.nvmlDeviceSetGpuLockedClocks(gpu, 1000, 1207)
    assert node.show()["gpus"][0]["locked_clocks_mhz"] == [1005, 1200]
    p.nvmlDeviceSetGpuLockedClocks(gpu, 100, 9999)
    assert node.show()["gpus"][0]["locked_clocks_mhz"] == [210, 1410]
    p.nvmlDeviceResetGpuLockedClocks(gpu)
    assert node.show()["gpus"][0]["locked_clocks_mhz"] is None


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (TDP, TDP, [1410, 1410]),
        (UNLIMITED, TDP, [210, 1410]),
        (TDP, UNLIMITED, [1410, 1410]),
        (UNLIMITED, UNLIMITED, None),
    ],
)
def test_symbolic_locks_resolve(nvml: Any, low: int, high: int, expected: list[int] | None) -> None:
    node, (gpu, _) = nvml()
    p.nvmlDeviceSetGpuLockedClocks(gpu, 600, 600)
    p.nvmlDeviceSetGpuLockedClocks(gpu, low, high)
    assert node.show()["gpus"][0]["locked_clocks_mhz"] == expected


@pytest.mark.parametrize(("low", "high"), [(600, TDP), (UNLIMITED, 600), (0xFFFFFF03, 0xFFFFFF03)])
def test_mixed_or_unknown_symbols_are_refused(nvml: Any, low: int, high: int) -> None:
    _, (gpu, _) = nvml()
    assert code_of(p.nvmlDeviceSetGpuLockedClocks, gpu, low, high) == p.NVML_ERROR_INVALID_ARGUMENT


def test_a_lock_acts_a_settle_time_after_the_call_and_raises_an_idle_clock(nvml: Any) -> None:
    node, (gpu, _) = nvml()
    assert p.nvmlDeviceGetClockInfo(gpu, p.NVML_CLOCK_SM) == 210
    idle_w = node.view(0).power_w
    p.nvmlDeviceSetGpuLockedClocks(gpu, 1200, 1200)
    node.advance(0.0005)
    assert p.nvmlDeviceGetClockInfo(gpu, p.NVML_CLOCK_SM) == 210
    node.advance(0.0006)
    assert p.nvmlDeviceGetClockInfo(gpu, p.NVML_CLOCK_SM) == 1200
    assert node.view(0).power_w > idle_w + 10


def test_memory_lock_slows_memory_bound_work_where_the_board_has_one(nvml: Any) -> None:
    node, (gpu, _) = nvml("h100-sxm")
    with Context(0, node=node) as context:
        before = context.run([("decode", 1.0)]).seconds
        p.nvmlDeviceSetMemoryLockedClocks(gpu, 1593, 1593)
        assert p.nvmlDeviceGetClockInfo(gpu, p.NVML_CLOCK_MEM) == 1593
        assert context.run([("decode", 1.0)]).seconds > 1.2 * before
        p.nvmlDeviceResetMemoryLockedClocks(gpu)
        assert p.nvmlDeviceGetClockInfo(gpu, p.NVML_CLOCK_MEM) == 2619


def test_memory_lock_is_not_supported_on_a100(nvml: Any) -> None:
    _, (gpu, _) = nvml("a100-pcie")
    assert code_of(p.nvmlDeviceSetMemoryLockedClocks, gpu, 1512, 1512) == p.NVML_ERROR_NOT_SUPPORTED


def test_unknown_memory_clock_bad_handle_and_short_buffers(nvml: Any) -> None:
    node, (gpu, _) = nvml()
    assert code_of(p.nvmlDeviceGetSupportedGraphicsClocks, gpu, 1234) == p.NVML_ERROR_NOT_FOUND
    assert code_of(p.nvmlDeviceGetHandleByIndex, 2) == p.NVML_ERROR_INVALID_ARGUMENT
    assert code_of(p.nvmlDeviceGetHandleByUUID, b"GPU-00000000-0000-0000-0000-000000000000") == p.NVML_ERROR_NOT_FOUND
    assert code_of(p.nvmlDeviceGetPowerUsage, ctypes.c_void_p(5)) == p.NVML_ERROR_INVALID_ARGUMENT
    short = ctypes.create_string_buffer(4)
    assert node.library.nvmlDeviceGetName(gpu, short, 4) == p.NVML_ERROR_INSUFFICIENT_SIZE
    uuid = p.nvmlDeviceGetUUID(gpu)
    assert p.nvmlDeviceGetIndex(p.nvmlDeviceGetHandleByUUID(uuid.encode())) == 0
    pci = p.nvmlDeviceGetPciInfo(gpu)
    assert p.nvmlDeviceGetIndex(p.nvmlDeviceGetHandleByPciBusId(pci.busId)) == 0


def test_init_is_counted_and_nothing_works_after_the_last_shutdown(nvml: Any) -> None:
    _, (gpu, _) = nvml()
    p.nvmlInit()
    p.nvmlShutdown()
    assert p.nvmlDeviceGetPowerUsage(gpu) > 0
    p.nvmlShutdown()
    assert code_of(p.nvmlDeviceGetPowerUsage, gpu) == p.NVML_ERROR_UNINITIALIZED
    p.nvmlInit()


@pytest.mark.parametrize(("perm", "expected"), [("none", p.NVML_ERROR_NO_PERMISSION), ("any", 0)])
def test_permission_does_not_depend_on_the_user_unless_told(nvml: Any, perm: str, expected: int) -> None:
    node, (gpu, _) = nvml(perm=perm)
    for call in (
        (p.nvmlDeviceSetPowerManagementLimit, gpu, 300_000),
        (p.nvmlDeviceSetGpuLockedClocks, gpu, 1200, 1200),
        (p.nvmlDeviceResetGpuLockedClocks, gpu),
        (p.nvmlDeviceSetPersistenceMode, gpu, 1),
    ):
        assert code_of(*call) == expected
    assert p.nvmlDeviceGetPowerUsage(gpu) > 0
    assert (node.show()["gpus"][0]["limit_mw"] == 300_000) == (expected == 0)


def test_supported_range_and_lost_come_before_permission(nvml: Any) -> None:
    node, (gpu, _) = nvml("a100-pcie", perm="none")
    assert code_of(p.nvmlDeviceSetMemoryLockedClocks, gpu, 1512, 1512) == p.NVML_ERROR_NOT_SUPPORTED
    assert code_of(p.nvmlDeviceSetPowerManagementLimit, gpu, 1) == p.NVML_ERROR_NO_PERMISSION
    node.fault("lost", 0)
    assert code_of(p.nvmlDeviceSetMemoryLockedClocks, gpu, 1512, 1512) == p.NVML_ERROR_GPU_IS_LOST


def test_fields_carry_their_own_return_codes(nvml: Any) -> None:
    node, (gpu, _) = nvml()
    node.advance(1)
    energy, unknown, module = p.nvmlDeviceGetFieldValues(gpu, [83, 4000, (186, p.NVML_POWER_SCOPE_MODULE)])
    assert energy.nvmlReturn == 0
    assert energy.value.ullVal == p.nvmlDeviceGetTotalEnergyConsumption(gpu)
    assert unknown.nvmlReturn == module.nvmlReturn == p.NVML_ERROR_NOT_SUPPORTED


def test_newer_functions_exist_and_are_not_supported(nvml: Any) -> None:
    _, (gpu, _) = nvml()
    assert code_of(p.nvmlDeviceGetFanSpeed, gpu) == p.NVML_ERROR_NOT_SUPPORTED
    assert code_of(p.nvmlDeviceGetNvLinkState, gpu, 0) == p.NVML_ERROR_NOT_SUPPORTED
    assert code_of(p.nvmlDeviceGetC2cModeInfoV, gpu) == p.NVML_ERROR_NOT_SUPPORTED


def test_mig_mode_hides_utilisation_and_is_refused_while_in_use(nvml: Any) -> None:
    node, (gpu, _) = nvml()
    status = ctypes.c_uint()
    with Context(0, node=node):
        node.library.nvmlDeviceSetMigMode(gpu, 1, ctypes.byref(status))
        assert status.value == p.NVML_ERROR_IN_USE
    node.library.nvmlDeviceSetMigMode(gpu, 1, ctypes.byref(status))
    assert p.nvmlDeviceGetMigMode(gpu) == [1, 1]
    assert code_of(p.nvmlDeviceGetUtilizationRates, gpu) == p.NVML_ERROR_NOT_SUPPORTED
    assert p.nvmlDeviceGetPowerUsage(gpu) > 0
