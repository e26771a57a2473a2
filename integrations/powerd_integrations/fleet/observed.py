"""What was seen of a fleet: arrivals that routers count, and instances that report themselves or are scraped.

House rules: everything has an age; what is too old is dropped, never guessed; a router's report is counted once, however often it
is sent; reports are bounded, so that nobody can fill the planner's memory; nothing here decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, get_args

from powerd_integrations.fleet.published import Group, Serving
from powerd_policies.dynamollm.classes import NAMES
from powerd_policies.dynamollm.fleet import ClassLoad, FleetState, InstanceLoad, InstanceState, Phase, Role

MAX_INSTANCES: Final = 10_000
MAX_ROUTERS: Final = 1_000
_LOAD_FIELDS: Final = frozenset(field.name for field in fields(InstanceLoad))
_WHOLE: Final = frozenset({"running", "queued", "queued_prompt_tokens"})


class ReportError(ValueError):
    """A report that is none; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Waited:
    """Requests that one router sent to an instance and that have no first token."""

    requests: int
    prompt_tokens: int
    oldest_s: float


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What one router counted since its last report; ``sequence`` rises with every report of a router's life."""

    router: str
    sequence: int
    classes: Mapping[str, ClassLoad]
    waiting: Mapping[str, Waited] = field(default_factory=dict)  # by instance, now
    resteered: Mapping[str, int] = field(default_factory=dict)  # waiting requests called back from an instance, to another one
    rejected: Mapping[str, int] = field(default_factory=dict)  # or told that they waited too long


@dataclass(frozen=True, slots=True)
class _Report:
    """An instance's newest report: it lives as long as it is heard, however old the load is that it tells."""

    heard_s: float
    measured_s: float
    state: InstanceState


class Observations:
    """Arrivals since a controller last looked, and the newest report of each instance."""

    def __init__(self, now_s: float, gone_after_s: float = 15.0) -> None:
        self.gone_after_s = gone_after_s
        self._since_s = now_s
        self._arrived: dict[str, ClassLoad] = {}
        self._routers: dict[str, tuple[int, float]] = {}
        self._waiting: dict[str, Mapping[str, Waited]] = {}  # by router, as it said last
        self._instances: dict[str, _Report] = {}

    def add_arrivals(self, report: Arrivals, now_s: float) -> bool:
        """Count a router's report; False when it was counted before."""
        last = self._routers.get(report.router)
        if last is not None and report.sequence <= last[0]:
            return False
        if last is None and len(self._routers) >= MAX_ROUTERS:
            self._drop_router(min(self._routers, key=lambda name: self._routers[name][1]))
        self._routers[report.router] = (report.sequence, now_s)
        self._waiting[report.router] = report.waiting
        for name, load in report.classes.items():
            had = self._arrived.get(name, ClassLoad())
            self._arrived[name] = ClassLoad(
                had.requests + load.requests,
                had.prompt_tokens + load.prompt_tokens,
                had.output_tokens + load.output_tokens,
            )
        return True

    def forget_arrivals(self, now_s: float) -> None:
        """Begin a new window: what was seen until now is no whole picture."""
        self._since_s, self._arrived = now_s, {}

    def add_instances(self, states: Iterable[InstanceState], now_s: float) -> None:
        """Take what instances say of themselves; ``load.age_s`` is how old it was when it was sent."""
        for state in states:
            if state.id in self._instances or len(self._instances) < MAX_INSTANCES:
                self._instances[state.id] = _Report(now_s, now_s - state.load.age_s, state)

    def remove_instance(self, name: str) -> None:
        """Forget an instance that said goodbye."""
        self._instances.pop(name, None)

    def arrivals_age_s(self, now_s: float) -> float | None:
        """Return the seconds since any router reported; None before the first."""
        return min((now_s - at for _, at in self._routers.values()), default=None)

    def oldest_load_s(self, now_s: float) -> float:
        """Return the age of the oldest load among the instances that there are."""
        self._forget(now_s)
        return max((now_s - report.measured_s for report in self._instances.values()), default=0.0)

    def serving(self, now_s: float) -> tuple[Serving, ...]:
        """Return the replicas that serve."""
        self._forget(now_s)
        return tuple(
            Serving(name, Group(report.state.pool, report.state.tp), report.state.clock_mhz)
            for name, report in sorted(self._instances.items())
            if report.state.phase == "serving"
        )

    def state(self, now_s: float, gpus: int) -> FleetState:
        """Return the fleet as a controller sees it, with what arrived since it was asked for last; the next window begins."""
        self._forget(now_s)
        instances = tuple(
            replace(report.state, load=replace(self._load(report.state, now_s), age_s=max(0.0, now_s - report.measured_s)))
            for _, report in sorted(self._instances.items())
        )
        window_s, arrived = now_s - self._since_s, self._arrived
        self.forget_arrivals(now_s)
        return FleetState(now_s, window_s, instances, {name: arrived.get(name, ClassLoad()) for name in NAMES}, gpus)

    def _load(self, state: InstanceState, now_s: float) -> InstanceLoad:
        """An instance's load with what engines do not tell and routers know: whose first token it owes."""
        heard = [name for name, (_, at_s) in self._routers.items() if now_s - at_s <= self.gone_after_s]
        rows = [row for name in heard if (row := self._waiting[name].get(state.id)) is not None]
        if not rows or state.load.oldest_wait_s is not None:
            return state.load
        return replace(
            state.load,
            queued=max(state.load.queued, sum(row.requests for row in rows)),
            queued_prompt_tokens=sum(row.prompt_tokens for row in rows),
            oldest_wait_s=max(row.oldest_s for row in rows),
        )

    def _drop_router(self, name: str) -> None:
        del self._routers[name], self._waiting[name]

    def _forget(self, now_s: float) -> None:
        for name in [name for name, report in self._instances.items() if now_s - report.heard_s > self.gone_after_s]:
            del self._instances[name]
        for name in [name for name, (_, at) in self._routers.items() if now_s - at > 3600.0]:
            self._drop_router(name)


# --- what comes over the wire ---------------------------------------------------------------------------------------------------


def arrivals_from_json(document: Any) -> Arrivals:
    """Read a router's report; ReportError when it is none."""
    body = _table(document, "a report")
    classes = {}
    for name, row in _table(body.get("classes", {}), "classes").items():
        if name not in NAMES:
            raise ReportError(f"no class {name!r}; there are {', '.join(NAMES)}")
        counts = _table(row, name)
        if unknown := set(counts) - {"requests", "prompt_tokens", "output_tokens"}:
            raise ReportError(f"{name}: unknown {sorted(unknown)[0]!r}")
        classes[name] = ClassLoad(**{key: _whole(value, f"{name}.{key}") for key, value in counts.items()})
    return Arrivals(
        _text(body.get("router"), "router"), _whole(body.get("sequence"), "sequence"), classes,
        {_text(name, "waiting"): _waited(row) for name, row in _instances(body, "waiting").items()},
        *({name: _whole(value, key) for name, value in _instances(body, key).items()} for key in ("resteered", "rejected")),
    )  # fmt: skip


def instances_from_json(document: Any) -> tuple[InstanceState, ...]:
    """Read what instances say of themselves; ReportError when it is nothing of the kind."""
    rows = _table(document, "a report").get("instances")
    if not isinstance(rows, list):
        raise ReportError("instances: a list")
    return tuple(_instance(row) for row in rows)


def instance_to_json(state: InstanceState) -> dict[str, Any]:
    """Return an instance's report as JSON types."""
    load = {name: getattr(state.load, name) for name in sorted(_LOAD_FIELDS)}
    names = ("id", "pool", "tp", "clock_mhz", "phase", "role", "ready_s")
    return {**{name: getattr(state, name) for name in names}, "load": load}


def _instances(body: dict[str, Any], key: str) -> dict[str, Any]:
    table = _table(body.get(key, {}), key)
    if len(table) > MAX_INSTANCES:
        raise ReportError(f"{key}: at most {MAX_INSTANCES} instances")
    return table


def _waited(row: Any) -> Waited:
    body = _table(row, "waiting")
    requests, prompt_tokens = (_whole(body.get(name), f"waiting.{name}") for name in ("requests", "prompt_tokens"))
    return Waited(requests, prompt_tokens, _number(body.get("oldest_s"), "waiting.oldest_s"))


def _instance(row: Any) -> InstanceState:
    body = _table(row, "an instance")
    load = _table(body.get("load", {}), "load")
    if unknown := set(load) - _LOAD_FIELDS:
        raise ReportError(f"load: unknown {sorted(unknown)[0]!r}")
    counted: dict[str, Any] = {
        name: None if value is None else _whole(value, name) if name in _WHOLE else _number(value, name)
        for name, value in load.items()
    }
    phase, role, ready = body.get("phase", "serving"), body.get("role", "both"), body.get("ready_s")
    if phase not in get_args(Phase) or role not in get_args(Role):
        raise ReportError(f"phase {phase!r} and role {role!r}: of {get_args(Phase)} and {get_args(Role)}")
    tp = _whole(body.get("tp"), "tp")
    if not 1 <= tp <= 1024:
        raise ReportError(f"tp {tp}: from 1 to 1024")
    return InstanceState(
        _text(body.get("id"), "id"), _text(body.get("pool"), "pool"), tp, _whole(body.get("clock_mhz", 0), "clock_mhz"),
        phase, role, None if ready is None else _number(ready, "ready_s"), InstanceLoad(**counted),
    )  # fmt: skip


def _table(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ReportError(f"{what}: a table, not {type(value).__name__}")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 200:
        raise ReportError(f"{what}: a text of 1 to 200 characters")
    return value


def _whole(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise ReportError(f"{what}: a whole number from 0")
    return value


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1e15:
        raise ReportError(f"{what}: a number from 0")
    return float(value)
