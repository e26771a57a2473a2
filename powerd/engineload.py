"""Pages of one engine over a window of time -> its load, its latencies, and whether they keep what was promised.

House rules: pure; times are nanoseconds of the daemon's clock; a counter that fell is a restart, after which nothing before it
counts; a p99 is the upper edge of its bucket, so that a coarse bucket is never taken for a kept promise.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from powerd.clock import NS
from powerd.enginepage import EnginePage, Histogram, PageError
from powerd.replicatypes import SloSpec

RATE_S = 5.0  # rates are over so long at most,
RATE_MIN_S = 2.0  # and over so long at least: few requests in a moment are no rate
_P50, _P99 = 0.5, 0.99


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

    def clear(self) -> None:
        """Forget every page."""
        self._pages.clear()

    def add(self, at_ns: int, page: EnginePage) -> Figures:
        """Take a page and say what the window holds now; PageError when the engine has restarted (the page is kept)."""
        restarted = bool(self._pages) and _restarted(self._pages[-1][1], page)
        if restarted or (self._pages and at_ns <= self._pages[-1][0]):
            self._pages.clear()
        self._pages.append((at_ns, page))
        while len(self._pages) > 2 and self._pages[1][0] <= at_ns - self._window_ns:
            self._pages.popleft()
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
        preempted = None if page.preemptions is None or first.preemptions is None else page.preemptions - first.preemptions
        return Figures(
            page, (end_ns - begin_ns) / NS, rate(answered), rate(lambda p: p.prompt_tokens), rate(lambda p: p.output_tokens),
            None if preempted is None else round(preempted), _latency(ttft, self._slo.ttft_s), _latency(gap, self._slo.tbt_s),
            ttft, gap,
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
    pairs = ((before.ttft, now.ttft), (before.gap, now.gap))
    return any(was is not None and (new is None or new.since(was) is None) for was, new in pairs)


def _latency(seen: Histogram | None, promised_s: float) -> Latency:
    if seen is None or (p99 := seen.upper_edge(_P99)) is None:
        return Latency()
    median = seen.upper_edge(_P50)
    edge_s, exact = p99
    return Latency(
        None if median is None else median[0], edge_s, exact, seen.share_within(promised_s), exact and edge_s <= promised_s
    )


def between_edges(page: EnginePage, slo: SloSpec) -> str:
    """What to tell an operator whose promise lies between two buckets; empty when it does not."""
    said = []
    for what, histogram, promised_s in (("TTFT", page.ttft, slo.ttft_s), ("TBT", page.gap, slo.tbt_s)):
        if histogram is None or promised_s in histogram.edges:
            continue
        below = max((e for e in histogram.edges if e < promised_s), default=0.0)
        above = min(e for e in histogram.edges if e > promised_s)
        to = "" if math.isinf(above) else f" and {above:g}"
        said.append(f"{what}: {promised_s:g} s lies between the engine's bucket edges {below:g}{to}: it is judged at {below:g} s")
    return "; ".join(said)
