"""Constants of the GPU models that can be simulated.

House rules: one row per model, every number with its standing (measured, fitted or assumed) in docs/simulation.md;
watts, MHz, seconds and degrees as people read them, converted once in `to_c`; no behaviour here.
"""

from __future__ import annotations

from dataclasses import dataclass

from powerd.sim.layout import Model

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class GpuModel:
    """One GPU model: what its driver reports and the constants of its physics."""

    key: str
    name: str
    architecture: int
    compute_capability: tuple[int, int]
    cores: int
    pci_device_id: int
    clock_min_mhz: int
    clock_max_mhz: int
    idle_clock_mhz: int
    memory_clocks_mhz: tuple[int, ...]
    memory_lock: bool
    limit_min_w: int
    limit_max_w: int
    limit_default_w: int
    memory_bytes: int
    power_usage_is_average: bool
    idle_w: float
    context_idle_w: float
    blocked_w: float
    stress_w: float
    static_w: float
    energy_period_s: float
    sensor_window_s: float = 0.025
    voltage_floor: float = 0.83
    voltage_knee: float = 0.775
    clock_step_mhz: int = 15
    slowdown_c: float = 87.0
    thermal_c_at_limit: float = 68.0
    mig: bool = True
    profile: str | None = None


_A100 = {
    "architecture": 7,
    "compute_capability": (8, 0),
    "cores": 6912,
    "clock_min_mhz": 210,
    "clock_max_mhz": 1410,
    "idle_clock_mhz": 210,
    "power_usage_is_average": False,
    "idle_w": 53.7,
    "context_idle_w": 80.0,
    "energy_period_s": 0.1,
    "memory_lock": False,
}
_HOPPER = {
    "architecture": 9,
    "compute_capability": (9, 0),
    "cores": 16896,
    "clock_min_mhz": 210,
    "clock_max_mhz": 1980,
    "idle_clock_mhz": 345,
    "power_usage_is_average": True,
    "limit_min_w": 200,
    "limit_max_w": 700,
    "limit_default_w": 700,
    "energy_period_s": 0.02,
    "memory_lock": True,
    "stress_w": 690.0,
    "static_w": 72.0,
}
_GPT3_A100 = "stage_profile_gpt3-175b_a100_sxm.csv"
_GPT3_A40 = "stage_profile_gpt3-175b_a40.csv"
_A100_SXM = {  # one board, of which some sites raise the power limit
    **_A100,
    "name": "NVIDIA A100-SXM4-80GB",
    "pci_device_id": 0x20B210DE,
    "memory_clocks_mhz": (1593,),
    "memory_bytes": 80 * GIB,
    "limit_min_w": 100,
    "blocked_w": 90.0,
    "stress_w": 475.0,
    "static_w": 45.0,
    "profile": _GPT3_A100,
}

MODELS: dict[str, GpuModel] = {
    model.key: model
    for model in (
        GpuModel(
            key="h100-sxm",
            name="NVIDIA H100 80GB HBM3",
            pci_device_id=0x233010DE,
            memory_clocks_mhz=(2619, 1593),
            memory_bytes=80 * GIB,
            idle_w=71.8,
            context_idle_w=121.7,
            blocked_w=165.0,
            **_HOPPER,  # type: ignore[arg-type]
        ),
        GpuModel(
            key="h200-sxm",
            name="NVIDIA H200",
            pci_device_id=0x233510DE,
            memory_clocks_mhz=(3201, 1593),
            memory_bytes=141 * GIB,
            idle_w=77.0,
            context_idle_w=125.0,
            blocked_w=170.0,
            **_HOPPER,  # type: ignore[arg-type]
        ),
        GpuModel(
            key="a100-sxm-400w",
            limit_max_w=400,
            limit_default_w=400,
            **_A100_SXM,  # type: ignore[arg-type]
        ),
        GpuModel(
            key="a100-sxm-500w",
            limit_max_w=500,
            limit_default_w=500,
            **_A100_SXM,  # type: ignore[arg-type]
        ),
        GpuModel(
            key="a100-pcie",
            name="NVIDIA A100 80GB PCIe",
            pci_device_id=0x20B510DE,
            memory_clocks_mhz=(1512,),
            memory_bytes=80 * GIB,
            limit_min_w=150,
            limit_max_w=300,
            limit_default_w=300,
            blocked_w=83.6,
            stress_w=450.0,
            static_w=60.0,
            voltage_floor=0.78,
            voltage_knee=0.75,
            **_A100,  # type: ignore[arg-type]
        ),
        GpuModel(
            key="a40",
            name="NVIDIA A40",
            architecture=7,
            compute_capability=(8, 6),
            cores=10752,
            pci_device_id=0x223510DE,
            clock_min_mhz=210,
            clock_max_mhz=1740,
            idle_clock_mhz=210,
            memory_clocks_mhz=(7251, 6501, 810, 405),
            memory_lock=True,
            limit_min_w=100,
            limit_max_w=300,
            limit_default_w=300,
            memory_bytes=48 * GIB,
            power_usage_is_average=True,
            idle_w=22.0,
            context_idle_w=60.0,
            blocked_w=70.4,
            stress_w=380.0,
            static_w=70.0,
            energy_period_s=0.1,
            sensor_window_s=0.1,
            voltage_floor=0.70,
            voltage_knee=0.80,
            mig=False,
            profile=_GPT3_A40,
        ),
    )
}


def find(key: str) -> GpuModel:
    """Return the model named `key`; raises ValueError that lists the known ones."""
    if key not in MODELS:
        raise ValueError(f"unknown GPU model {key!r}; known: {', '.join(MODELS)}")
    return MODELS[key]


def to_c(model: GpuModel) -> Model:
    """Compile a model into the structure that the simulated driver reads."""
    ambient_c = 28.0
    out = Model(
        name=model.name.encode(),
        architecture=model.architecture,
        cc_major=model.compute_capability[0],
        cc_minor=model.compute_capability[1],
        cores=model.cores,
        brand=14,
        pci_device_id=model.pci_device_id,
        pci_subsystem_id=0x10DE10DE,
        clock_min_mhz=model.clock_min_mhz,
        clock_max_mhz=model.clock_max_mhz,
        clock_step_mhz=model.clock_step_mhz,
        idle_clock_mhz=model.idle_clock_mhz,
        memory_clock_count=len(model.memory_clocks_mhz),
        memory_lock_supported=model.memory_lock,
        power_usage_is_average=model.power_usage_is_average,
        limit_min_mw=model.limit_min_w * 1000,
        limit_max_mw=model.limit_max_w * 1000,
        limit_default_mw=model.limit_default_w * 1000,
        fan_supported=0,
        mig_supported=model.mig,
        memory_bytes=model.memory_bytes,
        idle_w=model.idle_w,
        context_idle_w=model.context_idle_w,
        blocked_w=model.blocked_w,
        voltage_floor=model.voltage_floor,
        voltage_knee=model.voltage_knee,
        sensor_period_s=0.1,
        sensor_window_s=model.sensor_window_s,
        energy_period_s=model.energy_period_s,
        sensor_noise=0.004,
        sensor_gain_spread=0.005,
        energy_gain_spread=0.001,
        ambient_c=ambient_c,
        thermal_c_per_w=(model.thermal_c_at_limit - ambient_c) / model.limit_default_w,
        thermal_tau_s=20.0,
        leak_w_per_c=0.002 * model.idle_w,
        slowdown_c=model.slowdown_c,
        shutdown_c=model.slowdown_c + 5.0,
        cap_bind=1.0,
        cap_target=0.955,
        cap_tau_s=0.015,
        cap_tick_s=0.01,
        cap_gain=0.08,
        settle_s=0.0009,
    )
    for index, clock in enumerate(model.memory_clocks_mhz):
        out.memory_clock_mhz[index] = clock
    return out
