"""An inference engine's metrics page -> the few figures that its clock is decided from. vLLM and SGLang by their own names.

House rules: pure; only lines of wanted names are looked at; a page that is cut off, that contradicts itself or that holds a
figure that cannot be is refused as a whole with one line that says why; several engines on one page are summed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise


class PageError(ValueError):
    """The page cannot be believed; the message says why and quotes nothing of it but names."""


@dataclass(frozen=True, slots=True)
class Names:
    """What one engine calls things; of several names the first that is on the page counts."""

    running: str
    waiting: str
    kv_used: tuple[str, ...]
    ttft: str
    gap: tuple[str, ...]  # between tokens of one request
    prompt_tokens: str
    output_tokens: str
    preemptions: str
    prompts: str  # lengths of prompts


ENGINES: Mapping[str, Names] = {
    "vllm": Names(
        "vllm:num_requests_running", "vllm:num_requests_waiting",
        ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"), "vllm:time_to_first_token_seconds",
        ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
        "vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:num_preemptions_total",
        "vllm:request_prompt_tokens",
    ),
    "sglang": Names(
        "sglang:num_running_reqs", "sglang:num_queue_reqs", ("sglang:token_usage",), "sglang:time_to_first_token_seconds",
        ("sglang:inter_token_latency_seconds",),
        "sglang:prompt_tokens_total", "sglang:generation_tokens_total", "sglang:num_retracted_requests_total",
        "sglang:prompt_tokens_histogram",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Histogram:
    """Observations by bucket: ``counts[i]`` of them at most ``edges[i]``, cumulative; the last edge is infinite."""

    edges: tuple[float, ...]
    counts: tuple[float, ...]

    @property
    def total(self) -> float:
        """All observations."""
        return self.counts[-1]

    def since(self, earlier: Histogram) -> Histogram | None:
        """The observations since an earlier reading; None when it is not the same histogram any more or has restarted."""
        if self.edges != earlier.edges:
            return None
        counts = tuple(now - before for now, before in zip(self.counts, earlier.counts, strict=True))
        if counts[0] < 0 or any(b < a for a, b in pairwise(counts)):
            return None
        return Histogram(self.edges, counts)

    def upper_edge(self, share: float) -> tuple[float, bool] | None:
        """The edge below which at least ``share`` of the observations are, and whether it is one.

        (last finite edge, False): they are beyond it. None without observations.
        """
        if self.total <= 0:
            return None
        wanted = share * self.total - 1e-9 * self.total
        at = next(i for i, count in enumerate(self.counts) if count >= wanted)
        if math.isinf(self.edges[at]):
            return (self.edges[at - 1] if at else 0.0), False
        return self.edges[at], True

    def share_within(self, bound: float) -> float | None:
        """The share of observations that are surely at most ``bound``; None without observations."""
        if self.total <= 0:
            return None
        within = [count for edge, count in zip(self.edges, self.counts, strict=True) if edge <= bound]
        return (within[-1] if within else 0.0) / self.total

    def share_beyond(self, bound: float) -> float:
        """The share of observations that are surely more than ``bound``; 0.0 without observations."""
        at = next(i for i, edge in enumerate(self.edges) if edge >= bound)
        return 1.0 - self.counts[at] / self.total if self.total > 0 else 0.0

    def bands(self) -> tuple[tuple[float, float, float], ...]:
        """(share, more than, at most) of each bucket that holds observations, ascending."""
        rows = zip(self.counts, (0.0, *self.counts), (0.0, *self.edges), self.edges, strict=False)
        return tuple(((upto - before) / self.total, low, high) for upto, before, low, high in rows if upto > before)

    def plus(self, other: Histogram) -> Histogram | None:
        """Both together; None when their buckets differ."""
        if self.edges != other.edges:
            return None
        return Histogram(self.edges, tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)))


@dataclass(frozen=True, slots=True)
class EnginePage:
    """What one page says, summed over its engines; the KV memory is that of the fullest. None: not on the page."""

    engine: str
    running: int
    waiting: int
    kv_used_ratio: float | None
    prompt_tokens: float | None
    output_tokens: float | None
    preemptions: float | None
    ttft: Histogram | None
    gap: Histogram | None
    prompts: Histogram | None = None  # tokens of the prompts of those that have ended


@dataclass(slots=True)
class _Found:
    sums: dict[str, float] = field(default_factory=dict)
    highest: dict[str, float] = field(default_factory=dict)
    buckets: dict[str, dict[float, float]] = field(default_factory=dict)
    lines: dict[tuple[str, float], int] = field(default_factory=dict)  # of each bucket: as many as there are engines


# A name, labels whose quoted values may hold anything, a value; what follows (a time, an exemplar) is not looked at.
_SAMPLE = re.compile(r'([a-zA-Z_:][\w:]*)(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})?[ \t]+(\S+)')
_EDGE = re.compile(r'(?:^|[,{ ])le="([^"\\]*)"')
_PREFIXES = tuple(f"{engine}:" for engine in ENGINES)


def _plain(names: Names) -> tuple[str, ...]:
    return (names.running, names.waiting, *names.kv_used, names.prompt_tokens, names.output_tokens, names.preemptions)


_PLAIN = frozenset(name for names in ENGINES.values() for name in _plain(names))
_HISTOGRAMS = frozenset(
    f"{name}{end}" for n in ENGINES.values() for name in (n.ttft, *n.gap, n.prompts) for end in ("_bucket", "_count")
)


def parse(text: str, engine: str = "auto") -> EnginePage:
    """Read a page of ``engine`` (vllm, sglang, or auto: whichever it is). PageError when it cannot be believed."""
    if not text.endswith("\n"):
        raise PageError("the page is cut off")
    found = _Found()
    for line in text.split("\n"):
        if line.startswith(_PREFIXES):
            _take(found, line)
    on_it = [name for name, names in ENGINES.items() if names.running in found.sums]
    if engine == "auto":
        if len(on_it) != 1:
            raise PageError("it is the page of both vLLM and SGLang" if on_it else "it is no page of vLLM or SGLang")
        engine = on_it[0]
    names = ENGINES[engine]
    for needed in (names.running, names.waiting):
        if needed not in found.sums:
            raise PageError(f"{needed} is not on the page")
    kv = next((found.highest[name] for name in names.kv_used if name in found.highest), None)
    if kv is not None and kv > 1.0 + 1e-6:
        raise PageError(f"the KV memory is used beyond all of it: {kv:g}")
    return EnginePage(
        engine, _whole(found.sums[names.running], names.running), _whole(found.sums[names.waiting], names.waiting), kv,
        found.sums.get(names.prompt_tokens), found.sums.get(names.output_tokens), found.sums.get(names.preemptions),
        _histogram(found, names.ttft), next((h for name in names.gap if (h := _histogram(found, name)) is not None), None),
        _histogram(found, names.prompts),
    )  # fmt: skip


def _take(found: _Found, line: str) -> None:
    name = line.partition("{")[0].partition(" ")[0]
    histogram = name in _HISTOGRAMS
    if not histogram and name not in _PLAIN:
        return
    match = _SAMPLE.match(line)
    if match is None:
        raise PageError(f"{name}: a line that is none")
    try:
        value = float(match[3])
    except ValueError:
        raise PageError(f"{name}: no number") from None
    if not 0 <= value < math.inf:
        raise PageError(f"{name}: {value:g} cannot be")
    if not histogram or name.endswith("_count"):
        found.sums[name] = found.sums.get(name, 0.0) + value
        found.highest[name] = max(found.highest.get(name, 0.0), value)
        return
    edge = _EDGE.search(match[2] or "")
    try:
        le = float(edge[1]) if edge is not None else math.nan
    except ValueError:
        le = math.nan
    if math.isnan(le):
        raise PageError(f"{name}: a bucket without its edge")
    buckets = found.buckets.setdefault(name, {})
    buckets[le] = buckets.get(le, 0.0) + value
    found.lines[name, le] = found.lines.get((name, le), 0) + 1


def _whole(value: float, name: str) -> int:
    if value != int(value):
        raise PageError(f"{name}: {value:g} is no number of requests")
    return int(value)


def _histogram(found: _Found, name: str) -> Histogram | None:
    buckets = found.buckets.get(f"{name}_bucket")
    if buckets is None:
        return None
    edges = tuple(sorted(buckets))
    counts = tuple(buckets[edge] for edge in edges)
    if not math.isinf(edges[-1]):
        raise PageError(f"{name}: the last bucket is missing")
    if any(b < a for a, b in pairwise(counts)):
        raise PageError(f"{name}: its buckets fall")
    if len({found.lines[f"{name}_bucket", edge] for edge in edges}) != 1:
        raise PageError(f"{name}: the engines on this page have different buckets")
    if abs(found.sums.get(f"{name}_count", counts[-1]) - counts[-1]) > 1e-6 * counts[-1] + 0.5:
        raise PageError(f"{name}: its count is not that of its buckets")
    return Histogram(edges, counts)
