"""Who may import whom (design: the rooms). The table holds for whatever exists; import-linter repeats what it can say.

House rules: a lazy import counts as an import; an import for type checkers only counts too, except where a rule is about
what must be installed.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.arch import source_tree as tree

VOCABULARY = ("powerd.model", "powerd.errors")


@dataclass(frozen=True)
class Room:
    """What the modules of one room may import beside the standard library and themselves."""

    name: str
    ours: tuple[str, ...]
    theirs: tuple[str, ...] = ()
    not_from_stdlib: tuple[str, ...] = ()


ROOMS = [
    Room("powerd.model", ()),
    Room("powerd.errors", ()),
    Room("powerd.api", VOCABULARY),
    Room("powerd.hw", (*VOCABULARY, "powerd.arguments", "powerd.clock", "powerd.config", "powerd.killpoint"), ("pynvml",)),
    # Pure planners: no input or output, no clock.
    Room(
        "powerd_policies",
        VOCABULARY,
        ("numpy", "scipy", "ortools"),
        ("time", "socket", "subprocess", "asyncio", "threading", "multiprocessing", "sqlite3", "urllib", "http"),
    ),
]

# These are used in other people's images and in the privileged process: nothing to install, however deep one looks.
NOTHING_TO_INSTALL = {
    "powerd.client": (),
    "powerd.model": (),
    "powerd.api": (),
    "powerd.errors": (),
    "powerd.hw": ("pynvml",),
}

# A module (or outside package) -> the only ones that may import it.
DOORS = {
    "pynvml": ("powerd.hw.nvml",),
    "powerd.hw.nvml": ("powerd.hw",),
    "powerd_policies": ("powerd_policies", "powerd_integrations", "powerd.sim", "powerd.cli", "powerd.policytable"),
    "powerd_integrations": ("powerd_integrations",),
    # No product code reads the simulator's state.
    "powerd.sim": (
        "powerd.sim",
        "powerd.cli",
        "powerd.main",
        "powerd.demo",
        "powerd_integrations.simulated_pipeline",
        "powerd_integrations.simulated_service",
    ),
}

INTEGRATIONS_MAY_IMPORT = ("powerd_integrations", "powerd_policies", "powerd.client", *VOCABULARY)
# Two are plugged into the simulator as others are into a framework: they run on its GPUs and in its time.
SIMULATED = ("powerd_integrations.simulated_pipeline", "powerd_integrations.simulated_service")
SIMULATED_MAY_IMPORT = (*INTEGRATIONS_MAY_IMPORT, "powerd.sim", "powerd.clock")


def breaches_of_room(room: Room) -> list[str]:
    found = []
    for module, items in tree.graph().items():
        if not tree.within(module, room.name):
            continue
        for item in items:
            if tree.is_ours(item.module):
                allowed = item.module == "powerd" or tree.within(item.module, room.name, *room.ours)
            elif tree.is_stdlib(item.module):
                allowed = not tree.within(item.module, *room.not_from_stdlib)
            else:
                allowed = tree.within(item.module, *room.theirs)
            if not allowed:
                found.append(f"{module}:{item.line} imports {item.module}")
    return found


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_room_imports_only_what_it_may(room: Room) -> None:
    assert breaches_of_room(room) == []


@pytest.mark.parametrize("name", NOTHING_TO_INSTALL)
def test_what_must_run_without_third_parties_reaches_none(name: str) -> None:
    reached = [
        f"{module}:{item.line} imports {item.module}"
        for module, item in tree.closure(name)
        if not (tree.is_ours(item.module) or tree.is_stdlib(item.module) or tree.within(item.module, *NOTHING_TO_INSTALL[name]))
    ]
    assert reached == []


@pytest.mark.parametrize("guarded", DOORS)
def test_only_the_named_rooms_pass_a_door(guarded: str) -> None:
    passed = [
        f"{module}:{item.line} imports {item.module}"
        for module, items in tree.graph().items()
        for item in items
        if tree.within(item.module, guarded) and not tree.within(module, *DOORS[guarded])
    ]
    assert passed == []


def test_integrations_reach_powerd_through_its_client_and_frameworks_lazily() -> None:
    found = []
    for module, items in tree.graph().items():
        if not tree.within(module, "powerd_integrations"):
            continue
        simulated = tree.within(module, *SIMULATED)
        may = SIMULATED_MAY_IMPORT if simulated else INTEGRATIONS_MAY_IMPORT
        for item in items:
            if tree.is_ours(item.module) and item.module != "powerd" and not tree.within(item.module, *may):
                found.append(f"{module}:{item.line} imports {item.module}")
            if not (tree.is_ours(item.module) or tree.is_stdlib(item.module) or item.lazy or item.typing_only):
                found.append(f"{module}:{item.line} imports {item.module} when it is imported itself")
    assert found == []


def test_the_reader_sees_every_way_to_import() -> None:
    source = """
import pynvml
from powerd import model
from . import port
from ..errors import PowerdError
def late():
    from powerd_policies import perseus
if TYPE_CHECKING:
    import numpy
"""
    known = frozenset({"powerd.model", "powerd.hw.port", "powerd.errors"})
    assert tree.imports_of("powerd.hw.sampler", source, known) == [
        tree.Import("pynvml", 2),
        tree.Import("powerd.model", 3),
        tree.Import("powerd.hw.port", 4),
        tree.Import("powerd.errors", 5),
        tree.Import("powerd_policies", 7, lazy=True),
        tree.Import("numpy", 9, typing_only=True),
    ]
    assert tree.imports_of("powerd.hw", "from . import port", known, is_package=True) == [tree.Import("powerd.hw.port", 1)]
