"""Finds the engine models that ship with powerd.

House rules: a model is asked for by its name; an unknown name is refused with the names that there are.
"""

from __future__ import annotations

from powerd import resources
from powerd.errors import RequestError
from powerd_policies.dynamollm import fit, models
from powerd_policies.dynamollm.engine_model import EngineModel
from powerd_policies.dynamollm.fit import Assumptions

SUFFIX = ".engine.csv"


def names() -> tuple[str, ...]:
    """The engine models that ship, by name."""
    return tuple(sorted(path.name.removesuffix(SUFFIX) for path in (resources.folder("profiles") / "llm").glob(f"*{SUFFIX}")))


def load(name: str = "llama2-70b_h100") -> EngineModel:
    """Return the shipped engine model ``name``; RequestError naming those that there are."""
    if name not in names():
        raise RequestError(f"there is no engine model {name!r}", hint=f"there are {', '.join(names())}", code="bad_value")
    return models.load(resources.folder("profiles") / "llm" / f"{name}{SUFFIX}")


def assuming(assumed: Assumptions, gpu: str = "h100") -> EngineModel:
    """Return Llama-2-70B on ``gpu`` (h100, a100) as the builder makes it from the shipped measurements under other assumptions.

    For sweeps: ``assuming(Assumptions(sensitivity=0.0))`` is the worst end. RequestError naming the GPUs that there are.
    """
    if gpu not in fit.GPUS:
        raise RequestError(f"there are no measurements of {gpu!r}", hint=f"there are {', '.join(fit.GPUS)}", code="bad_value")
    place = resources.folder("profiles") / "llm"
    rows = fit.latencies((place / "splitwise_llama2-70b.csv").read_text(encoding="utf-8"), "splitwise_llama2-70b.csv")
    powers = fit.batch_powers((place / "mlenergy_v2.csv").read_text(encoding="utf-8"), "mlenergy_v2.csv")
    return fit.build(rows, fit.GPUS[gpu], fit.LLAMA2_70B, assumed, fit.of_gpu(powers, fit.GPUS[gpu]))
