"""Who keeps the TTFT on one instance: prompts of every length wait in one queue, but each class of lengths has its own promise.

House rules: pure; closed forms only; a bucket of lengths that lies in two classes is judged by both, each prompt in it taken for
the longest that it can be; a class of which nothing was seen is judged by its shortest prompt, because it may come any moment.

What is modelled: a prompt waits for those before it as in M/G/1 (its tail taken for exponential) and is then computed in rounds
of full chunks beside the decoding batch, the first of them after the iteration that runs when it comes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from powerd_policies.dynamollm.classes import PromptSlo

CV2: Final = (
    1.5  # squared coefficient of variation of prompts: that of the published conversation trace is 1.1, of the coding one 0.9
)
MARGIN: Final = 0.95  # of the TTFT is planned for

#: Lengths of prompts as a histogram tells them: (share of all, more than so many tokens, at most so many), ascending.
Bands = Sequence[tuple[float, float, float]]


@dataclass(frozen=True, slots=True)
class Queue:
    """What waits in front of a prompt: of a second so much is busy with prompts, one of which takes ``service_s`` on average."""

    busy: float
    service_s: float
    peers: int = 1  # instances that share the arrivals by load
    cv2: float = CV2  # squared coefficient of variation of prompts

    def beyond(self, left_s: float) -> float:
        """Return the share of prompts that wait longer than ``left_s`` seconds (Sakasegawa's form of M/G/n)."""
        if left_s <= 0 or self.busy >= 1:
            return 1.0
        if self.busy <= 0:
            return 0.0
        waits = self.busy ** (math.sqrt(2.0 * (self.peers + 1)) - 1.0)
        scale_s = self.service_s * (1.0 + self.cv2) / (2.0 * self.peers * (1.0 - self.busy))
        return float(waits * math.exp(-left_s / scale_s))


@dataclass(frozen=True, slots=True)
class Promised:
    """One class as it is now: its TTFT, and (share of it, longest prompt) of what was seen of it."""

    ttft_s: float
    lengths: tuple[tuple[float, float], ...]

    def late(self, queue: Queue, room: float, full_s: float, decode_s: float) -> float:
        """Return the share that misses the TTFT, a full iteration taking ``full_s`` for ``room`` prompt tokens."""
        left_s = MARGIN * self.ttft_s - decode_s
        return sum(share * queue.beyond(left_s - _rounds(tokens, room) * full_s) for share, tokens in self.lengths)


def promised(classes: Sequence[PromptSlo], bands: Bands) -> tuple[Promised, ...]:
    """Return every class with what ``bands`` say of it."""
    found, over = [], 0.0
    for each in classes:
        upto = math.inf if each.max_prompt_tokens is None else float(each.max_prompt_tokens)
        own = [(share, min(high, upto)) for share, low, high in bands if share > 0 and low < upto and high > over]
        total = sum(share for share, _ in own)
        lengths = tuple((share / total, tokens) for share, tokens in own) if own else ((1.0, over + 1.0),)
        found.append(Promised(each.ttft_s, lengths))
        over = upto
    return tuple(found)


def mean_tokens(bands: Bands) -> float:
    """Return the mean length, each prompt taken for the longest of its bucket (the last one has no longest: for its shortest)."""
    return sum(share * (low if math.isinf(high) else high) for share, low, high in bands)


def spread(bands: Bands) -> float:
    """Return the squared coefficient of variation of lengths, from 1.0: what is within a bucket is not seen."""
    if any(math.isinf(high) for _, _, high in bands):
        return CV2
    return max(1.0, sum(share * high * high for share, _, high in bands) / mean_tokens(bands) ** 2 - 1.0)


def _rounds(tokens: float, room: float) -> float:
    return math.inf if math.isinf(tokens) else math.ceil(tokens / room)
