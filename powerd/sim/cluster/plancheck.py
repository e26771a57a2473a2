"""Whether a plan can be carried out at all, said before anything is changed.

House rules: pure; the message names the instance and what would be possible; a name that has never been is a mistake,
one that has ended is not (a controller may not have seen it yet).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from powerd_policies.dynamollm.classes import NAMES
from powerd_policies.dynamollm.engine_model import EngineModel
from powerd_policies.dynamollm.fleet import FleetPlan, Role


class PlanError(ValueError):
    """A plan that cannot be carried out; the message says what is wrong. Nothing was changed."""


def check(plan: FleetPlan, model: EngineModel, gpus: int, known: Collection[str], kinds: Mapping[str, tuple[int, Role]]) -> None:
    """Raise ``PlanError`` for what a plan may not ask.

    ``known``: every name there has been; ``kinds``: tensor parallelism and role of what there is.
    """
    seen: set[str] = set()
    for want in plan.instances:
        called = want.id or f"a new instance of {want.pool}"
        if (want.tp, want.clock_mhz) not in model.table:
            raise PlanError(f"{called}: no figures for TP{want.tp} at {want.clock_mhz} MHz; {_held(model, want.tp)}")
        if want.id is None:
            continue
        if want.id in seen:
            raise PlanError(f"{called} is named twice")
        seen.add(want.id)
        _name(want.id, known)
        tp, role = kinds.get(want.id, (want.tp, want.role))
        if tp != want.tp:
            raise PlanError(f"{called} has TP{tp}, it cannot become TP{want.tp}: drain it and start a new one")
        if role != want.role:
            raise PlanError(f"{called} has role {role!r}, it cannot become {want.role!r}: drain it and start a new one")
    wanted = sum(want.tp for want in plan.instances)
    if wanted > gpus:
        raise PlanError(f"the plan needs {wanted} GPUs, there are {gpus}")
    for name in [*plan.reordered, *plan.resteered, *plan.shed]:
        _name(name, known)
    if unknown := [name for name in plan.routes if name not in NAMES]:
        raise PlanError(f"routes of {unknown[0]!r}, which is no class; classes are {', '.join(NAMES)}")


def _name(name: str, known: Collection[str]) -> None:
    if name not in known:
        raise PlanError(f"{name}: there has never been an instance of this name")


def _held(model: EngineModel, tp: int) -> str:
    clocks = ", ".join(map(str, model.clocks_mhz(tp)))
    held = f"TP{tp} at {clocks} MHz" if clocks else f"TP {', '.join(map(str, model.tps))}"
    return f"the model of {model.name} on {model.gpu} holds {held}"
