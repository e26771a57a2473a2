"""Every fault does what its line in the table says, and clearing undoes it."""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from typing import Any

import pynvml as p
import pytest

from powerd.sim.faults import KINDS
from powerd.sim.workload import Context


def code_of(function: Any, *args: Any) -> int:
    try:
        function(*args)
    except p.NVMLError as error:
        raised: Any = error  # pynvml declares no value
        return int(raised.value)
    return 0


def test_a_lost_gpu_answers_15_everywhere_and_raises_xid_79(nvml: Any) -> None:
    node, (gpu, other) = nvml()
    events = p.nvmlEventSetCreate()
    p.nvmlDeviceRegisterEvents(gpu, p.nvmlEventTypeXidCriticalError, events)
    assert code_of(p.nvmlEventSetWait_v2, events, 0) == p.NVML_ERROR_TIMEOUT
    node.fault("lost", 0)
    for call in (
        (p.nvmlDeviceGetPowerUsage, gpu),
        (p.nvmlDeviceGetName, gpu),
        (p.nvmlDeviceSetGpuLockedClocks, gpu, 900, 900),
        (p.nvmlDeviceGetHandleByIndex, 0),
    ):
        assert code_of(*call) == p.NVML_ERROR_GPU_IS_LOST
    assert p.nvmlDeviceGetCount() == 2
    assert p.nvmlDeviceGetPowerUsage(other) > 0
    event = p.nvmlEventSetWait_v2(events, 1000)
    assert (event.eventType, event.eventData) == (p.nvmlEventTypeXidCriticalError, 79)
    p.nvmlEventSetFree(events)
    node.clear_faults()
    assert p.nvmlDeviceGetPowerUsage(gpu) > 0


def in_thread(function: Any, *args: Any) -> tuple[threading.Thread, list[Any]]:
    out: list[Any] = []
    thread = threading.Thread(target=lambda: out.append(function(*args)), daemon=True)
    thread.start()
    return thread, out


def test_a_hung_gpu_hangs_alone(nvml: Any) -> None:
    node, (gpu, other) = nvml(time="real")
    node.fault("hang", 0)
    thread, out = in_thread(p.nvmlDeviceGetPowerUsage, gpu)
    p.nvmlDeviceSetGpuLockedClocks(other, 900, 900)
    assert p.nvmlDeviceGetPowerUsage(other) > 0
    thread.join(0.1)
    assert thread.is_alive()
    node.clear_faults()
    thread.join(20)
    assert out
    assert out[0] > 0


def test_a_hang_in_the_node_lock_stops_sets_but_not_reads(nvml: Any) -> None:
    node, (gpu, other) = nvml(time="real")
    node.fault("hang-node")
    threads = [in_thread(p.nvmlDeviceSetPowerManagementLimit, handle, 300_000)[0] for handle in (gpu, other)]
    assert p.nvmlDeviceGetPowerUsage(gpu) > 0
    assert p.nvmlDeviceGetPowerManagementLimit(other) == 500_000
    threads[0].join(0.1)
    assert all(thread.is_alive() for thread in threads)
    node.clear_faults()
    for thread in threads:
        thread.join(20)
    assert p.nvmlDeviceGetPowerManagementLimit(other) == 300_000


def test_a_frozen_sensor_repeats_itself_while_the_truth_goes_on(nvml: Any) -> None:
    node, (gpu, _) = nvml()
    node.advance(1)

    def read() -> tuple[int, ...]:
        return (
            p.nvmlDeviceGetTotalEnergyConsumption(gpu),
            p.nvmlDeviceGetPowerUsage(gpu),
            p.nvmlDeviceGetClockInfo(gpu, p.NVML_CLOCK_SM),
            p.nvmlDeviceGetTemperature(gpu, 0),
        )

    before, truth = read(), node.true_energy_mj(0)
    node.fault("freeze", 0)
    with Context(0, node=node) as context:
        context.load(1.0, 20.0)
    assert read() == before
    node.clear_faults()
    node.advance(1)
    assert read()[0] - before[0] == pytest.approx(node.true_energy_mj(0) - truth, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "reasons", "share", "field"),
    [("power-brake", 0x88, 0.5, 271), ("hw-thermal", 0x48, 0.5, 270), ("sw-thermal", 0x20, 0.7, 269)],
)
def test_slowdowns_lower_the_clock_and_say_why(nvml: Any, kind: str, reasons: int, share: float, field: int) -> None:
    node, (gpu, _) = nvml()
    with Context(0, node=node) as context:
        fast = context.run([("gemm", 1.0)]).seconds
        node.fault(kind, 0)
        slow = context.run([("gemm", 1.0)]).seconds
        assert p.nvmlDeviceGetCurrentClocksEventReasons(gpu) & 0xE8 == reasons
        clock = p.nvmlDeviceGetClockInfo(gpu, p.NVML_CLOCK_SM)
        assert clock == pytest.approx(share * 1410, abs=15)
        assert slow / fast == pytest.approx(0.05 + 0.95 * 1410 / clock, rel=0.02)
        (value,) = p.nvmlDeviceGetFieldValues(gpu, [field])
        assert value.value.ullVal == pytest.approx(slow * 1e9, rel=0.01)
        node.clear_faults()
        assert context.run([("gemm", 1.0)]).seconds == pytest.approx(fast, rel=0.001)


def test_warm_air_leads_to_a_thermal_slowdown_by_itself(nvml: Any) -> None:
    node, (gpu, _) = nvml()
    node.fault("heat", 0, value=30)
    with Context(0, node=node) as context:
        context.load(1.0, 120.0)
        assert context.load(1.0, 60.0).energy_mj / 60_000 < 470
    assert p.nvmlDeviceGetFieldValues(gpu, [p.NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN])[0].value.ullVal > 0
    assert p.nvmlDeviceGetTemperature(gpu, 0) < 92


def test_an_out_of_band_cap_is_enforced_below_what_was_asked(nvml: Any) -> None:
    node, (gpu, _) = nvml()
    node.fault("oob-cap", 0, value=250_000)
    assert p.nvmlDeviceGetPowerManagementLimit(gpu) == 500_000
    assert p.nvmlDeviceGetEnforcedPowerLimit(gpu) == 250_000
    current, requested = p.nvmlDeviceGetFieldValues(gpu, [190, 192])
    assert (current.value.uiVal, requested.value.uiVal) == (250_000, 500_000)
    with Context(0, node=node) as context:
        context.load(1.0, 2.0)
        assert context.load(1.0, 2.0).energy_mj / 2000 < 250
    node.clear_faults()
    assert p.nvmlDeviceGetEnforcedPowerLimit(gpu) == 500_000


def test_foreign_writers_change_what_was_set(nvml: Any) -> None:
    node, (gpu, _) = nvml("h100-sxm")
    p.nvmlDeviceSetGpuLockedClocks(gpu, 1200, 1200)
    p.nvmlDeviceSetPowerManagementLimit(gpu, 500_000)
    node.fault("foreign-limit", 0, value=350_000)
    node.fault("foreign-lock", 0, value=900)
    node.fault("foreign-memory-lock", 0, value=1593)
    assert p.nvmlDeviceGetPowerManagementLimit(gpu) == 350_000
    node.advance(0.01)
    assert p.nvmlDeviceGetClockInfo(gpu, p.NVML_CLOCK_SM) == 900
    assert p.nvmlDeviceGetClockInfo(gpu, p.NVML_CLOCK_MEM) == 1593
    node.fault("foreign-reset", 0)
    assert p.nvmlDeviceGetPowerManagementLimit(gpu) == 700_000
    assert node.show()["gpus"][0]["locked_clocks_mhz"] is None


def test_an_energy_counter_reset_starts_at_zero_and_counts_on(nvml: Any) -> None:
    node, (gpu, _) = nvml()
    node.advance(10)
    truth = node.true_energy_mj(0)
    node.fault("counter-reset", 0)
    assert p.nvmlDeviceGetTotalEnergyConsumption(gpu) == 0
    node.advance(10)
    counted = p.nvmlDeviceGetTotalEnergyConsumption(gpu)
    assert counted == pytest.approx(node.true_energy_mj(0) - truth, rel=0.02)


def test_xids_are_counted_and_wake_a_waiting_client(nvml: Any) -> None:
    node, (gpu, _) = nvml(time="real")
    events = p.nvmlEventSetCreate()
    p.nvmlDeviceRegisterEvents(gpu, p.nvmlEventTypeXidCriticalError, events)
    thread, out = in_thread(p.nvmlEventSetWait_v2, events, 20_000)
    node.fault("xid", 0, value=48)
    thread.join(20)
    assert out[0].eventData == 48
    assert node.view(0).xid_count == 1
    assert code_of(p.nvmlDeviceRegisterEvents, gpu, p.nvmlEventTypePState, events) == p.NVML_ERROR_NOT_SUPPORTED
    p.nvmlEventSetFree(events)


def test_permission_is_taken_and_given_back(nvml: Any) -> None:
    node, (gpu, _) = nvml()
    node.fault("permission", permission="none")
    assert code_of(p.nvmlDeviceSetPowerManagementLimit, gpu, 300_000) == p.NVML_ERROR_NO_PERMISSION
    node.clear_faults()
    assert code_of(p.nvmlDeviceSetPowerManagementLimit, gpu, 300_000) == 0


def test_a_driver_reload_loses_handles_settings_and_counter_until_init(nvml: Any) -> None:
    node, (gpu, _) = nvml()
    p.nvmlDeviceSetPowerManagementLimit(gpu, 300_000)
    node.fault("driver-reload")
    assert code_of(p.nvmlDeviceGetPowerUsage, gpu) == p.NVML_ERROR_GPU_IS_LOST
    p.nvmlShutdown()
    p.nvmlInit()
    gpu = p.nvmlDeviceGetHandleByIndex(0)
    assert p.nvmlDeviceGetPowerManagementLimit(gpu) == 500_000
    assert p.nvmlDeviceGetTotalEnergyConsumption(gpu) < 1000


def test_after_a_driver_upgrade_a_running_client_must_restart(make_node: Any, spawn: Any) -> None:
    node = make_node()
    code = (
        "print('up', flush=True); sys.stdin.readline(); p.nvmlShutdown()\n"
        "try: p.nvmlInit()\nexcept p.NVMLError as error: print(error.value, flush=True)\n"
    )
    old: subprocess.Popen[str] = spawn(node, code)
    assert old.stdout is not None
    assert old.stdin is not None
    assert old.stdout.readline().strip() == "up"
    node.fault("driver-upgrade", version="590.1")
    old.stdin.write("\n")
    old.stdin.flush()
    assert int(old.stdout.readline()) == p.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    new = spawn(node, "print(p.nvmlSystemGetDriverVersion(), flush=True)\n")
    assert new.stdout.readline().strip() == "590.1"


def test_rules_hit_named_calls_after_n_and_so_often(nvml: Any) -> None:
    node, (gpu, other) = nvml()
    slot = node.fault("rule", 0, function="nvmlDeviceSet*", code=p.NVML_ERROR_UNKNOWN, after=1, count=2)
    codes = [code_of(p.nvmlDeviceSetPowerManagementLimit, gpu, 300_000) for _ in range(5)]
    assert codes == [0, 999, 999, 0, 0]
    assert code_of(p.nvmlDeviceSetPowerManagementLimit, other, 300_000) == 0
    assert node.rule_fired(slot) == 2


def test_rules_hit_with_a_probability(nvml: Any) -> None:
    node, (gpu, _) = nvml()
    node.fault("rule", function="nvmlDeviceGetPowerUsage", code=999, probability=0.3)
    share = statistics.mean(code_of(p.nvmlDeviceGetPowerUsage, gpu) == 999 for _ in range(1000))
    assert 0.25 < share < 0.35
    node.clear_faults()
    assert code_of(p.nvmlDeviceGetPowerUsage, gpu) == 0


def test_rules_delay_calls_in_simulated_time(nvml: Any) -> None:
    node, (gpu, _) = nvml()
    library = node.library
    slot = library.powerd_sim_join(b"caller")
    node.fault("rule", function="nvmlDeviceGetPowerUsage", delay_s=2.5, count=1)
    start = node.now_ns()
    assert p.nvmlDeviceGetPowerUsage(gpu) > 0
    assert node.now_ns() == start + 2_500_000_000
    library.powerd_sim_leave(slot)


def test_setters_take_the_measured_time_one_after_another(nvml: Any) -> None:
    node, handles = nvml(gpus=8, latency=1.0)
    library = node.library
    slot = library.powerd_sim_join(b"caller")
    times = []
    for index in range(1000):
        start = node.now_ns()
        p.nvmlDeviceSetGpuLockedClocks(handles[index % 8], 1200, 1200)
        times.append((node.now_ns() - start) / 1e6)
    library.powerd_sim_leave(slot)
    times.sort()
    assert statistics.median(times) == pytest.approx(4.5, rel=0.06)
    assert times[989] == pytest.approx(13.0, rel=0.25)


def test_latency_is_paid_by_the_thread_that_waits_for_a_participant(nvml: Any) -> None:
    node, (gpu, _) = nvml(latency=1.0)
    library = node.library
    slot = library.powerd_sim_join(b"joined here, lives elsewhere")
    times = []

    def elsewhere() -> None:
        library.powerd_sim_wait(slot, node.now_ns() + 1, -1)
        start = node.now_ns()
        p.nvmlDeviceSetPowerManagementLimit(gpu, 300_000)
        times.append(node.now_ns() - start)

    thread, _ = in_thread(elsewhere)
    thread.join(20)
    start = node.now_ns()
    p.nvmlDeviceSetPowerManagementLimit(gpu, 310_000)
    library.powerd_sim_leave(slot)
    assert times[0] == pytest.approx(5e6, rel=0.5)
    assert node.now_ns() == start


def test_setters_of_a_node_queue_up(nvml: Any) -> None:
    _, handles = nvml(gpus=8, time="x0.5", latency=1.0)
    start = time.monotonic()
    threads = [in_thread(p.nvmlDeviceSetPowerManagementLimit, handle, 300_000)[0] for handle in handles]
    for thread in threads:
        thread.join(20)
    assert time.monotonic() - start > 8 * 0.004 / 0.5


def test_latency_can_be_switched_off_and_multiplied(nvml: Any) -> None:
    node, (gpu, _) = nvml(latency=1.0)
    library = node.library
    slot = library.powerd_sim_join(b"caller")

    def cost() -> int:
        start = node.now_ns()
        p.nvmlDeviceSetPowerManagementLimit(gpu, 300_000)
        return int(node.now_ns() - start)

    assert cost() == pytest.approx(5e6, rel=0.5)
    node.fault("latency", value=10_000)
    assert cost() == pytest.approx(500e6, rel=0.5)
    node.fault("latency", value=0)
    assert cost() == 0
    library.powerd_sim_leave(slot)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"oob-cap", "foreign-limit", "foreign-lock", "foreign-memory-lock"}))
def test_every_kind_can_be_injected_and_cleared(make_node: Any, kind: str) -> None:
    node = make_node()
    node.fault(kind)
    node.clear_faults()
    assert [row["lost"] or row["hung"] or row["frozen"] for row in node.show()["gpus"]] == [0, 0]


def test_wrong_faults_are_refused_with_the_right_names(make_node: Any) -> None:
    node = make_node()
    with pytest.raises(ValueError, match="unknown fault 'explode'; known: lost, hang"):
        node.fault("explode")
    with pytest.raises(ValueError, match="no GPU 9"):
        node.fault("lost", 9)
    with pytest.raises(ValueError, match="oob-cap needs a value"):
        node.fault("oob-cap")
    with pytest.raises(ValueError, match="root, any or none"):
        node.fault("permission", permission="some")
