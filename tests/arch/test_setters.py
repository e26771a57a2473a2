"""Only the actuator changes a GPU: NVML's setters are wrapped in one module and called from one other."""

from __future__ import annotations

import ast
import re

import pytest

from tests.arch import source_tree as tree

WRAPPER = "powerd.hw.nvml"
CALLER = "powerd.hw.actuator"
NVML_SETTER = re.compile(r"nvmlDevice(Set|Reset)\w+|nvml\w*(Set|Reset)\w*(Clocks?|Limit)\w*")


def names_used(source: str) -> dict[str, int]:
    """Identifier -> first line at which it is used, as a name or as an attribute."""
    used: dict[str, int] = {}
    for node in ast.walk(ast.parse(source)):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None
        if name is not None:
            used.setdefault(name, getattr(node, "lineno", 0))
    return used


def knobs(source: str) -> set[str]:
    """The methods of the port's `Knobs`: every one of them changes a GPU."""
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Knobs"]
    return {item.name for node in classes for item in node.body if isinstance(item, ast.FunctionDef)}


def called(source: str) -> dict[str, int]:
    """Method name -> first line at which it is called or taken from an object."""
    return {
        node.attr: node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Store)
    }


def test_nvml_setters_are_named_in_one_module() -> None:
    found = [
        f"{module}:{line} uses {name}"
        for module, path in tree.modules().items()
        if module != WRAPPER
        for name, line in names_used(path.read_text(encoding="utf-8")).items()
        if NVML_SETTER.fullmatch(name)
    ]
    assert found == []


def test_only_the_actuator_turns_a_knob() -> None:
    port = tree.modules().get("powerd.hw.port")
    turns = knobs(port.read_text(encoding="utf-8")) if port else set()
    assert turns or port is None, "powerd/hw/port.py has no class Knobs any more: name the setters here again"
    found = [
        f"{module}:{line} calls {name}"
        for module, path in tree.modules().items()
        if tree.within(module, "powerd.hw") and module not in (CALLER, WRAPPER)
        for name, line in called(path.read_text(encoding="utf-8")).items()
        if name in turns
    ]
    assert found == []


@pytest.mark.parametrize("source", ["pynvml.nvmlDeviceSetPowerManagementLimit(h, 1)", "f = nvmlDeviceResetGpuLockedClocks"])
def test_the_reader_sees_a_setter(source: str) -> None:
    assert any(NVML_SETTER.fullmatch(name) for name in names_used(source))


def test_the_reader_sees_a_turned_knob() -> None:
    port = "class Knobs(Protocol):\n    def set_power_limit(self, uuid: str, power_mw: int) -> None: ...\n"
    assert knobs(port) & called("self.knobs.set_power_limit('GPU-1', 300_000)").keys() == {"set_power_limit"}
