"""OpenAI's request and response bodies, as far as an engine without a model needs them.

House rules: pure; a bad body is a BadRequestError that says what to write; the tokenizer is the simplest one that can be
documented: a word between white space is a token, a list of numbers is a list of tokens, and the header ``X-Prompt-Tokens``
overrules both.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

PROMPT_HEADER = "X-Prompt-Tokens"
STOP_HEADER = "X-Stop-After"  # the simulated model ends its answer by itself after so many tokens, unless ignore_eos
WORD = "tok "
DEFAULT_TOKENS = 16  # of /v1/completions, as OpenAI documents it
CHAT_TOKENS = 256


class BadRequestError(ValueError):
    """The body cannot be served; the message says why."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request asks for."""

    chat: bool
    model: str
    prompt_tokens: int
    max_tokens: int
    stop_after: int | None
    stream: bool
    usage: bool
    usage_each: bool  # vLLM's continuous_usage_stats: in every event
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Latency:
    """What one request waited for, in milliseconds of the engine's clock; None: it had no such moment."""

    queued_ms: float | None
    time_to_first_token_ms: float | None
    inter_token_latency_p99_ms: float | None


def read(body: Any, headers: Mapping[str, str], *, chat: bool, name: str) -> Ask:
    """Read a request body; BadRequestError says what is wrong with it."""
    if not isinstance(body, dict):
        raise BadRequestError("the body is a JSON object")
    if body.get("n", 1) != 1 or body.get("best_of", 1) != 1:
        raise BadRequestError("n and best_of are 1: one answer per request")
    declared = headers.get(PROMPT_HEADER)
    counted = _messages(body.get("messages")) if chat else _prompt(body.get("prompt"))
    limit = body.get("max_completion_tokens" if chat else "max_tokens")
    if limit is None:
        limit = body.get("max_tokens")
    stop_after = headers.get(STOP_HEADER)
    options = body.get("stream_options")
    options = options if isinstance(options, dict) else {}
    return Ask(
        chat, str(body.get("model") or name), counted if declared is None else _count(declared, PROMPT_HEADER),
        (CHAT_TOKENS if chat else DEFAULT_TOKENS) if limit is None else _count(limit, "max_tokens"),
        None if stop_after is None or body.get("ignore_eos") else _count(stop_after, STOP_HEADER),
        bool(body.get("stream")), bool(options.get("include_usage")),
        bool(options.get("include_usage") and options.get("continuous_usage_stats")),
        _priority(body.get("priority")),
    )  # fmt: skip


def _priority(value: object) -> int:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63):
        return value or 0
    raise BadRequestError(f"priority is a whole number, lower goes first, not {value!r}")


def _count(value: object, what: str) -> int:
    try:
        number = int(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else -1
    except ValueError:
        number = -1
    if number < 1:
        raise BadRequestError(f"{what} is a number above zero, not {value!r}")
    return number


def _prompt(prompt: object) -> int:
    if isinstance(prompt, str):
        return max(1, len(prompt.split()))
    if isinstance(prompt, list) and prompt and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
        return len(prompt)
    if isinstance(prompt, list) and len(prompt) == 1:
        return _prompt(prompt[0])
    raise BadRequestError("prompt is a text, or a list of token ids")


def _messages(messages: object) -> int:
    if not isinstance(messages, list) or not messages:
        raise BadRequestError("messages is a list with at least one message")
    words = 0
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            content = " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        if not isinstance(content, str):
            raise BadRequestError("every message has a content")
        words += len(content.split())
    return max(1, words)


def usage(prompt_tokens: int, generated: int) -> dict[str, int]:
    """The usage block."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": generated, "total_tokens": prompt_tokens + generated}


def whole(ask: Ask, id_: str, generated: int, reason: str) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    text = WORD * generated
    choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
    choice |= {"message": {"role": "assistant", "content": text}} if ask.chat else {"text": text}
    return {**_head(ask, id_, "chat.completion" if ask.chat else "text_completion"), "choices": [choice],
            "usage": usage(ask.prompt_tokens, generated)}  # fmt: skip


def chunk(ask: Ask, id_: str, new: int, sent: int, reason: str | None) -> dict[str, Any]:
    """One event of a streamed answer: ``new`` tokens, with which ``sent`` are out, and why it ended when it has."""
    text = WORD * new
    choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
    choice |= {"delta": {"content": text}} if ask.chat else {"text": text}
    body = {**_head(ask, id_, "chat.completion.chunk" if ask.chat else "text_completion"), "choices": [choice]}
    return body | {"usage": usage(ask.prompt_tokens, sent)} if ask.usage_each else body


def last(ask: Ask, id_: str, generated: int, latency: Latency | None = None) -> dict[str, Any]:
    """The event with the usage block, and what the request's own latencies were where they are told."""
    kind = "chat.completion.chunk" if ask.chat else "text_completion"
    body = {**_head(ask, id_, kind), "choices": [], "usage": usage(ask.prompt_tokens, generated)}
    return body if latency is None else body | {"metrics": asdict(latency)}


def _head(ask: Ask, id_: str, kind: str) -> dict[str, Any]:
    return {"id": id_, "object": kind, "created": int(time.time()), "model": ask.model}


def error(status: int, message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """The body of an error."""
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
