"""A report's data from the APIs of the nodes themselves.

House rules: nodes are asked side by side, and one that does not answer is a gap, not an error; nothing is asked twice.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from powerd.api import HistorySeries, JobView, NodeView
from powerd.cli.reports.counters import GpuSeries
from powerd.client import Client
from powerd.errors import ConfigError, PowerdError, RequestError
from powerd.records import JobStepRow

_SIDE_BY_SIDE = 16
_POINTS = 2000
_COLUMNS = ("energy_mj", "epoch", "power_mw", "power_limit_enforced_mw")
_LATE_NS = 600 * 10**9  # steps are reported no later than this after they began


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How to reach one node's powerd."""

    name: str = ""
    socket: str | None = None
    url: str | None = None
    token_file: str | None = None
    ca_file: str | None = None

    def client(self, timeout_s: float) -> Client:
        """A client for it."""
        return Client(self.socket, self.url, self.token_file, ca_file=self.ca_file, timeout_s=timeout_s)


@dataclass(frozen=True, slots=True)
class NodeData:
    """What one node (or one instance of a metrics server) told."""

    name: str
    error: str | None = None
    simulated: bool | None = None
    gpus: tuple[GpuSeries, ...] = ()
    job: JobView | None = None
    steps: tuple[JobStepRow, ...] = ()
    begin_s: float | None = None  # of the job on this node
    end_s: float | None = None
    now_s: float | None = None
    notes: tuple[str, ...] = ()
    host: Mapping[str, GpuSeries] = field(default_factory=dict)  # "cpu" and "dram" of the whole node, where they are read
    view: NodeView | None = field(default=None, repr=False)


def read_endpoints(path: Path) -> tuple[Endpoint, ...]:
    """The nodes of a TOML file with one ``[[node]]`` each; relative paths are the file's. ConfigError says what is wrong."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    rows = content.get("node")
    if set(content) - {"node"} or not isinstance(rows, list) or not rows:
        raise ConfigError(f"{path}: one [[node]] for each node and nothing else", hint="docs/report.md has an example")
    valid = [f.name for f in fields(Endpoint)]
    found: list[Endpoint] = []
    for number, row in enumerate(rows, 1):
        for key, value in row.items():
            if key not in valid:
                near = difflib.get_close_matches(key, valid, n=1)
                raise ConfigError(
                    f"{path}: node {number}: unknown key {key!r}", hint=f"did you mean {near[0]!r}?" if near else ""
                )
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{path}: node {number}: {key} is a text")
        if ("socket" in row) == ("url" in row):
            raise ConfigError(f"{path}: node {number}: either a socket or a url")
        for key in ("socket", "token_file", "ca_file"):
            if key in row:
                row[key] = str(path.parent / row[key])
        row.setdefault("name", row.get("url") or Path(row["socket"]).name)
        found.append(Endpoint(**row))
    names = [e.name for e in found]
    if twice := {n for n in names if names.count(n) > 1}:
        raise ConfigError(f"{path}: {sorted(twice)[0]!r} names two nodes")
    return tuple(found)


def collect(
    endpoints: Sequence[Endpoint],
    job: str | None,
    since: Callable[[float], float],
    timeout_s: float,
    told: Callable[[int, int], None],
) -> tuple[list[NodeData], float, float]:
    """Ask all nodes; their data and the report's time, which begins ``since(end)`` or with the job. ``told`` hears of progress.

    RequestError when no node knows the job; the last node's own error when none answers at all.
    """
    clients = [e.client(timeout_s) for e in endpoints]
    total, done = 2 * len(endpoints), 0
    errors: list[PowerdError] = []

    def advance(found: NodeData) -> NodeData:
        nonlocal done
        done += 1
        told(done, total)
        return found

    with ThreadPoolExecutor(min(_SIDE_BY_SIDE, len(endpoints))) as pool:
        firsts = pool.map(lambda e, c: _facts(e, c, job, errors), endpoints, clients)
        nodes = [advance(found) for found in firsts]
        alive = [n for n in nodes if n.error is None]
        if not alive:
            raise errors[-1]
        begins = [n.begin_s for n in alive if n.begin_s is not None]
        if job is not None and not begins:
            raise RequestError(f"no node that answered knows job {job[:80]!r}", code="not_found", hint="powerctl jobs")
        ends = [(n.end_s if job is not None else None) or n.now_s for n in alive if job is None or n.job is not None]
        end_s = max(e for e in ends if e is not None)
        start_s = min(begins) if job is not None else since(end_s)
        seconds = pool.map(lambda n, c: _courses(n, c, job, start_s, end_s), nodes, clients)
        nodes = [advance(found) for found in seconds]
    for client in clients:
        client.close()
    return nodes, start_s, end_s


def _facts(endpoint: Endpoint, client: Client, job: str | None, errors: list[PowerdError]) -> NodeData:
    """Who the node is and what it knows of the job."""
    try:
        view, snapshot = client.node(), client.snapshot()
        name = endpoint.name or view.hostname
        data = NodeData(name, simulated=view.simulated, now_s=snapshot.wall_ns / 1e9, view=view)
        if job is None:
            return data
        try:
            found = client.job(job)
        except RequestError as error:
            if error.code.name != "not_found":
                raise
            return data
        steps = client.job_steps(job)
    except PowerdError as error:
        errors.append(error)
        return NodeData(endpoint.name or endpoint.url or str(endpoint.socket), error=" ".join(str(error).split()))
    begin_ns = found.begin_wall_ns
    if steps:  # a step is reported after it ended
        by_clock = steps[0].begin_ns + snapshot.wall_ns - snapshot.time_ns
        if begin_ns - _LATE_NS < by_clock < begin_ns:
            begin_ns = by_clock
    end_s = None if found.end_wall_ns is None else found.end_wall_ns / 1e9
    return replace(data, job=found, steps=steps, begin_s=begin_ns / 1e9, end_s=end_s)


def _courses(data: NodeData, client: Client, job: str | None, begin_s: float, end_s: float) -> NodeData:
    """What the node's store holds of its GPUs (the job's) in the report's time."""
    if data.error is not None or data.view is None or (job is not None and data.job is None):
        return data
    wanted = [c.gpu for c in data.view.gpus if job is None or (data.job is not None and c.gpu.uuid in data.job.gpus)]
    missing = () if data.job is None else tuple(u for u in data.job.gpus if u not in {g.uuid for g in wanted})
    notes = tuple(f"GPU {uuid} is no longer on this node" for uuid in missing)
    if not wanted:
        return replace(data, notes=notes)
    margin_s = max(10.0, (end_s - begin_s) / 500)
    try:
        view = client.history(
            [g.uuid for g in wanted], since=begin_s - margin_s, until=end_s + margin_s, points=_POINTS, columns=_COLUMNS
        )
    except PowerdError as error:
        return replace(data, notes=(*notes, f"its store tells nothing: {' '.join(str(error).split())}"))
    known = {s.uuid: s for s in view.series}
    gpus = tuple(_series(known[g.uuid], g.index, g.name) for g in wanted if g.uuid in known)
    return replace(data, gpus=gpus, notes=notes, host=_host(client, begin_s - margin_s, end_s + margin_s))


def _host(client: Client, begin_s: float, end_s: float) -> dict[str, GpuSeries]:
    """The node's CPU and DRAM energy; an older daemon tells none."""
    try:
        loads = client.node_history(since=begin_s, until=end_s, points=_POINTS)
    except PowerdError:
        return {}
    step_s = max(1.0, (end_s - begin_s) / _POINTS)
    when = tuple(load.wall_ns / 1e9 for load in loads)
    found = {"cpu": tuple(load.cpu_energy_j for load in loads), "dram": tuple(load.dram_energy_j for load in loads)}
    unknown = (None,) * len(loads)
    return {
        name: GpuSeries(name, None, name, step_s, when, values, unknown)
        for name, values in found.items()
        if any(v is not None for v in values)
    }


def _series(stored: HistorySeries, index: int, name: str) -> GpuSeries:
    def column(key: str, factor: float) -> tuple[float | None, ...]:
        values = stored.columns.get(key) or (None,) * len(stored.time_s)  # an older daemon may not have it
        return tuple(None if v is None else v * factor for v in values)

    limits = [v for v in column("power_limit_enforced_mw", 1e-3) if v is not None]
    # A bucket holds the counter's last value in it: that was read at its end.
    return GpuSeries(
        stored.uuid, index, name, stored.step_s, tuple(t + stored.step_s for t in stored.time_s), column("energy_mj", 1e-3),
        column("power_mw", 1e-3), column("epoch", 1.0), max(limits, default=None),
    )  # fmt: skip
