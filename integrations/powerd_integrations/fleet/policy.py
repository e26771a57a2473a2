"""The policy that a fleet's file names, ready to decide.

House rules: policies and their knobs are those of the simulator (`powerctl dynamollm replay`); a knob that there is not, and a
tensor parallelism that the engine's figures do not hold, is an error before anything starts; a policy is offered what the file's
groups can start: their tensor parallelisms, and the partitions whose every pool is a group.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from powerd.errors import RequestError
from powerd_integrations.fleet.settings import FleetSettings
from powerd_policies.dynamollm import models
from powerd_policies.dynamollm.fleet import FleetController

STATIC = "static"


def build(settings: FleetSettings) -> FleetController:
    """Return the controller of ``planner.policy`` with the knobs of ``[policy]``; RequestError when it cannot be."""
    from powerd_policies.dynamollm import policies
    from powerd_policies.dynamollm.knobs import POLICIES

    name, options = settings.planner.policy, dict(settings.policy)
    if not settings.planner.engine_model:
        raise RequestError("[planner] engine_model: name the file with the engine's figures", code="bad_value")
    model = models.load(settings.planner.engine_model)
    if missing := sorted({row.tp for row in settings.groups} - set(model.tps)):
        held = ", ".join(f"TP{tp}" for tp in model.tps)
        raise RequestError(f"[[groups]] tp {missing[0]}: the figures of {model.name} hold {held}", code="bad_value")
    ours = {row.tp for row in settings.groups}
    model = dataclasses.replace(model, table={key: row for key, row in model.table.items() if key[0] in ours})
    try:
        if name == STATIC:
            return policies.static(**options, model=model, classes=settings.classes)
        if name not in POLICIES:
            raise ValueError(f"there is no policy {name!r}; there are {', '.join((*POLICIES, STATIC))}")
        knobs = dataclasses.replace(POLICIES[name], **{key: _frozen(value) for key, value in options.items()})
        knobs = dataclasses.replace(knobs, partitions=_possible(knobs.partitions, {row.pool for row in settings.groups}))
        return policies.build(name, model=model, classes=settings.classes, gpus=settings.planner.gpus, knobs=knobs)
    except (TypeError, ValueError, LookupError) as error:
        raise RequestError(f"[policy] of {name}: {error}", code="bad_value") from None


def _possible(partitions: tuple[str, ...], pools: set[str]) -> tuple[str, ...]:
    """The partitions whose every pool is a group of this fleet; ValueError when there is none."""
    from powerd_policies.dynamollm.fragments import PARTITIONS

    if unknown := [name for name in partitions if name not in PARTITIONS]:
        raise ValueError(f"there is no partition {unknown[0]!r}; there are {', '.join(PARTITIONS)}")
    possible = tuple(name for name in partitions if set(PARTITIONS[name]) <= pools)
    if not possible:
        needed = "; ".join(f"{name} needs {', '.join(PARTITIONS[name])}" for name in partitions)
        raise ValueError(f"no partition has all its pools among the [[groups]]: {needed}")
    return possible


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
