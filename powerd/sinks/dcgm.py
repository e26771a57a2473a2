"""The same GPUs as NVIDIA's dcgm-exporter names them, for dashboards and alerts that exist already.

House rules: names, labels and units are dcgm-exporter's, not ours; only what powerd reads is served, unknown is an absent series;
a GPU that does not answer has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from powerd.model import Capabilities, Health, Reading, Snapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Field:
    """One row of the page; ``read`` answers the value in dcgm-exporter's unit, None when it is not known."""

    name: str
    kind: str  # gauge, counter
    unit: str
    help: str
    read: Callable[[Reading], int | float | None]


def _scaled(value: int | None, divisor: int) -> float | None:
    return None if value is None else value / divisor


def _free_mib(reading: Reading) -> int | None:
    if reading.memory_total_bytes is None or reading.memory_used_bytes is None:
        return None
    return (reading.memory_total_bytes - reading.memory_used_bytes) // _MIB


FIELDS: tuple[Field, ...] = (
    Field("DCGM_FI_DEV_SM_CLOCK", "gauge", "MHz", "SM clock frequency (in MHz).", lambda r: r.sm_clock_mhz),
    Field("DCGM_FI_DEV_MEM_CLOCK", "gauge", "MHz", "Memory clock frequency (in MHz).", lambda r: r.memory_clock_mhz),
    Field("DCGM_FI_DEV_GPU_TEMP", "gauge", "C", "GPU temperature (in C).", lambda r: r.temperature_c),
    Field("DCGM_FI_DEV_POWER_USAGE", "gauge", "W", "Power draw (in W).", lambda r: _scaled(r.power_mw, 1000)),
    Field("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", "counter", "mJ", "Total energy consumption since boot (in mJ).",
          lambda r: r.energy_mj),
    Field("DCGM_FI_DEV_GPU_UTIL", "gauge", "%", "GPU utilization (in %).", lambda r: r.utilization_percent),
    Field("DCGM_FI_DEV_FB_FREE", "gauge", "MiB", "Framebuffer memory free (in MiB).", _free_mib),
    Field("DCGM_FI_DEV_FB_USED", "gauge", "MiB", "Framebuffer memory used (in MiB).",
          lambda r: None if r.memory_used_bytes is None else r.memory_used_bytes // _MIB),
    Field("DCGM_FI_DEV_POWER_MGMT_LIMIT", "gauge", "W", "Power limit as requested (in W).",
          lambda r: _scaled(r.power_limit_requested_mw, 1000)),
    Field("DCGM_FI_DEV_ENFORCED_POWER_LIMIT", "gauge", "W", "Power limit that the driver enforces (in W).",
          lambda r: _scaled(r.power_limit_enforced_mw, 1000)),
    Field("DCGM_FI_DEV_CLOCK_THROTTLE_REASONS", "gauge", "bits", "Clock event reasons as NVML's bit mask.",
          lambda r: r.clock_event_reasons),
)  # fmt: skip

LABELS = ("gpu", "UUID", "pci_bus_id", "device", "modelName", "Hostname", "DCGM_FI_DRIVER_VERSION")


def _labels(known: Capabilities, hostname: str) -> str:
    gpu = known.gpu
    device = "" if gpu.minor_number is None else f"nvidia{gpu.minor_number}"
    values = (str(gpu.index), gpu.uuid, gpu.pci_bus_id, device, gpu.name, hostname, known.driver_version)
    escaped = (value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for value in values)
    return ",".join(f'{name}="{value}"' for name, value in zip(LABELS, escaped, strict=True))


def page(snapshot: Snapshot | None, gpus: Mapping[str, Capabilities], hostname: str) -> str:
    """The page as Prometheus text; a GPU whose identity is not known yet is left out."""
    readings = [] if snapshot is None else [r for r in snapshot.readings if r.health in (Health.UP, Health.SUSPECT)]
    rows = [(_labels(gpus[r.uuid], hostname), r) for r in readings if r.uuid in gpus]
    lines: list[str] = []
    for field in FIELDS:
        values = [(labels, value) for labels, reading in rows if (value := field.read(reading)) is not None]
        if values:
            lines += [f"# HELP {field.name} {field.help}", f"# TYPE {field.name} {field.kind}"]
            lines += [f"{field.name}{{{labels}}} {value:.3f}" if isinstance(value, float) else
                      f"{field.name}{{{labels}}} {value}" for labels, value in values]  # fmt: skip
    return "\n".join(lines) + "\n" if lines else ""


def documentation() -> list[str]:
    """The page's section in docs/metrics.md, line by line."""
    lines = [
        "## dcgm-exporter's names",
        "",
        "With `dcgm = true` in `[metrics]`, `GET /metrics/dcgm` serves what powerd reads under the names, labels and units of",
        "NVIDIA's dcgm-exporter. Its other fields (memory temperature, encoder, PCIe, NVLink, XID errors) powerd does not read;",
        "they are absent. Energy is the driver's own counter and begins anew when the driver is loaded.",
        "",
        f"Labels: {', '.join(f'`{label}`' for label in LABELS)}.",
        "",
        "| name | type | unit | what |",
        "|---|---|---|---|",
    ]
    return [*lines, *(f"| `{f.name}` | {f.kind} | {f.unit} | {f.help} |" for f in FIELDS)]
