"""Token pace as a promise: an answer need not be written faster than it is read (beyond DynamoLLM).

House rules: a pace only ever tightens or keeps a class's SLO, never loosens it; who reads nothing (a batch) has no pace; what a
reader has ahead is counted from what was delivered, never assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from powerd_policies.dynamollm.classes import Classes, Slo

#: Silent reading of English non-fiction, words per minute (Brysbaert 2019), and the tokens of a word that are usual in English.
READING_WORDS_PER_MIN: Final = 238.0
TOKENS_PER_WORD: Final = 1.33
READING_TOKENS_PER_S: Final = READING_WORDS_PER_MIN / 60.0 * TOKENS_PER_WORD


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast answers of each class are read; ``by_class`` None: by nobody, the class is a batch and keeps its SLO alone.

    ``faster`` is how much faster than it is read an answer is written, so that a reader who skims does not wait.
    """

    tokens_per_s: float | None = READING_TOKENS_PER_S
    by_class: Mapping[str, float | None] = field(default_factory=dict)
    faster: float = 2.0

    def __post_init__(self) -> None:
        for name, rate in {"a class": self.tokens_per_s, **self.by_class}.items():
            if rate is not None and rate <= 0.0:
                raise ValueError(f"{name} is read at {rate:g} tokens/s: above 0, or None for one that nobody reads")
        if self.faster < 1.0:
            raise ValueError(f"answers written at {self.faster:g} of the speed at which they are read: at least 1")

    def tbt_s(self, name: str, slo: Slo) -> float:
        """Return the seconds between tokens that a clock may be chosen for: the reader's, never above the class's SLO."""
        rate = self.by_class.get(name, self.tokens_per_s)
        return slo.tbt_s if rate is None else min(slo.tbt_s, 1.0 / (rate * self.faster))

    def apply(self, classes: Classes) -> Classes:
        """Return the classes with the pace in their SLOs: what a controller that knows no pace is given."""
        return replace(classes, slos={name: replace(slo, tbt_s=self.tbt_s(name, slo)) for name, slo in classes.slos.items()})

    def ahead_s(self, name: str, delivered_tokens: int, since_first_token_s: float) -> float | None:
        """Return for how long a reader still has something to read if nothing more came; None: nobody reads.

        Negative: the reader waits. A clock may be lowered for readers who are ahead, as long as their gaps keep the SLO.
        """
        rate = self.by_class.get(name, self.tokens_per_s)
        return None if rate is None else delivered_tokens / rate - since_first_token_s
