"""dcgm-exporter's names: its units and labels, and nothing of a GPU that does not answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from powerd.clock import NS
from powerd.model import Capabilities, Control, Gpu, Health, Reading, Snapshot, Support
from powerd.sinks import dcgm

A, B = (f"GPU-00000000-0000-0000-0000-00000000000{n}" for n in (1, 2))
FULL = Reading(
    A, NS, Health.UP, 3, 5_000_123, NS, 250_500, 251_000, 1200, 1593, 61, 97, 2 << 30, 80 << 30, 400_000, 390_000, 0x24
)  # fmt: skip


def known(uuid: str, index: int, name: str = "NVIDIA A100-SXM4-80GB", minor: int | None = 4) -> Capabilities:
    gpu = Gpu(uuid, index, name, f"00000000:0{index}:00.0", minor)
    controls = dict.fromkeys(Control, Support(True))
    return Capabilities(gpu, "580.65", 100_000, 500_000, 450_000, (210, 1410), (1593,), True, True, False, True, controls)


def samples(text: str) -> dict[tuple[str, str], float]:
    """(name, UUID) -> value, through Prometheus's own parser, which adds ``_total`` to counters that have it not."""
    return {(s.name.removesuffix("_total"), s.labels["UUID"]): s.value for family in parse(text) for s in family.samples}


def test_values_come_in_dcgm_s_units() -> None:
    text = dcgm.page(Snapshot(1, NS, NS, (FULL,)), {A: known(A, 0)}, "node1")
    assert {name.removeprefix("DCGM_FI_DEV_"): value for (name, _), value in samples(text).items()} == {
        "SM_CLOCK": 1200, "MEM_CLOCK": 1593, "GPU_TEMP": 61, "POWER_USAGE": 250.5, "TOTAL_ENERGY_CONSUMPTION": 5_000_123,
        "GPU_UTIL": 97, "FB_FREE": 78 * 1024, "FB_USED": 2048, "POWER_MGMT_LIMIT": 400, "ENFORCED_POWER_LIMIT": 390,
        "CLOCK_THROTTLE_REASONS": 0x24,
    }  # fmt: skip
    assert "# TYPE DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION counter\nDCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{gpu=" in text


def test_labels_are_dcgm_s_and_are_escaped() -> None:
    text = dcgm.page(Snapshot(1, NS, NS, (FULL,)), {A: known(A, 3, 'odd "name"\\')}, "node1")
    (family,) = (f for f in parse(text) if f.name == "DCGM_FI_DEV_SM_CLOCK")
    assert family.samples[0].labels == {
        "gpu": "3", "UUID": A, "pci_bus_id": "00000000:03:00.0", "device": "nvidia4", "modelName": 'odd "name"\\',
        "Hostname": "node1", "DCGM_FI_DRIVER_VERSION": "580.65",
    }  # fmt: skip


@pytest.mark.parametrize("health", [Health.LOST, Health.WEDGED])
def test_a_gpu_that_does_not_answer_and_a_value_that_is_not_known_are_absent(health: Health) -> None:
    bare = replace(FULL, temperature_c=None, memory_used_bytes=None)
    text = dcgm.page(Snapshot(1, NS, NS, (bare, Reading(B, NS, health, 1, 7))), {A: known(A, 0), B: known(B, 1)}, "n")
    names = {name for name, _ in samples(text)}
    assert {uuid for _, uuid in samples(text)} == {A}
    assert names.isdisjoint({"DCGM_FI_DEV_GPU_TEMP", "DCGM_FI_DEV_FB_USED", "DCGM_FI_DEV_FB_FREE"})
    assert "DCGM_FI_DEV_SM_CLOCK" in names


def test_before_the_first_sample_the_page_is_empty() -> None:
    assert dcgm.page(None, {A: known(A, 0)}, "n") == ""
