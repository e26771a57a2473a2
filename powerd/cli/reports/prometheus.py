"""A report's data from the metrics server that all nodes share: Prometheus, VictoriaMetrics or anything with their query API.

House rules: two metrics are enough, the GPU's energy and which job runs on it; a sample keeps the time at which it was scraped;
an answer that is not understood is an error with the server's own words.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from powerd.cli.reports.counters import GpuSeries
from powerd.cli.reports.nodes import NodeData
from powerd.errors import RequestError, UnavailableError

ENERGY = "powerd_gpu_energy_joules_total"
POWER = "powerd_gpu_power_watts"
JOB = "powerd_job_gpu"
INFO = "powerd_gpu_info"
_POINTS = 2000
_MIN_STEP_S = 1.0
_MAX_ANSWER_BYTES = 256 << 20

Key = tuple[str, str]  # instance, UUID


def quoted(text: str) -> str:
    """A label's value as PromQL writes it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


@dataclass(frozen=True, slots=True)
class Server:
    """One metrics server; ``token`` is sent as a bearer token."""

    url: str
    token: str | None = None
    timeout_s: float = 30.0

    @classmethod
    def at(cls, url: str, token_file: str | None, timeout_s: float) -> Server:
        """RequestError for an address that is none, or a token that cannot be read."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RequestError(f"not a metrics server's address: {url!r}", hint="write http://HOST:9090")
        try:
            token = None if token_file is None else Path(token_file).read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            raise RequestError(f"cannot read the token file {token_file}: {error}") from error
        return cls(url.rstrip("/"), token, timeout_s)

    def ask(self, path: str, **query: object) -> list[Mapping[str, Any]]:
        """The series of one query; UnavailableError with what the server said."""
        request = urllib.request.Request(f"{self.url}{path}?{urlencode(query)}")  # noqa: S310 (the scheme was checked)
        if self.token is not None:
            request.add_header("Authorization", f"Bearer {self.token}")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:  # noqa: S310
                content = json.loads(answer.read(_MAX_ANSWER_BYTES))
            if content["status"] != "success":
                raise UnavailableError(f"{self.url}: {content.get('error', 'no success')}")
            return list(content["data"]["result"])
        except urllib.error.HTTPError as error:
            raise UnavailableError(f"{self.url}: {error.code} {_words(error)}") from error
        except OSError as error:
            raise UnavailableError(f"{self.url}: {error}", hint="is this the server's address?") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UnavailableError(f"{self.url}: not a query API: {error!r}") from error

    def course(self, query: str, begin_s: float, end_s: float, step_s: float) -> dict[Key, dict[float, float]]:
        """Time -> value of every (instance, GPU) of a query over a range."""
        found: dict[Key, dict[float, float]] = {}
        answer = self.ask("/api/v1/query_range", query=query, start=f"{begin_s:.3f}", end=f"{end_s:.3f}", step=f"{step_s:.3f}")
        for series in answer:
            labels = series["metric"]
            key = (str(labels.get("instance", "")), str(labels.get("uuid", "")))
            found.setdefault(key, {}).update({float(t): float(v) for t, v in series["values"]})
        return found


def _words(error: urllib.error.HTTPError) -> str:
    text = error.read(1000).decode("utf-8", "replace")
    try:
        return str(json.loads(text).get("error", text))
    except (ValueError, AttributeError):
        return " ".join(text.split())[:200] or str(error.reason)


def collect(
    server: Server, job: str | None, begin_s: float, end_s: float, told: Callable[[int, int], None]
) -> tuple[list[NodeData], float, float]:
    """Every instance's GPUs between two Unix times, or a job's while it ran in this time; RequestError when there is none."""
    ran: dict[Key, dict[float, float]] | None = None
    told(0, 5)
    if job is not None:
        step_s = _step_s(begin_s, end_s)
        ran = server.course(f"{JOB}{{job={quoted(job)}}}", begin_s, end_s, step_s)
        seen = [t for times in ran.values() for t in times]
        if not seen:
            raise RequestError(
                f"no {JOB} of job {job[:80]!r} in this time", code="not_found", hint="--since reaches further back"
            )
        begin_s, end_s = max(begin_s, min(seen) - step_s), min(end_s, max(seen) + step_s)
        if end_s - begin_s < 4 * step_s:  # a short job in a long time: look again, closely
            ran = server.course(f"{JOB}{{job={quoted(job)}}}", begin_s, end_s, _MIN_STEP_S)
            seen = [t for times in ran.values() for t in times] or seen
            begin_s, end_s = min(seen), max(seen)
    told(1, 5)
    step_s = _step_s(begin_s, end_s)
    around = (begin_s - max(60.0, 2 * step_s), end_s + max(60.0, 2 * step_s), step_s)
    energy = server.course(ENERGY, *around)
    told(2, 5)
    scraped = server.course(f"timestamp({ENERGY})", *around)
    told(3, 5)
    power = server.course(POWER, *around)
    told(4, 5)
    who = _names(server, end_s)
    told(5, 5)
    nodes: dict[str, list[GpuSeries]] = {}
    for key in sorted(energy if ran is None else ran):
        nodes.setdefault(key[0], []).append(_series(key, energy, scraped, power, step_s, who.get(key, (None, "GPU"))))
    if not nodes:
        raise RequestError(f"the server holds no {ENERGY} in this time", code="not_found", hint="does it scrape powerd?")
    return [NodeData(name, gpus=tuple(gpus)) for name, gpus in nodes.items()], begin_s, end_s


def _step_s(begin_s: float, end_s: float) -> float:
    return max(_MIN_STEP_S, (end_s - begin_s) / _POINTS)


def _names(server: Server, at_s: float) -> dict[Key, tuple[int | None, str]]:
    found: dict[Key, tuple[int | None, str]] = {}
    for series in server.ask("/api/v1/query", query=INFO, time=f"{at_s:.3f}"):
        labels = series["metric"]
        index = str(labels.get("gpu", ""))
        key = (str(labels.get("instance", "")), str(labels.get("uuid", "")))
        found[key] = (int(index) if index.isdigit() else None, str(labels.get("name", "GPU")))
    return found


def _series(
    key: Key,
    energy: Mapping[Key, Mapping[float, float]],
    scraped: Mapping[Key, Mapping[float, float]],
    power: Mapping[Key, Mapping[float, float]],
    step_s: float,
    who: tuple[int | None, str],
) -> GpuSeries:
    """One GPU's course by the times of its scrapes: what the server repeats between two scrapes is one sample."""
    stamps = scraped.get(key, {})
    watts = power.get(key, {})
    samples: dict[float, tuple[float, float | None]] = {}
    for at_s, value in energy.get(key, {}).items():
        samples.setdefault(stamps.get(at_s, at_s), (value, watts.get(at_s)))
    ordered = sorted(samples)
    distances = sorted(b - a for a, b in pairwise(ordered))
    usual_s = max(step_s, distances[len(distances) // 2]) if distances else step_s
    return GpuSeries(
        key[1],
        who[0],
        who[1],
        usual_s,
        tuple(ordered),
        tuple(samples[t][0] for t in ordered),
        tuple(samples[t][1] for t in ordered),
    )
