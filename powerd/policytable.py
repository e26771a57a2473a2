"""The one door from the daemon to the policies: which policy decides what, by name.

House rules: nothing else in the daemon imports powerd_policies; whatever needs a solver or a table is imported when it is asked
for; a name that is not here is refused with those that are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from powerd import resources
from powerd.decode import nearest
from powerd.errors import RequestError
from powerd.model import SloClass
from powerd_policies.dynamollm.classes import PromptSlo, Slo
from powerd_policies.dynamollm.engine_model import EngineModel
from powerd_policies.dynamollm.fleet import InstanceLoad
from powerd_policies.dynamollm.instance import ClockDecision, InstanceController

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SUFFIX = ".engine.csv"

__all__ = ["ClockDecision", "InstanceLoad", "InstancePolicy", "Slo", "instance_policy", "profile_gpu", "promise"]


class InstancePolicy(Protocol):
    """What holds one inference instance at a clock."""

    max_mhz: int

    def clock(self, now_s: float, load: InstanceLoad) -> ClockDecision:
        """The SM clock that the instance shall have from what is known at ``now_s``, and why."""
        ...


class ParkingOnly:
    """Without a profile nothing is known of what a clock costs: the full one, or the parking one when there is nothing to do."""

    def __init__(self, max_mhz: int, park_mhz: int, park_after_s: float) -> None:
        self.max_mhz, self._park_mhz, self._park_after_s = max_mhz, park_mhz, park_after_s
        self._idle_s: float | None = None

    def clock(self, now_s: float, load: InstanceLoad) -> ClockDecision:
        if load.running or load.queued:
            self._idle_s = None
            return ClockDecision(self.max_mhz, "no profile: full clock while there is work")
        if self._idle_s is None:
            self._idle_s = now_s
        if now_s - self._idle_s < self._park_after_s:
            return ClockDecision(self.max_mhz, "no profile: full clock until it is idle")
        return ClockDecision(self._park_mhz, "parked: nothing to do")


def instance_policy(
    profile: str | None,
    folder: str,
    tp: int,
    slo: Slo,
    clocks_mhz: Sequence[int],
    park_after_s: float,
    period_s: float,
    chunk_tokens: int = 512,
    classes: Sequence[SloClass] = (),
) -> InstancePolicy:
    """The policy of one instance on GPUs that have these clocks, ascending. RequestError says which profile would do.

    ``slo`` may be infinite in what is not promised; ``classes`` are shorter prompts with a shorter TTFT.
    """
    if not clocks_mhz:
        return ParkingOnly(0, 0, park_after_s)
    if profile is None:
        half = max(clocks_mhz) / 2
        return ParkingOnly(max(clocks_mhz), min(c for c in clocks_mhz if c >= half), park_after_s)
    model = _engine_model(profile, folder)
    shorter = [PromptSlo(each.max_prompt_tokens, each.ttft_s) for each in classes]
    try:
        return InstanceController(
            model, tp, slo, classes=shorter, chunk_tokens=chunk_tokens, dwell_s=park_after_s, period_s=max(period_s, 1.0),
        )  # fmt: skip
    except ValueError as error:
        raise RequestError(str(error), hint="powerctl dynamollm profile measures another", code="bad_value") from error


def promise(ttft_s: float | None, tbt_s: float | None) -> Slo:
    """What policies call an SLO; None: nothing is promised."""
    return Slo(float("inf") if ttft_s is None else ttft_s, float("inf") if tbt_s is None else tbt_s)


def profile_gpu(profile: str, folder: str) -> str:
    """The kind of GPU that a profile is of, such as h100. RequestError as ``instance_policy``."""
    return _engine_model(profile, folder).gpu


def _engine_model(name: str, folder: str) -> EngineModel:
    """The engine model of this name: the site's own before that of powerd. RequestError names those that there are."""
    from powerd_policies.dynamollm import models

    places = [Path(folder)] if folder else []
    places.append(resources.folder("profiles") / "llm")
    if _NAME.fullmatch(name):
        for place in places:
            if (path := place / f"{name}{_SUFFIX}").is_file():
                return models.load(path)
    names = sorted({path.name.removesuffix(_SUFFIX) for place in places for path in place.glob(f"*{_SUFFIX}")})
    hint = f"{nearest(name, names)}; there are {', '.join(names) or 'none'}"
    raise RequestError(f"no engine profile {name[:80]!r}", hint=hint, code="bad_value")
