"""A replay's circumstances from TOML: cluster, engine, promises, costs, forecasts, prices.

House rules: unknown keys and values out of bounds are refused with file, line and the nearest valid name; every key has a default
that is the reference scenario's; units are in the names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from powerd import resources
from powerd.errors import ConfigError
from powerd.knobs import knob, lay
from powerd_policies.dynamollm.classes import NAMES, Classes, Slo

REFERENCE = "reference.toml"


@dataclass(frozen=True, slots=True)
class ClusterSection:
    """``[cluster]``: what every policy may use at most."""

    nodes: int = knob(12, "nodes", low=1, high=10_000)
    gpus_per_node: int = knob(8, "GPUs of a node", low=1, high=64)


@dataclass(frozen=True, slots=True)
class EngineSection:
    """``[engine]``: the model and how its engine batches."""

    model: str = knob("llama2-70b_h100", "an engine model's name (powerd.sim.enginemodels)")
    chunk_tokens: int = knob(512, "prompt tokens of one iteration at most (chunked prefill)", low=16, high=1_000_000)
    max_running: int = knob(256, "requests in decode on one instance at most", low=1, high=100_000)


@dataclass(frozen=True, slots=True)
class ClassesSection:
    """``[classes]``: where the nine classes begin and end, in tokens."""

    prompt_short_below: int = knob(256, "a prompt below is short", low=1, high=10_000_000)
    prompt_medium_below: int = knob(1024, "a prompt below is medium", low=1, high=10_000_000)
    context_limit: int = knob(8192, "the longest prompt; a longer one is rejected and a miss", low=1, high=10_000_000)
    output_short_below: int = knob(100, "an answer below is short", low=1, high=10_000_000)
    output_medium_below: int = knob(350, "an answer below is medium", low=1, high=10_000_000)


@dataclass(frozen=True, slots=True)
class SloSection:
    """``[slo]``: the promises by prompt length."""

    ttft_short_s: float = knob(0.25, "seconds to the first token of a short prompt", low=0.001, high=3600)
    ttft_medium_s: float = knob(0.4, "of a medium prompt", low=0.001, high=3600)
    ttft_long_s: float = knob(2.0, "of a long prompt", low=0.001, high=3600)
    tbt_s: float = knob(0.1, "P99 of a request's own gaps between tokens", low=0.001, high=3600)


@dataclass(frozen=True, slots=True)
class ClassSloSection:
    """``[SS]`` .. ``[LL]``: one class's own promise."""

    ttft_s: float = knob(0.0, "seconds to the first token; 0: that of [slo]", low=0, high=3600)
    tbt_s: float = knob(0.0, "P99 of a request's own gaps; 0: that of [slo]", low=0, high=3600)


@dataclass(frozen=True, slots=True)
class CostsSection:
    """``[costs]``: what changing the fleet costs; each of the paper's fixes can be taken away."""

    cached_weights: bool = knob(True, "weights come from inside the cluster")
    snapshot: bool = knob(True, "a VM's and an engine's state are restored, not built")
    background_start: bool = knob(True, "an instance is started before the peak that it is for")
    weights_in_memory: bool = knob(True, "a re-shard copies from GPU to GPU, it does not load again")
    matching: bool = knob(True, "GPUs keep the shards that they have")
    overlap: bool = knob(True, "the old instances serve until the new ones are ready")
    resident_nvml: bool = knob(True, "clocks are set by a resident process, not by a command each time")


@dataclass(frozen=True, slots=True)
class ParkingSection:
    """``[parking]``: an instance with nothing to do goes to a low clock; for policies that set clocks."""

    enabled: bool = knob(True, "park idle instances")
    after_s: float = knob(0.25, "idle seconds before it parks", low=0, high=3600)
    clock_mhz: int = knob(0, "the parked clock; 0: the lowest of the engine model", low=0, high=10_000)


@dataclass(frozen=True, slots=True)
class ForecastSection:
    """``[forecast]``: what controllers may know ahead of time: nothing of the trace that is replayed."""

    output_length: str = knob("trained", "where a request's predicted class is from", one_of=("trained", "noisy", "oracle"))
    output_accuracy: float = knob(0.8, "share of right classes of the noisy oracle", low=0, high=1)
    history_weeks: int = knob(
        1, "weeks of another seed that the weekly template learns; only generated traces have one", low=0, high=52
    )


@dataclass(frozen=True, slots=True)
class PricesSection:
    """``[prices]``: what energy and GPUs are turned into."""

    usd_per_gpu_hour: float = knob(3.0, "of a GPU that is on", low=0, high=1000)
    energy_mean_usd_per_kwh: float = knob(0.0, "mean price of electricity; 0: none, cost_usd is of GPUs alone", low=0, high=100)
    energy_midday_dip: float = knob(0.0, "how far it falls at midday, share of the mean", low=0, high=1)
    energy_evening_rise: float = knob(0.0, "how far it rises in the evening, share of the mean", low=0, high=1)
    carbon_mean_g_per_kwh: float = knob(250.0, "mean carbon intensity of the grid", low=0, high=5000)
    carbon_midday_dip: float = knob(0.45, "how far it falls at midday, share of the mean", low=0, high=1)
    carbon_evening_rise: float = knob(0.25, "how far it rises in the evening, share of the mean", low=0, high=1)
    utc_offset_h: float = knob(0.0, "hours of the grid's time ahead of the trace's", low=-14, high=14)


@dataclass(frozen=True, slots=True)
class RunSection:
    """``[run]``: how the replay goes."""

    load: float = knob(1.0, "times the trace's own load", low=0.0001, high=100)
    seed: int = knob(1, "decides jitter, routing and every draw", low=0, high=2**31)
    drain_limit_s: float = knob(600.0, "seconds after the last arrival in which requests may still end", low=0, high=86_400)
    tick_s: float = knob(5.0, "resolution of the power series", low=0.1, high=3600)


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything but the trace and the policies; immutable."""

    cluster: ClusterSection = field(default_factory=ClusterSection)
    engine: EngineSection = field(default_factory=EngineSection)
    classes: ClassesSection = field(default_factory=ClassesSection)
    slo: SloSection = field(default_factory=SloSection)
    SS: ClassSloSection = field(default_factory=ClassSloSection)
    SM: ClassSloSection = field(default_factory=ClassSloSection)
    SL: ClassSloSection = field(default_factory=ClassSloSection)
    MS: ClassSloSection = field(default_factory=ClassSloSection)
    MM: ClassSloSection = field(default_factory=ClassSloSection)
    ML: ClassSloSection = field(default_factory=ClassSloSection)
    LS: ClassSloSection = field(default_factory=ClassSloSection)
    LM: ClassSloSection = field(default_factory=ClassSloSection)
    LL: ClassSloSection = field(default_factory=ClassSloSection)
    costs: CostsSection = field(default_factory=CostsSection)
    parking: ParkingSection = field(default_factory=ParkingSection)
    forecast: ForecastSection = field(default_factory=ForecastSection)
    prices: PricesSection = field(default_factory=PricesSection)
    run: RunSection = field(default_factory=RunSection)

    @property
    def gpus(self) -> int:
        """GPUs that a policy may use at most."""
        return self.cluster.nodes * self.cluster.gpus_per_node

    def request_classes(self) -> Classes:
        """The nine classes with their promises."""
        c, ttft_s = self.classes, {"S": self.slo.ttft_short_s, "M": self.slo.ttft_medium_s, "L": self.slo.ttft_long_s}
        slos = {
            name: Slo(getattr(self, name).ttft_s or ttft_s[name[0]], getattr(self, name).tbt_s or self.slo.tbt_s)
            for name in NAMES
        }
        return Classes(
            (c.prompt_short_below, c.prompt_medium_below, c.context_limit + 1),
            (c.output_short_below, c.output_medium_below),
            slos,
        )


def parse(text: str, file: str = "scenario.toml") -> Scenario:
    """Check one TOML text; ConfigError names file, line and remedy."""
    scenario = lay(text, file, Scenario())
    c = scenario.classes
    if not (c.prompt_short_below < c.prompt_medium_below <= c.context_limit and c.output_short_below < c.output_medium_below):
        raise ConfigError(f"{file}: the bounds of [classes] do not ascend", hint="short, medium, then the context limit")
    return scenario


def load(path: Path | None = None) -> Scenario:
    """Read a scenario; None: the reference scenario that ships with powerd."""
    path = path or resources.folder("scenarios") / REFERENCE
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    return parse(text, str(path))
