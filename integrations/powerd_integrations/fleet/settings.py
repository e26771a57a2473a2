"""One TOML file for planner, router and replicas: pools, limits, classes, engine, policy.

House rules: an unknown key is an error that names the nearest valid one; every value is checked before anything starts; names of
policies and their options belong to `powerd_policies.dynamollm` and are checked where the policy is built (`fleet.policy`).
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from powerd.errors import RequestError
from powerd_integrations.fleet import chunk
from powerd_integrations.fleet.handover import Limits
from powerd_integrations.fleet.planner import PlannerOptions
from powerd_integrations.fleet.published import Group
from powerd_policies.dynamollm.classes import NAMES, Classes, Slo

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PlannerSection:
    """``[planner]``: where it listens and writes, which policy decides, and what bounds it."""

    gpus: int
    listen: str = "127.0.0.1:9480"
    plan_file: str = ""
    token_file: str = ""  # who reports must hold what is in it
    policy: str = "dynamollm"
    engine_model: str = ""  # file with the engine's figures (powerctl dynamollm profile makes it)
    start_s: float = 47.0  # from the wish for a replica until it serves; the default is the paper's, with every fix
    arrivals: str = "routers"  # who counts them: routers that report, or "engines" that are scraped (no router is ours)
    stale_after_s: float = 10.0
    gone_after_s: float = 15.0
    tick_s: float = 1.0
    look_s: float = 3.0  # before the first decision, so that replicas that serve already are known
    start_timeout_s: float = 900.0
    retry_s: float = 1800.0
    settle_s: float = 2.0
    wave_ratio: float = 0.25


@dataclass(frozen=True, slots=True)
class GroupSection:
    """``[[groups]]``: replicas of one pool at one tensor parallelism; ``targets``: engines that are scraped, not started here."""

    pool: str
    tp: int
    max_replicas: int
    min_replicas: int = 0
    ttft_s: float = 0.0  # SLO of its clocks; 0: its class's and shorter prompts', or those of all classes
    tbt_s: float = 0.0
    targets: tuple[str, ...] = ()  # http://host:port/metrics, or dns://service:port for every address behind a name

    @property
    def group(self) -> Group:
        """The group's name."""
        return Group(self.pool, self.tp)


@dataclass(frozen=True, slots=True)
class ClassesSection:
    """``[classes]``: bounds in tokens and SLOs in seconds."""

    prompt_bounds: tuple[int, ...] = (256, 1024, 8193)
    output_bounds: tuple[int, ...] = (100, 350)
    ttft_s: Mapping[str, float] = field(default_factory=dict)  # by class; the published ones where it is missing
    tbt_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineSection:
    """``[engine]``: how a replica starts its engine, or where one runs already."""

    command: tuple[str, ...] = ()  # {port}, {metrics_port}, {tp}, {pool}, {gpus}, {id}, {chunk_tokens} are filled in
    url: str = ""  # instead of a command
    metrics_url: str = ""  # {metrics_port} is filled in; /metrics of the engine itself where empty
    env: Mapping[str, str] = field(default_factory=dict)
    profile: str = ""  # by which powerd knows the engine's speed and power; empty: it only parks idle clocks
    chunk_tokens: int = 512  # prompt tokens of one iteration at most: the command's --max-num-batched-tokens (vLLM)
    health: str = "/health"
    start_timeout_s: float = 900.0
    request_timeout_s: float = 600.0
    max_ongoing_requests: int = 256
    priorities: bool = False  # requests carry their deadline as their priority; the engine was started to go by it
    drain_s: float = 600.0
    health_check_s: float = 5.0
    num_cpus: float = 1.0  # that Ray reserves for a replica


@dataclass(frozen=True, slots=True)
class ServiceSection:
    """``[service]``: Ray Serve's side."""

    planner: str = "http://127.0.0.1:9480"
    plan: str = ""  # the planner's URL where empty, or the path of its plan file on the head node
    route_prefix: str = "/"
    routers: int = 1
    router_cpus: float = 1.0
    queue_timeout_s: float = 60.0  # a request for which nobody serves waits so long
    attempts: int = 4  # a request whose replica died is sent to another
    tokens_per_character: float = 0.25  # of a prompt that is text
    gpus_per_replica: bool = True  # Ray gives every replica as many GPUs as its tensor parallelism
    powerd_socket: str = ""  # of the node's powerd; the usual place where empty
    powerd: bool = True  # register replicas with it
    stale_after_s: float = 30.0


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """The whole file."""

    planner: PlannerSection
    groups: tuple[GroupSection, ...]
    classes: Classes = field(default_factory=Classes)
    engine: EngineSection = EngineSection()
    service: ServiceSection = ServiceSection()
    policy: Mapping[str, Any] = field(default_factory=dict)  # options of planner.policy
    forecast: Mapping[str, Any] = field(default_factory=dict)  # options of its load predictor

    def slo_of(self, row: GroupSection) -> tuple[Slo, dict[int, float]]:
        """Return what a group's replicas are held to, and the TTFT of shorter prompts: prompt tokens, at most -> seconds.

        A pool of a class keeps that class's SLO, any other the SLOs of all classes. Either may be sent shorter prompts, and keeps
        the TTFT that is promised to these, unless its row says one ``ttft_s`` for all prompts.
        """
        every, shorter = self.classes.by_prompt()
        slo = self.classes.slos.get(row.pool, every)
        ttft_s = row.ttft_s or slo.ttft_s
        classes = {} if row.ttft_s else {
            each.max_prompt_tokens: each.ttft_s for each in shorter if each.max_prompt_tokens and each.ttft_s < ttft_s
        }  # fmt: skip
        return Slo(ttft_s, row.tbt_s or slo.tbt_s), classes

    @property
    def bounds(self) -> dict[Group, tuple[int, int]]:
        """Least and most replicas of each group."""
        return {row.group: (row.min_replicas, row.max_replicas) for row in self.groups}

    @property
    def options(self) -> PlannerOptions:
        """How the planner looks at its fleet."""
        p = self.planner
        limits = Limits(p.gpus, p.start_timeout_s, p.retry_s, p.settle_s, p.wave_ratio)
        return PlannerOptions(limits, p.stale_after_s, p.gone_after_s, p.tick_s, p.look_s)


def load(path: Path | str) -> FleetSettings:
    """Read a file; RequestError naming what is wrong and where."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}", code="bad_value") from None
    return parse(text, str(path))


def parse(text: str, name: str = "fleet.toml") -> FleetSettings:
    """Read a file's text; RequestError as ``load``."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"{name}: {error}", code="bad_value") from None
    known = ("planner", "groups", "classes", "engine", "service", "policy", "forecast")
    for key in document:
        _refuse_unknown(key, known, name)
    groups = document.get("groups", [])
    if not isinstance(groups, list) or not groups:
        raise _bad(name, "there is no [[groups]]: name at least one pool with its tensor parallelism")
    settings = FleetSettings(
        planner=_section(PlannerSection, document.get("planner", {}), f"{name}: [planner]"),
        groups=tuple(_section(GroupSection, row, f"{name}: [[groups]] {n}") for n, row in enumerate(groups, 1)),
        classes=_classes(document.get("classes", {}), f"{name}: [classes]"),
        engine=_section(EngineSection, document.get("engine", {}), f"{name}: [engine]"),
        service=_section(ServiceSection, document.get("service", {}), f"{name}: [service]"),
        policy=_table(document.get("policy", {}), f"{name}: [policy]"),
        forecast=_table(document.get("forecast", {}), f"{name}: [forecast]"),
    )
    _check(settings, name)
    return settings


def _check(settings: FleetSettings, name: str) -> None:
    seen = [row.group for row in settings.groups]
    for row in settings.groups:
        if not row.pool or row.tp < 1 or not 0 <= row.min_replicas <= row.max_replicas or row.max_replicas < 1:
            raise _bad(name, f"[[groups]] {row.group}: tp from 1, and min_replicas at most max_replicas, which is from 1")
        if seen.count(row.group) > 1:
            raise _bad(name, f"[[groups]] {row.group} is there twice")
    if settings.planner.arrivals not in ("routers", "engines"):
        raise _bad(name, f"[planner] arrivals: routers or engines, not {settings.planner.arrivals!r}")
    if settings.planner.gpus < 1:
        raise _bad(name, "[planner] gpus: from 1")
    for key in ("stale_after_s", "gone_after_s", "tick_s", "start_s", "start_timeout_s", "settle_s"):
        if getattr(settings.planner, key) <= 0:
            raise _bad(name, f"[planner] {key}: above 0")
    if not 0 < settings.planner.wave_ratio <= 1:
        raise _bad(name, "[planner] wave_ratio: above 0, at most 1")
    if settings.engine.command and settings.engine.url:
        raise _bad(name, "[engine] has a command and a url: a replica starts its engine or uses one, not both")
    if not 1 <= settings.engine.chunk_tokens <= 1 << 20:
        raise _bad(name, "[engine] chunk_tokens: 1 to 1048576")
    tokens = settings.engine.chunk_tokens
    if wrong := chunk.problem([word.replace("{chunk_tokens}", str(tokens)) for word in settings.engine.command], tokens):
        raise _bad(name, f"[engine] {wrong}")
    if settings.engine.priorities and settings.engine.command and not any("priority" in word for word in settings.engine.command):
        raise _bad(name, "[engine] priorities: the command starts an engine that does not go by them; vLLM's option is "
                         "--scheduling-policy=priority")  # fmt: skip


def _classes(document: Any, where: str) -> Classes:
    section = _section(ClassesSection, document, where)
    for key, count in (("prompt_bounds", 3), ("output_bounds", 2)):
        bounds = getattr(section, key)
        if len(bounds) != count or list(bounds) != sorted(set(bounds)) or bounds[0] < 1:
            raise _bad(where, f"{key}: {count} rising numbers from 1")
    for table in (section.ttft_s, section.tbt_s):
        for key, value in table.items():
            _refuse_unknown(key, NAMES, where)
            if not value > 0:
                raise _bad(where, f"{key}: seconds above 0")
    slos = {
        name: Slo(section.ttft_s.get(name, slo.ttft_s), section.tbt_s.get(name, slo.tbt_s))
        for name, slo in Classes().slos.items()
    }
    low, middle, high = section.prompt_bounds
    return Classes((low, middle, high), (section.output_bounds[0], section.output_bounds[1]), slos)


def values_of(kind: type, document: Any, where: str) -> dict[str, Any]:
    """Return a table of the file as values of a dataclass's fields; RequestError for an unknown key, a value of another kind."""
    hints = get_type_hints(kind)
    values = {}
    for key, value in _table(document, where).items():
        _refuse_unknown(key, tuple(hints), where)
        values[key] = _typed(value, hints[key], f"{where} {key}")
    return values


def _section(kind: type[T], document: Any, where: str) -> T:
    values = values_of(kind, document, where)
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        if item.name not in values and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise _bad(where, f"{item.name} is missing")
    return kind(**values)


def _table(document: Any, where: str) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise _bad(where, "a table")
    return document


def _typed(value: Any, hint: Any, where: str) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is UnionType:  # or None, which a file says by leaving the key out
        return _typed(value, inner[0], where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _section(hint, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(item, inner[0], where) for item in value)
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, dict):
        return {key: _typed(item, inner[1], where) for key, item in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    name = "a list" if origin is tuple else "a table" if origin is not None else {str: "a text", int: "a whole number"}.get(hint)
    raise _bad(where, f"{name or ('true or false' if hint is bool else 'a number')}, not {value!r}")


def _refuse_unknown(key: str, known: tuple[str, ...], where: str) -> None:
    if key not in known:
        near = difflib.get_close_matches(key, known, 1, 0.0)[0]
        raise _bad(where, f"unknown {key!r}; the nearest is {near!r}")


def _bad(where: str, what: str) -> RequestError:
    return RequestError(f"{where}: {what}", code="bad_value")
