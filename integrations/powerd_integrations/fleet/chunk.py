"""Whether an engine's command computes as many prompt tokens in one iteration as powerd counts with.

House rules: a chunk of prompts is the longest gap that decoding requests see, so a clock that is safe with 512 tokens is late
with 8,192; a command that says another number, and a vLLM or SGLang that says none, is refused before anything starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Final

OPTIONS: Final = {"vllm": "--max-num-batched-tokens", "sglang": "--chunked-prefill-size"}


def problem(command: Sequence[str], chunk_tokens: int) -> str:
    """What is wrong with a command for this number of tokens; empty: nothing that can be seen."""
    for engine, option in OPTIONS.items():
        said = _said(command, option)
        if said is not None and said != str(chunk_tokens):
            return f"the command says {option}={said}, powerd counts with chunk_tokens {chunk_tokens}: make them the same"
        if said is None and any(_is(word, engine) for word in command):
            return (
                f"the command lacks {option}={chunk_tokens}: iterations of its own choice may take longer than the gap "
                "between tokens that powerd counts with"
            )
    return ""


def _said(command: Sequence[str], option: str) -> str | None:
    for n, word in enumerate(command):
        name, has_value, value = word.partition("=")
        if name.replace("_", "-") == option:
            return value if has_value else command[n + 1] if n + 1 < len(command) else ""
    return None


def _is(word: str, engine: str) -> bool:
    """Whether a word of a command is that engine: its program, or its module after ``python -m``."""
    return PurePath(word).name == engine or word.startswith(f"{engine}.")
