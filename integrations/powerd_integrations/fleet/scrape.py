"""Reads an engine's own Prometheus page: vLLM's and SGLang's names, as one instance's load.

House rules: what a page does not say is ``None``; garbage is an error, never zeros; rates come from two pages of one process,
so a counter that fell (the engine was restarted) gives none.
"""

from __future__ import annotations

import math
import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from powerd_policies.dynamollm.fleet import InstanceLoad

MAX_BYTES: Final = 8 * 2**20
_LINE: Final = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{[^}]*\})?\s+(\S+)(?:\s+-?\d+)?$")
#: What we read -> its names, vLLM's first, SGLang's second.
_RUNNING: Final = ("vllm:num_requests_running", "sglang:num_running_reqs")
_QUEUED: Final = ("vllm:num_requests_waiting", "sglang:num_queue_reqs")
_KV: Final = ("vllm:kv_cache_usage_perc", "sglang:token_usage")
_REQUESTS: Final = ("vllm:e2e_request_latency_seconds_count", "sglang:e2e_request_latency_seconds_count")
_PROMPT_TOKENS: Final = ("vllm:prompt_tokens_total", "sglang:prompt_tokens_total")
_OUTPUT_TOKENS: Final = ("vllm:generation_tokens_total", "sglang:generation_tokens_total")


class ScrapeError(ValueError):
    """A page that is no engine's; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Page:
    """One page: the sum of each metric over its labels, at a time."""

    at_s: float
    totals: Mapping[str, float]

    def first(self, names: tuple[str, ...]) -> float | None:
        """Return the value of the first of the names that the page has."""
        return next((self.totals[name] for name in names if name in self.totals), None)


def parse(text: str, at_s: float) -> Page:
    """Read a page in Prometheus' text format; lines that are none are skipped, values that are no numbers too."""
    totals: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("#") or not (match := _LINE.match(line.strip())):
            continue
        try:
            value = float(match[2])
        except ValueError:
            continue
        if math.isfinite(value):
            totals[match[1]] = totals.get(match[1], 0.0) + value
    return Page(at_s, totals)


def load_of(page: Page, before: Page | None = None) -> InstanceLoad:
    """Return the load that a page tells, with rates since ``before``; ScrapeError when it tells no engine's load."""
    running, queued, kv = page.first(_RUNNING), page.first(_QUEUED), page.first(_KV)
    if running is None or queued is None:
        raise ScrapeError(f"the page has neither {' nor '.join(_RUNNING if running is None else _QUEUED)}")
    if running < 0 or queued < 0:
        raise ScrapeError(f"the page tells of {running:g} running and {queued:g} waiting requests")
    return InstanceLoad(
        running=int(running),
        queued=int(queued),
        queued_prompt_tokens=None,
        kv_used_ratio=kv if kv is not None and 0.0 <= kv <= 1.0 else None,
        oldest_wait_s=None,
        requests_per_s=_rate(page, before, _REQUESTS),
        prompt_tokens_per_s=_rate(page, before, _PROMPT_TOKENS),
        output_tokens_per_s=_rate(page, before, _OUTPUT_TOKENS),
    )


def finished_since(page: Page, before: Page | None) -> tuple[int, int, int] | None:
    """Return requests, prompt tokens and output tokens that the engine finished between two pages; None: it cannot be said."""
    if before is None:
        return None
    found = []
    for names in (_REQUESTS, _PROMPT_TOKENS, _OUTPUT_TOKENS):
        new, old = page.first(names), before.first(names)
        if new is None or old is None or new < old:
            return None
        found.append(round(new - old))
    return found[0], found[1], found[2]


def fetch(url: str, at_s: float, timeout_s: float = 2.0) -> Page:
    """Fetch an engine's page; OSError when it does not answer."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"an engine's URL begins with http:// or https://, not {url!r}")
    with urllib.request.urlopen(url, timeout=timeout_s) as answer:  # noqa: S310  (scheme checked above)
        return parse(answer.read(MAX_BYTES).decode("utf-8", "replace"), at_s)


def _rate(page: Page, before: Page | None, names: tuple[str, ...]) -> float | None:
    if before is None or page.at_s <= before.at_s:
        return None
    new, old = page.first(names), before.first(names)
    if new is None or old is None or new < old:
        return None
    return (new - old) / (page.at_s - before.at_s)
