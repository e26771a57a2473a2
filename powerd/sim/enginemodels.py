"""Finds the engine models that ship with powerd.

House rules: a model is asked for by its name; an unknown name is refused with the names that there are.
"""

from __future__ import annotations

from powerd import resources
from powerd.errors import RequestError
from powerd_policies.dynamollm import models
from powerd_policies.dynamollm.engine_model import EngineModel

SUFFIX = ".engine.csv"


def names() -> tuple[str, ...]:
    """The engine models that ship, by name."""
    return tuple(sorted(path.name.removesuffix(SUFFIX) for path in (resources.folder("profiles") / "llm").glob(f"*{SUFFIX}")))


def load(name: str = "llama2-70b_h100") -> EngineModel:
    """Return the shipped engine model ``name``; RequestError naming those that there are."""
    if name not in names():
        raise RequestError(f"there is no engine model {name!r}", hint=f"there are {', '.join(names())}", code="bad_value")
    return models.load(resources.folder("profiles") / "llm" / f"{name}{SUFFIX}")
