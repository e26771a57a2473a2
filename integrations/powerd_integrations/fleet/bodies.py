"""What a front router reads of a request's body, and how it says no.

House rules: pure; a text's tokens are estimated from its length, a list of token ids is counted; a caller that knows better
says so in a header.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

PROMPT_HEADER: Final = "X-Prompt-Tokens"


@dataclass(frozen=True, slots=True)
class Read:
    """The figures of a request that routing needs."""

    prompt_tokens: int
    max_tokens: int
    stream: bool


def read(raw: bytes, headers: Mapping[str, str], tokens_per_character: float, default_output: int) -> Read:
    """Read a completion's or a chat's body; ValueError when it is none."""
    try:
        body = json.loads(raw)
        asked = int(body.get("max_completion_tokens") or body.get("max_tokens") or default_output)
        stream = bool(body.get("stream"))
        if declared := headers.get(PROMPT_HEADER):
            return Read(max(1, int(declared)), asked, stream)
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (list, str)):
            prompt = prompt[0]
        if isinstance(prompt, list):
            return Read(max(1, len(prompt)), asked, stream)
        text = prompt if isinstance(prompt, str) else json.dumps([m.get("content") for m in body.get("messages", [])])
        return Read(max(1, math.ceil(len(text) * tokens_per_character)), asked, stream)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"the body is not a request: {error}") from None


def with_priority(raw: bytes, deadline_s: float) -> bytes:
    """Return a body that ``read`` took with its deadline as its priority: whole milliseconds, the earliest goes first."""
    return json.dumps({**json.loads(raw), "priority": round(1000 * deadline_s)}).encode()


def error(status: int, message: str) -> dict[str, Any]:
    """OpenAI's error body."""
    kind = "invalid_request_error" if status < 500 else "service_unavailable"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def broken_stream(message: str) -> bytes:
    """The event that tells a client that its stream ends too early."""
    body = {"error": {"message": message, "type": "internal_error", "param": None, "code": 502}}
    return b"data: " + json.dumps(body).encode() + b"\n\n"
