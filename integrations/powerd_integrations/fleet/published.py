"""The plan as everybody reads it: replicas per pool and tensor parallelism, and where requests of each class go.

House rules: a reader never waits and never raises: it has the newest whole plan it ever saw, or none, and says how old that is;
a file is replaced, never rewritten in place; a pool that a plan does not name is unknown, which is not the same as zero replicas.
"""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

SCHEMA: Final = 1
MAX_BYTES: Final = 8 * 2**20


@dataclass(frozen=True, slots=True, order=True)
class Group:
    """Replicas that are alike: one pool at one tensor parallelism; one deployment where an autoscaler scales it."""

    pool: str
    tp: int

    def __str__(self) -> str:
        return f"{self.pool}-tp{self.tp}"


@dataclass(frozen=True, slots=True)
class Serving:
    """One replica that serves; ``clock_mhz`` 0: not known."""

    id: str
    group: Group
    clock_mhz: int = 0


@dataclass(frozen=True, slots=True)
class PublishedPlan:
    """The whole desired fleet at a time; ``routes`` by class: groups that serve it, nearest first."""

    version: int  # rises when anything below changes
    decided_unix_s: float | None  # when a controller last decided from fresh input; None: never
    published_unix_s: float
    controller: str = ""
    held: str = ""  # why the last plan stays in force; empty: it does not
    desired: Mapping[Group, int] = field(default_factory=dict)
    clocks_mhz: Mapping[Group, int] = field(default_factory=dict)  # that the controller counted with
    routes: Mapping[str, tuple[Group, ...]] = field(default_factory=dict)
    shed_after_s: Mapping[str, float] = field(default_factory=dict)  # by instance: who waits longer is rejected
    reordered: frozenset[str] = frozenset()  # instances whose queue goes by deadline
    resteered: frozenset[str] = frozenset()  # instances whose waiting requests go elsewhere
    serving: tuple[Serving, ...] = ()  # replicas that routers may use; does not raise the version

    def replicas(self, pool: str, tp: int) -> int | None:
        """Return the desired replicas; None when the plan does not know this pool at this tensor parallelism."""
        return self.desired.get(Group(pool, tp))

    def age_s(self, now_unix_s: float | None = None) -> float:
        """Return the seconds since its planner last said that it holds."""
        return max(0.0, (time.time() if now_unix_s is None else now_unix_s) - self.published_unix_s)


def to_json(plan: PublishedPlan) -> dict[str, Any]:
    """Return the plan as JSON types."""
    return {
        "schema": SCHEMA,
        "version": plan.version,
        "decided_unix_s": plan.decided_unix_s,
        "published_unix_s": plan.published_unix_s,
        "controller": plan.controller,
        "held": plan.held,
        "desired_replicas": [
            {"pool": group.pool, "tp": group.tp, "replicas": count, "clock_mhz": plan.clocks_mhz.get(group)}
            for group, count in sorted(plan.desired.items())
        ],
        "routes": {name: [{"pool": g.pool, "tp": g.tp} for g in groups] for name, groups in sorted(plan.routes.items())},
        "shed_after_s": dict(sorted(plan.shed_after_s.items())),
        "reordered": sorted(plan.reordered),
        "resteered": sorted(plan.resteered),
        "serving": [{"id": r.id, "pool": r.group.pool, "tp": r.group.tp, "clock_mhz": r.clock_mhz} for r in plan.serving],
    }


def from_json(document: Any) -> PublishedPlan:
    """Return the plan of a document; ValueError when it is none."""
    try:
        if document["schema"] != SCHEMA:
            raise ValueError(f"a plan of schema {document['schema']}; this reader knows {SCHEMA}")
        rows = [(Group(str(row["pool"]), int(row["tp"])), row) for row in document["desired_replicas"]]
        decided = document["decided_unix_s"]
        return PublishedPlan(
            version=int(document["version"]),
            decided_unix_s=None if decided is None else float(decided),
            published_unix_s=float(document["published_unix_s"]),
            controller=str(document["controller"]),
            held=str(document["held"]),
            desired={group: max(0, int(row["replicas"])) for group, row in rows},
            clocks_mhz={group: int(row["clock_mhz"]) for group, row in rows if row.get("clock_mhz") is not None},
            routes={
                str(name): tuple(Group(str(g["pool"]), int(g["tp"])) for g in groups)
                for name, groups in document["routes"].items()
            },
            shed_after_s={str(name): float(value) for name, value in document["shed_after_s"].items()},
            # A planner of before this said neither.
            reordered=frozenset(map(str, document.get("reordered", ()))),
            resteered=frozenset(map(str, document.get("resteered", ()))),
            serving=tuple(
                Serving(str(row["id"]), Group(str(row["pool"]), int(row["tp"])), int(row["clock_mhz"]))
                for row in document["serving"]
            ),
        )
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"not a plan: {type(error).__name__} {error}") from None


def write_plan(plan: PublishedPlan, path: Path) -> None:
    """Put the plan in place of the file at once; OSError when that cannot be done, and the old file stays."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(to_json(plan)) + "\n", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


class PlanSource(Protocol):
    """Where the newest plan comes from."""

    def plan(self) -> PublishedPlan | None:
        """Return the newest whole plan seen, None before the first; never waits, never raises."""
        ...


class PlanFile:
    """Reads a plan file when it has changed: one ``stat`` otherwise, some microseconds."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        self._seen: tuple[int, int] | None = None
        self._plan: PublishedPlan | None = None
        self.error = ""

    def plan(self) -> PublishedPlan | None:
        """Return the newest whole plan; a file that is gone or garbage leaves the last one in force."""
        try:
            found = os.stat(self._path)
            if (mark := (found.st_mtime_ns, found.st_ino)) != self._seen:
                self._seen = mark
                with open(self._path, "rb") as file:
                    self._plan = from_json(json.loads(file.read(MAX_BYTES)))
                self.error = ""
        except (OSError, ValueError) as error:
            self.error = str(error)
        return self._plan


class PlanMirror:
    """Keeps the newest plan of a planner's URL or file in memory, read in a thread of its own: who asks never waits for it."""

    def __init__(self, where: str | os.PathLike[str], period_s: float = 0.5) -> None:
        place = os.fspath(where)
        if "://" in place and not place.startswith(("http://", "https://")):
            raise ValueError(f"a planner's URL begins with http:// or https://, not {place!r}")
        self._url = place.rstrip("/") + "/v1/plan" if "://" in place else ""
        self._file = PlanFile(place)
        self._period_s = period_s
        self._plan: PublishedPlan | None = None
        self._stop = threading.Event()
        self.error = ""
        self._thread = threading.Thread(target=self._run, name="powerd-plan-mirror", daemon=True)
        self._thread.start()

    def plan(self) -> PublishedPlan | None:
        """Return the newest whole plan; a planner that is away leaves the last one in force."""
        return self._plan

    def close(self) -> None:
        """Stop reading; the last plan stays."""
        self._stop.set()

    def _run(self) -> None:
        while True:
            if self._url:
                self._fetch()
            else:
                self._plan, self.error = self._file.plan(), self._file.error
            if self._stop.wait(self._period_s):
                return

    def _fetch(self) -> None:
        try:
            with urllib.request.urlopen(self._url, timeout=5.0) as answer:  # noqa: S310  (scheme checked above)
                self._plan = from_json(json.loads(answer.read(MAX_BYTES)))
            self.error = ""
        except (OSError, ValueError) as error:
            self.error = str(error)


class Subscribers:
    """Whoever waits for the next change of a plan: threads of servers that stream it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._version = 0

    def notify(self, version: int) -> None:
        """Say that there is a new version."""
        with self._changed:
            self._version = version
            self._changed.notify_all()

    def wait(self, seen: int, timeout_s: float) -> int:
        """Wait for a version other than ``seen``; returns the newest."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != seen, timeout_s)
            return self._version
