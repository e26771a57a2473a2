"""The policy that a fleet's file names, ready to decide.

House rules: policies and their knobs are those of the simulator (`powerctl dynamollm replay`); a knob that there is not or that
is of another kind, and a tensor parallelism that the engine's figures do not hold, is an error before anything starts; a policy
is offered what the file's groups can start: their tensor parallelisms, and the partitions whose every pool is a group.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from powerd.errors import RequestError
from powerd_integrations.fleet.settings import FleetSettings, values_of
from powerd_policies.dynamollm import models
from powerd_policies.dynamollm.fleet import FleetController
from powerd_policies.dynamollm.knobs import POLICIES, Knobs
from powerd_policies.dynamollm.overheads import Fixes, Overheads
from powerd_policies.dynamollm.predictor import Knobs as ForecastKnobs

K = TypeVar("K", Knobs, ForecastKnobs)
STATIC = "static"


def build(settings: FleetSettings, *, epoch_s: float = 0.0) -> FleetController:
    """Return the controller of ``planner.policy`` with the knobs of ``[policy]``; RequestError when it cannot be.

    ``epoch_s`` is where in the week the planner's time 0 lies, in seconds after Monday 00:00: forecasts tell days by it.
    """
    from powerd_policies.dynamollm import policies

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
        knobs = _turned(POLICIES[name], options, "[policy]")
        knobs = dataclasses.replace(knobs, partitions=_possible(knobs.partitions, {row.pool for row in settings.groups}))
        forecast = policies.forecaster(epoch_s=epoch_s, knobs=_turned(policies.FORECAST, settings.forecast, "[forecast]"))
        return policies.build(
            name, model=model, classes=settings.classes, gpus=settings.planner.gpus, knobs=knobs, predictor=forecast,
            chunk_tokens=settings.engine.chunk_tokens, overheads=_overheads(settings.planner.start_s),
        )  # fmt: skip
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
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


def _turned(knobs: K, options: Mapping[str, Any], where: str) -> K:
    """Return ``knobs`` with the values of a table of the file."""
    values = values_of(type(knobs), options, where)
    for name, value in values.items():
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise ValueError(f"{name}: a number from 0, not {value!r}")
    return dataclasses.replace(knobs, **values)


def _overheads(start_s: float) -> Overheads:
    """No autoscaler copies weights from GPU to GPU: another tensor parallelism is a start of new replicas, and takes as long."""
    return Overheads(Fixes(weights_in_memory=False), restored_s=start_s, cached_s=0.0, load_s=0.0)
