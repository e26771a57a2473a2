"""How long a prompt is and how long its answer will be, as far as a router can know that without a tokenizer.

House rules: what the client declares counts, what it caps bounds, the rest is what answers to prompts of this size had lately;
nothing looks ahead: an answer is learned from when it is whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from powerd_policies.dynamollm.classes import Classes

PROMPT_HEADER: Final = "x-prompt-tokens"
KEPT: Final = 512
UNKNOWN_TOKENS: Final = 128


def prompt_tokens(body: Mapping[str, Any], headers: Mapping[str, str], tokens_per_character: float) -> int:
    """Return the prompt's tokens: declared in ``X-Prompt-Tokens``, counted where the prompt is tokens, else estimated."""
    declared = headers.get(PROMPT_HEADER, "")
    if declared.isdecimal():
        return max(1, int(declared))
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        return len(prompt)
    if isinstance(prompt, list):
        characters = sum(len(str(part)) for part in prompt)
    elif prompt is not None:
        characters = len(str(prompt))
    else:
        messages = body.get("messages")
        characters = sum(_characters(message) for message in messages) if isinstance(messages, list) else 0
    return max(1, round(characters * tokens_per_character))


def wanted_tokens(body: Mapping[str, Any]) -> int | None:
    """Return the most tokens that the client takes; None: as many as it gets."""
    for name in ("max_completion_tokens", "max_tokens"):
        value = body.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


class OutputSizes:
    """Predicts answers by the mean of the last ones to prompts of the same size."""

    def __init__(self, classes: Classes) -> None:
        self._classes = classes
        self._seen: tuple[deque[int], ...] = tuple(deque(maxlen=KEPT) for _ in range(3))

    def predict(self, prompt_size: int, at_most: int | None) -> int:
        """Return the tokens that an answer is expected to have."""
        seen = self._seen[prompt_size]
        mean = round(sum(seen) / len(seen)) if seen else UNKNOWN_TOKENS if at_most is None else at_most
        return max(1, mean if at_most is None else min(mean, at_most))

    def learn(self, prompt: int, answer_tokens: int) -> None:
        """Take the length of a whole answer."""
        size = self._classes.size_of_prompt(prompt)
        if size is not None and answer_tokens > 0:
            self._seen[size].append(answer_tokens)


def _characters(message: Any) -> int:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        return sum(len(str(part.get("text", ""))) for part in content if isinstance(part, dict))
    return len(str(content or ""))
