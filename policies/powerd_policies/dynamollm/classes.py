"""Request classes and what each was promised: nine by default, short, medium and long prompts by short, medium and long answers.

House rules: a class is addressed by its name in plans and files and by its index in hot loops; bounds are exclusive below, so a
prompt of 256 tokens is already medium; a prompt beyond the last bound has no class and is refused by whoever admits it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

SIZES: Final = ("S", "M", "L")
NAMES: Final = tuple(i + o for i in SIZES for o in SIZES)  # SS SM SL MS MM ML LS LM LL


@dataclass(frozen=True, slots=True)
class Slo:
    """A promise: seconds to the first token, and seconds between tokens that 99 of 100 gaps of a request keep."""

    ttft_s: float
    tbt_s: float


@dataclass(frozen=True, slots=True)
class PromptSlo:
    """What prompts of at most so many tokens are promised, which are too long for the class before; None: of any length."""

    max_prompt_tokens: int | None
    ttft_s: float


def _default_slos() -> dict[str, Slo]:
    ttft_s = {"S": 0.25, "M": 0.4, "L": 2.0}
    return {name: Slo(ttft_s[name[0]], 0.1) for name in NAMES}


@dataclass(frozen=True, slots=True)
class Classes:
    """Where classes begin and end, in tokens, and their SLOs (DynamoLLM section 3; thresholds of the published traces)."""

    prompt_bounds: tuple[int, int, int] = (256, 1024, 8193)  # S below the first, M below the second, L below the third
    output_bounds: tuple[int, int] = (100, 350)  # S below the first, M below the second, L from there
    slos: Mapping[str, Slo] = field(default_factory=_default_slos)

    def size_of_prompt(self, tokens: int) -> int | None:
        """Return 0, 1 or 2 for short, medium and long; None for a prompt beyond the context limit."""
        return next((n for n, bound in enumerate(self.prompt_bounds) if tokens < bound), None)

    def size_of_output(self, tokens: int) -> int:
        """Return 0, 1 or 2 for short, medium and long."""
        return next((n for n, bound in enumerate(self.output_bounds) if tokens < bound), 2)

    def index(self, prompt_tokens: int, output_tokens: int) -> int | None:
        """Return the class's place in ``NAMES``; None for a prompt beyond the context limit."""
        size = self.size_of_prompt(prompt_tokens)
        return None if size is None else 3 * size + self.size_of_output(output_tokens)

    def name(self, prompt_tokens: int, output_tokens: int) -> str | None:
        """Return the class's name, such as ``ML``; None for a prompt beyond the context limit."""
        at = self.index(prompt_tokens, output_tokens)
        return None if at is None else NAMES[at]

    def by_prompt(self) -> tuple[Slo, tuple[PromptSlo, ...]]:
        """Return what an instance that serves all classes promises: the SLO of the longest prompts, and shorter ones' TTFTs.

        Classes that differ in their answers only, which nobody knows beforehand, get the strictest of theirs; so do prompts that
        are shorter than those of a stricter class. TBT is one: all requests of an instance share its iterations.
        """
        ttfts_s = [min(slo.ttft_s for name, slo in self.slos.items() if name[0] == size) for size in SIZES]
        ttfts_s = [min(ttfts_s[n:]) for n in range(len(SIZES))]
        shorter = [
            PromptSlo(bound - 1, ttft_s) for n, (bound, ttft_s) in enumerate(zip(self.prompt_bounds[:-1], ttfts_s, strict=False))
            if ttft_s < ttfts_s[n + 1]
        ]  # fmt: skip
        return Slo(ttfts_s[-1], min(slo.tbt_s for slo in self.slos.values())), tuple(shorter)

    @property
    def context_limit(self) -> int:
        """The longest prompt, in tokens."""
        return self.prompt_bounds[2] - 1


def dominates(larger: str, smaller: str) -> bool:
    """Whether a pool of ``larger`` holds requests of ``smaller``: no shorter in prompt and in answer."""
    return all(SIZES.index(a) >= SIZES.index(b) for a, b in zip(larger, smaller, strict=True))
