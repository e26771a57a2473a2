"""The simulated driver is binary-compatible with the Python bindings: structures, symbols, soname."""

from __future__ import annotations

import ctypes
import inspect
import re
import subprocess
from typing import Any

import pynvml
import pytest

from powerd.sim import symbols
from powerd.sim.build import build
from powerd.sim.layout import STRUCTURES, bind

# C structure -> ctypes structure of the bindings. `nvml_process_info_v1` and `nvml_sample` have none that differs.
PAIRS: dict[str, Any] = {
    "nvml_utilization": pynvml.c_nvmlUtilization_t,
    "nvml_memory": pynvml.c_nvmlMemory_t,
    "nvml_memory_v2": pynvml.c_nvmlMemory_v2_t,
    "nvml_bar1_memory": pynvml.c_nvmlBAR1Memory_t,
    "nvml_pci_info": pynvml.nvmlPciInfo_t,
    "nvml_pci_info_v2": pynvml.nvmlPciInfo_v2_t,
    "nvml_pci_info_ext": pynvml.nvmlPciInfoExt_v1_t,
    "nvml_process_info": pynvml.c_nvmlProcessInfo_v2_t,
    "nvml_value": pynvml.c_nvmlValue_t,
    "nvml_field_value": pynvml.c_nvmlFieldValue_t,
    "nvml_power_value_v2": pynvml.c_nvmlPowerValue_v2_t,
    "nvml_process_utilization": pynvml.c_nvmlProcessUtilizationSample_t,
    "nvml_temperature": pynvml.c_nvmlTemperature_v1_t,
    "nvml_margin_temperature": pynvml.c_nvmlMarginTemperature_v1_t,
    "nvml_c2c_mode_info": pynvml.c_nvmlC2cModeInfo_v1_t,
    "nvml_event_data": pynvml.c_nvmlEventData_t,
    "nvml_violation_time": pynvml.c_nvmlViolationTime_t,
    "nvml_gpm_support": pynvml.c_nvmlGpmSupport_t,
}


class Row(ctypes.Structure):
    _fields_ = (
        ("structure", ctypes.c_char_p),
        ("field", ctypes.c_char_p),
        ("offset", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
    )


def c_rows() -> dict[str, dict[str, tuple[int, int]]]:
    library = bind(str(build()))
    library.powerd_sim_abi_row.restype = ctypes.POINTER(Row)
    out: dict[str, dict[str, tuple[int, int]]] = {}
    for index in range(library.powerd_sim_abi_rows()):
        row = library.powerd_sim_abi_row(index).contents
        out.setdefault(row.structure.decode(), {})[row.field.decode()] = (row.offset, row.size)
    return out


def test_every_served_structure_is_compared() -> None:
    assert set(c_rows()) == set(PAIRS)


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_size_and_offset_of_every_field_agree_with_the_bindings(name: str) -> None:
    ours, theirs = c_rows()[name], PAIRS[name]
    expected = {field[0]: (getattr(theirs, field[0]).offset, getattr(theirs, field[0]).size) for field in theirs._fields_}
    assert ours.pop("") == (0, ctypes.sizeof(theirs))
    assert ours == expected


def exported() -> set[str]:
    done = subprocess.run(["nm", "-D", "--defined-only", str(build())], capture_output=True, text=True, check=True)
    return {line.split()[-1] for line in done.stdout.splitlines()}


def test_every_function_that_the_bindings_look_up_is_exported() -> None:
    names = symbols.looked_up(inspect.getsource(pynvml))
    assert len(names) > 300
    assert names - exported() == set()


def test_only_nvml_and_control_functions_are_exported() -> None:
    assert {name for name in exported() if not re.match(r"nvml[A-Z]|powerd_sim_", name)} == set()
    assert "powerd_sim_version" in exported()


def test_soname_is_what_clients_ask_the_loader_for() -> None:
    done = subprocess.run(["readelf", "-d", str(build())], capture_output=True, text=True, check=True)
    assert "Library soname: [libnvidia-ml.so.1]" in done.stdout


def test_structures_shared_with_python_have_the_same_size() -> None:
    library = bind(str(build()))
    sizes = [library.powerd_sim_sizeof(i) for i in range(len(STRUCTURES) + 1)]
    assert sizes == [*(ctypes.sizeof(s) for s in STRUCTURES), 0]
