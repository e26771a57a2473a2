"""Pages of one engine over a window of time -> its load, its latencies, and whether they keep what was promised.

House rules: pure; times are nanoseconds of the daemon's clock; a counter that fell is a restart, after which nothing before it
counts; a p99 is the upper edge of its bucket, so that a coarse bucket is never taken for a kept promise.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from powerd.clock import NS
from powerd.enginepage import EnginePage, Histogram, PageError
from powerd.replicatypes import SloSpec

RATE_S = 5.0  # rates are over so long at most,
RATE_MIN_S = 2.0  # and over so long at least: few requests in a moment are no rate
LENGTHS_S = 300.0  # lengths of prompts are remembered so long: of the long ones there are few
LENGTHS_MIN = 10  # of fewer requests nothing is said
_P50, _P99 = 0.5, 0.99
_EDGE = 1e-9


@dataclass(frozen=True, slots=True)
class Latency:
    """One kind of latency over the window; ``exact`` False: p99 lies beyond the last edge, which stands for it."""

    p50_s: float | None = None
    p99_s: float | None = None
    exact: bool = True
    share: float | None = None  # of those that surely kept the promise
    kept: bool | None = None  # whether p99 surely keeps it; None: nothing was observed


@dataclass(frozen=True, slots=True)
class Figures:
    """What the window says; None: not known."""

    page: EnginePage
    window_s: float
    requests_per_s: float | None
    prompt_tokens_per_s: float | None
    output_tokens_per_s: float | None
    preemptions: int | None
    ttft: Latency
    tbt: Latency
    ttft_seen: Histogram | None
    tbt_seen: Histogram | None
    prompts: Histogram | None = None  # that ended within a longer time; None: not enough is known

    @property
    def within_slo(self) -> bool | None:
        """Whether both promises were surely kept; None: nothing was observed."""
        kept = [k for k in (self.ttft.kept, self.tbt.kept) if k is not None]
        return all(kept) if kept else None


class LoadWindow:
    """The newest pages of one engine."""

    def __init__(self, slo: SloSpec, window_s: float) -> None:
        self._slo, self._window_ns = slo, round(window_s * NS)
        self._pages: deque[tuple[int, EnginePage]] = deque()
        self._prompts: deque[tuple[int, Histogram]] = deque()

    def clear(self) -> None:
        """Forget every page."""
        self._pages.clear()
        self._prompts.clear()

    def add(self, at_ns: int, page: EnginePage) -> Figures:
        """Take a page and say what the window holds now; PageError when the engine has restarted (the page is kept)."""
        restarted = bool(self._pages) and _restarted(self._pages[-1][1], page)
        if restarted or (self._pages and at_ns <= self._pages[-1][0]):
            self.clear()
        self._pages.append((at_ns, page))
        if page.prompts is not None:
            self._prompts.append((at_ns, page.prompts))
        while len(self._pages) > 2 and self._pages[1][0] <= at_ns - self._window_ns:
            self._pages.popleft()
        while len(self._prompts) > 2 and self._prompts[1][0] <= at_ns - round(LENGTHS_S * NS):
            self._prompts.popleft()
        if restarted:
            raise PageError("its counters have restarted")
        return self._figures()

    def _figures(self) -> Figures:
        (end_ns, page), (begin_ns, first) = self._pages[-1], self._pages[0]
        # The oldest page within the time that rates are over, and the one before this page when there is none.
        recent_ns, recent = next(
            ((t, p) for t, p in list(self._pages)[:-1] if t >= end_ns - round(RATE_S * NS)),
            self._pages[max(0, len(self._pages) - 2)],
        )
        span_s, shortest_s = (end_ns - recent_ns) / NS, min(RATE_MIN_S, self._window_ns / NS)

        def rate(of: Callable[[EnginePage], float | None]) -> float | None:
            now, before = of(page), of(recent)
            return None if now is None or before is None or span_s < shortest_s else (now - before) / span_s

        def answered(p: EnginePage) -> float | None:
            return None if p.ttft is None else p.ttft.total

        ttft, gap = _seen(page.ttft, first.ttft), _seen(page.gap, first.gap)
        ended = _seen(page.prompts, self._prompts[0][1]) if self._prompts else None
        prompts = ended if ended is not None and ended.total >= LENGTHS_MIN else None
        longer = _longer(self._slo, (prompts, _seen(page.prompts, first.prompts)))
        preempted = None if page.preemptions is None or first.preemptions is None else page.preemptions - first.preemptions
        return Figures(
            page, (end_ns - begin_ns) / NS, rate(answered), rate(lambda p: p.prompt_tokens), rate(lambda p: p.output_tokens),
            None if preempted is None else round(preempted), _latency(ttft, longer), _latency(gap, [(self._slo.tbt_s, 0.0)]),
            ttft, gap, prompts,
        )  # fmt: skip


def _seen(now: Histogram | None, before: Histogram | None) -> Histogram | None:
    return None if now is None or before is None else now.since(before)


def _restarted(before: EnginePage, now: EnginePage) -> bool:
    if before.engine != now.engine:
        return True
    for name in ("prompt_tokens", "output_tokens", "preemptions"):
        was, value = getattr(before, name), getattr(now, name)
        if was is not None and (value is None or value < was):
            return True
    pairs = ((before.ttft, now.ttft), (before.gap, now.gap), (before.prompts, now.prompts))
    return any(was is not None and (new is None or new.since(was) is None) for was, new in pairs)


def _longer(slo: SloSpec, seen: Sequence[Histogram | None]) -> list[tuple[float | None, float]]:
    """Every TTFT that is promised, and the share of prompts that surely may be later: they are of longer classes.

    Of several looks at the lengths the least share counts; without one nobody may.
    """
    known = [histogram for histogram in seen if histogram is not None and histogram.total > 0]
    sure = len(known) == len(seen)
    shares = [min(h.share_beyond(c.max_prompt_tokens) for h in known) if sure else 0.0 for c in slo.classes]
    return [*zip((c.ttft_s for c in slo.classes), shares, strict=True), (slo.ttft_s, 0.0)]


def _latency(seen: Histogram | None, promised: Sequence[tuple[float | None, float]]) -> Latency:
    """``promised``: seconds, and the share that may be later all the same."""
    if seen is None or (p99 := seen.upper_edge(_P99)) is None:
        return Latency()
    median = seen.upper_edge(_P50)
    shares = [share + longer for s, longer in promised if s is not None and (share := seen.share_within(s)) is not None]
    kept = min(1.0, *shares) if shares else None
    return Latency(None if median is None else median[0], *p99, kept, None if kept is None else kept >= _P99 - _EDGE)


def between_edges(page: EnginePage, slo: SloSpec) -> str:
    """What to tell an operator whose promise lies between two buckets; empty when it does not."""
    said = []
    ttfts = dict.fromkeys([*(c.ttft_s for c in slo.classes), slo.ttft_s])
    for what, histogram, promised_s in (*(("TTFT", page.ttft, each_s) for each_s in ttfts), ("TBT", page.gap, slo.tbt_s)):
        if promised_s is not None and (edges := _around(histogram, promised_s)) is not None:
            where = _and(edges, f"{what}: {promised_s:g} s lies between the engine's bucket edges ")
            said.append(f"{where}: it is judged at {edges[0]:g} s")
    for each in slo.classes:
        if (edges := _around(page.prompts, each.max_prompt_tokens)) is not None:
            where = _and(edges, f"classes: {each.max_prompt_tokens} tokens lie between the engine's bucket edges ")
            said.append(f"{where}: what is between is judged as both classes")
    return "; ".join(said)


def _and(edges: tuple[float, float], text: str) -> str:
    return f"{text}{edges[0]:g}{'' if math.isinf(edges[1]) else f' and {edges[1]:g}'}"


def _around(histogram: Histogram | None, value: float) -> tuple[float, float] | None:
    """The edges that a value lies between; None where it is one."""
    if histogram is None or value in histogram.edges:
        return None
    return max((e for e in histogram.edges if e < value), default=0.0), min(e for e in histogram.edges if e > value)
