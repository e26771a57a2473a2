"""Power, caps, heat and sensors: what readings promise about the truth."""

from __future__ import annotations

import itertools
import random
import statistics
from typing import Any

import pynvml as p
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powerd.sim import node as nodes
from powerd.sim.build import build
from powerd.sim.calibration import choose, interpolate, left_out_errors, load_profile
from powerd.sim.kernels import compile_kernel, node_curves, profile_path
from powerd.sim.layout import bind
from powerd.sim.models import MODELS
from powerd.sim.workload import Context

A100 = "stage_profile_gpt3-175b_a100_sxm.csv"
A40 = "stage_profile_gpt3-175b_a40.csv"


@pytest.mark.parametrize("profile", [A100, A40])
def test_clocks_left_out_of_the_table_are_within_three_per_cent(profile: str) -> None:
    curves = load_profile(profile_path(profile))
    assert len(curves) == 16
    for curve in curves.values():
        errors = left_out_errors(curve)
        assert errors.clocks >= 18
        assert errors.time_max < 0.03
        assert errors.energy_max < 0.03


def test_profile_rows_are_a_tenth_of_the_true_instruction() -> None:
    point = load_profile(profile_path(A100))[0, "forward"][-1]
    assert (point.clock_mhz, round(point.time_s, 5), round(point.power_w, 2)) == (1410.0, 0.50162, 474.57)


def test_driver_and_python_read_a_kernel_alike() -> None:
    library = bind(str(build()))
    curve, share = node_curves(MODELS["a40"])["gpt3-175b/7/backward"]
    kernel = compile_kernel("k", curve, share)
    for clock in (210.0, 333.3, 855.0, 862.5, 1199.0, 1740.0):
        point = interpolate(curve, clock)
        assert library.powerd_sim_kernel_rate(kernel, clock) == pytest.approx(1 / point.time_s)
        assert library.powerd_sim_kernel_power(kernel, clock) == pytest.approx(point.power_w)


@pytest.mark.parametrize("model", sorted(MODELS))
def test_every_kernel_is_slower_and_draws_less_at_a_lower_clock(model: str) -> None:
    constants = MODELS[model]
    for name, (curve, _) in node_curves(constants).items():
        assert curve[0].clock_mhz == constants.clock_min_mhz
        assert curve[-1].clock_mhz == constants.clock_max_mhz
        low, middle, high = curve[0], interpolate(curve, 0.7 * constants.clock_max_mhz), curve[-1]
        assert low.time_s > middle.time_s > high.time_s, name
        assert constants.idle_w < low.power_w < middle.power_w < high.power_w, name


def test_an_explicit_list_of_clocks_is_what_the_table_knows() -> None:
    curve = load_profile(profile_path(A100))[0, "forward"]
    assert [point.clock_mhz for point in choose(curve, [855, 1110, 1410])] == [855.0, 1110.0, 1410.0]
    with pytest.raises(ValueError, match="fewer than two"):
        choose(curve, [855])


@pytest.mark.parametrize(("model", "limit_w"), [("a100-sxm-500w", 300), ("h100-sxm", 400), ("a40", 200)])
def test_a_binding_cap_overshoots_briefly_and_settles_below_the_limit(nvml: Any, model: str, limit_w: int) -> None:
    node, (gpu, _) = nvml(model)
    p.nvmlDeviceSetPowerManagementLimit(gpu, limit_w * 1000)
    with Context(0, node=node) as context:
        context.load(1.0, 0.01)
        assert node.view(0).power_w > 1.1 * limit_w
        first = context.load(1.0, 0.2)
        assert first.energy_mj / 200 > 0.95 * limit_w  # W over the first window
        context.load(1.0, 2.0)
        steady = context.load(1.0, 5.0)
        assert 0.92 * limit_w <= steady.energy_mj / 5000 <= 0.97 * limit_w
        assert node.view(0).capped


def test_the_cap_lowers_the_clock_below_a_lock_says_why_and_lets_go(nvml: Any, participant: Any) -> None:
    node, (gpu, _) = nvml()
    p.nvmlDeviceSetGpuLockedClocks(gpu, 1410, 1410)
    p.nvmlDeviceSetPowerManagementLimit(gpu, 250_000)
    seen: list[tuple[int, int]] = []

    def look() -> None:
        seen.append((p.nvmlDeviceGetClockInfo(gpu, p.NVML_CLOCK_SM), p.nvmlDeviceGetCurrentClocksEventReasons(gpu)))

    library = node.library
    slot = library.powerd_sim_join(b"looker")
    with Context(0, node=node) as context:
        start = node.now_ns()
        worker, _ = participant(node, lambda: context.load(1.0, 10.0))
        library.powerd_sim_wait(slot, start + 3_000_000_000, -1)
        look()
        p.nvmlDeviceSetPowerManagementLimit(gpu, 500_000)
        library.powerd_sim_wait(slot, start + 6_000_000_000, -1)
        look()
        library.powerd_sim_leave(slot)
        worker.join(30)
    (capped_mhz, capped_reasons), (free_mhz, free_reasons) = seen
    assert capped_mhz < 1100
    assert capped_reasons & p.nvmlClocksEventReasonSwPowerCap
    assert free_mhz == 1410
    assert not free_reasons & p.nvmlClocksEventReasonSwPowerCap
    (field,) = p.nvmlDeviceGetFieldValues(gpu, [p.NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_POWER_CAP])
    assert 2.8e9 < field.value.ullVal < 3.5e9


def test_idle_costs_more_with_a_context_and_most_at_a_high_clock(make_node: Any) -> None:
    node = make_node("h100-sxm")
    node.advance(60)
    bare = node.view(0).power_w
    with Context(0, node=node):
        node.advance(60)
        parked = node.view(0).power_w
        node.library.powerd_sim_set_lock(node.pointer, 0, 345, 345)
        node.advance(60)
        slow = node.view(0).power_w
    assert bare == pytest.approx(71.8, abs=1)
    assert parked == pytest.approx(121.7, abs=1)
    assert bare < slow < parked - 15


def test_waiting_for_others_draws_blocking_power(make_node: Any) -> None:
    node = make_node("a100-pcie")
    with Context(0, node=node) as context:
        context.blocked(60.0)
        done = context.blocked(10.0)
    assert done.energy_mj / 10_000 == pytest.approx(83.6, rel=0.02)


def test_a_wait_of_unknown_length_draws_blocking_power_until_work_or_rest(make_node: Any) -> None:
    node = make_node("a100-pcie")
    with Context(0, node=node) as context:
        context.blocked(60.0)  # warm
        context.block()
        before_mj = node.true_energy_mj(0)
        node.advance(10.0)
        assert (node.true_energy_mj(0) - before_mj) / 10_000 == pytest.approx(83.6, rel=0.02)
        assert context.run([("decode", 1.0)]).seconds == pytest.approx(1.0, rel=0.01), "work begins at once"
        context.block()
        context.rest()
        node.advance(60.0)
        before_mj = node.true_energy_mj(0)
        node.advance(10.0)
        assert (node.true_energy_mj(0) - before_mj) / 10_000 == pytest.approx(80.0, rel=0.02), "a context that does nothing"


def test_heat_follows_power_with_a_time_constant_and_leaks(make_node: Any) -> None:
    node = make_node()
    start = node.view(0).temperature_c
    with Context(0, node=node) as context:
        cold = context.load(1.0, 1.0).energy_mj
        early = node.view(0).temperature_c
        context.load(1.0, 120.0)
        hot = context.load(1.0, 1.0).energy_mj
        late = node.view(0).temperature_c
    assert start < early < start + 5
    assert late > start + 25
    assert 1.002 < hot / cold < 1.02


def test_energy_counter_is_within_two_per_mille_of_the_truth(nvml: Any) -> None:
    node, handles = nvml(gpus=8)
    before = [(p.nvmlDeviceGetTotalEnergyConsumption(h), node.true_energy_mj(i)) for i, h in enumerate(handles)]
    for index in range(8):
        with Context(index, node=node) as context:
            context.load(0.1 + 0.1 * index, 60.0)
    ratios = []
    for index, handle in enumerate(handles):
        counted = p.nvmlDeviceGetTotalEnergyConsumption(handle) - before[index][0]
        ratios.append(counted / (node.true_energy_mj(index) - before[index][1]))
    assert all(abs(ratio - 1) < 0.002 for ratio in ratios)
    assert len(set(ratios)) == 8


@pytest.mark.parametrize(("model", "period_ms"), [("h100-sxm", 20), ("a100-sxm-500w", 100)])
def test_sensors_hold_their_value_between_refreshes_and_fluctuate(nvml: Any, model: str, period_ms: int) -> None:
    node, (gpu, _) = nvml(model)
    energy, power = [], []
    for _ in range(400):
        node.advance(0.005)
        energy.append(p.nvmlDeviceGetTotalEnergyConsumption(gpu))
        power.append(p.nvmlDeviceGetPowerUsage(gpu))
    steps = sum(a != b for a, b in itertools.pairwise(energy))
    assert steps == pytest.approx(2000 / period_ms, abs=1)
    changes = sum(a != b for a, b in itertools.pairwise(power))
    assert changes == pytest.approx(20, abs=1)  # every 100 ms, never two equal neighbours


def test_a_short_burst_outside_the_sampled_quarter_is_invisible_to_a100_power_but_not_to_energy(nvml: Any) -> None:
    node, (gpu, _) = nvml(seed=4)
    with Context(0, node=node) as context:
        shown, counted = set(), p.nvmlDeviceGetTotalEnergyConsumption(gpu)
        rng = random.Random(1)
        for _ in range(60):
            context.load(1.0, 0.02)
            node.advance(0.08 + rng.uniform(-0.002, 0.002))
            shown.add(p.nvmlDeviceGetPowerUsage(gpu))
        node.advance(0.2)
        counted = p.nvmlDeviceGetTotalEnergyConsumption(gpu) - counted
    mean_w = counted / 1000 / (60 * 0.1 + 0.2)
    errors = [abs(value / 1000 / mean_w - 1) for value in shown]
    assert statistics.mean(errors) > 0.15


def test_average_power_lags_instant_power_by_up_to_a_second(nvml: Any) -> None:
    node, (gpu, _) = nvml("h100-sxm")
    fields = [p.NVML_FI_DEV_POWER_AVERAGE, p.NVML_FI_DEV_POWER_INSTANT]
    with Context(0, node=node) as context:
        context.load(1.0, 0.31)
        average, instant = (f.value.uiVal for f in p.nvmlDeviceGetFieldValues(gpu, fields))
        assert average < 0.6 * instant
        context.load(1.0, 1.2)
        average, instant = (f.value.uiVal for f in p.nvmlDeviceGetFieldValues(gpu, fields))
        assert average == pytest.approx(instant, rel=0.03)


def test_an_hour_unwatched_counts_like_an_hour_watched(make_node: Any) -> None:
    watched, unwatched = make_node(), make_node()
    for _ in range(3600):
        watched.advance(1)
        watched.true_energy_mj(0)
    unwatched.advance(3600)
    assert unwatched.true_energy_mj(0) == pytest.approx(watched.true_energy_mj(0), rel=0.001)
    assert unwatched.view(0).counter_mj == pytest.approx(watched.view(0).counter_mj, rel=0.001)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.0001, 0.4), min_size=1, max_size=20), st.sampled_from([150_000, 260_000, 500_000]))
def test_what_happens_does_not_depend_on_who_looks_when(looks: list[float], limit_mw: int) -> None:
    energies, ends = [], []
    for naps in ([10.0], [*looks, 10.0 - sum(looks)]):
        with nodes.create("a100-sxm-500w", 1, "stepped", latency=0) as node, Context(0, node=node) as context:
            node.fault("foreign-limit", value=limit_mw)
            for nap in naps:
                context.load(0.9, nap)
                node.view(0)
            energies.append(node.true_energy_mj(0))
            ends.append(context.run([("gemm", 3.0)]).seconds)
    assert energies[0] == pytest.approx(energies[1], rel=2e-3)
    assert ends[0] == pytest.approx(ends[1], rel=2e-3)
